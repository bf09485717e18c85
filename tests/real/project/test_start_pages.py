"""docs/start: what a page tells to write, written and run as it is printed."""

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, Experiment

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
