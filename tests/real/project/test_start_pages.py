"""docs/start: what a page tells to write, written and run as it is printed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import LABTRAIN, ROOT, Experiment

START = ROOT / "docs/start"


def blocks(page: str, language: str) -> list[str]:
    """Return the code of a page in one language, in the page's order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (START / page).read_text(), re.MULTILINE | re.DOTALL)


def run(code: str, root: Path) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, '.')\n{code}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pages_train_a_model_of_ones_own_and_use_its_weights(own_experiment: Experiment) -> None:
    """Data, model, configuration and callback as printed; two devices give the digest of one; the notebook's code runs in
    notebooks/; the experiment's tests fit the new model and data.
    """
    root = own_experiment.root
    (root / "data.py").write_text(blocks("experiment.md", "python")[0])
    (root / "model.py").write_text(blocks("experiment.md", "python")[1])
    config = root / "conf/config.yaml"
    config.write_text(blocks("experiment.md", "yaml")[0].replace("experiment: tumours", "experiment: digits"))
    own_experiment.train(cwd=root)

    (root / "callbacks.py").write_text(blocks("experiment.md", "python")[2])
    config.write_text(config.read_text() + blocks("experiment.md", "yaml")[1])
    one = own_experiment.train(cwd=root)
    two = own_experiment.train("trainer.devices=2", "resume=never", cwd=root)
    run_dir, digest = one.out.split()
    assert two.out.split() == [f"{run_dir}-2", digest]

    table, use, _, train = blocks("notebook.md", "python")
    use = use.replace("38579417b2ea", Path(run_dir).name)
    run(table, root / "notebooks")
    assert run(use, root).startswith("tensor([")
    assert re.search(r"runs/notebook/[0-9a-f]{12} [0-9a-f]{64}$", run(train, root / "notebooks"))
    assert next((root / "runs/notebook").iterdir())

    fast = [sys.executable, "-m", "pytest", "-k", "batch or each_time"]
    tests = subprocess.run(fast, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert "2 passed" in tests.stdout, tests.stdout


def test_the_notebook_trains_compares_and_predicts(own_experiment: Experiment, tmp_path: Path) -> None:
    """Executed as it is, in the experiment's notebooks/; the run that it trains is that of train.py."""
    shutil.copy(ROOT / "docs/guides/python.ipynb", own_experiment.root / "notebooks")
    cells = json.loads((ROOT / "docs/guides/python.ipynb").read_text())["cells"]
    assert all(cell["id"] and not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    jupyter = [str(Path(LABTRAIN).with_name("jupyter")), "nbconvert", "--to", "notebook", "--execute"]
    command = [*jupyter, "notebooks/python.ipynb", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=own_experiment.root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    outputs = {cell["id"]: cell["outputs"] for cell in json.loads((tmp_path / "python.ipynb").read_text())["cells"]
               if cell["cell_type"] == "code"}  # fmt: skip
    text = {name: "".join("".join(each.get("text", each.get("data", {}).get("text/plain", ""))) for each in found)
            for name, found in outputs.items()}  # fmt: skip
    run = own_experiment.train("trainer.max_epochs=2", "logger=none", cwd=own_experiment.root)
    assert "is complete: nothing to train" in run.err
    assert run.digest in text["train"]
    assert "epoch 2/2" in text["train"], "what the training prints"
    assert run.folder.name in text["runs"]
    assert "this is a 0" in text["predict"]
    assert any("image/png" in output.get("data", {}) for output in outputs["predict"])
