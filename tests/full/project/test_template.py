"""The generated experiment as it is used: its notebook, and its own CI in an environment of its own."""

import fnmatch
import json
import shutil
from pathlib import Path

import yaml

from labtrain.record import receipt
from tests.conftest import LABTRAIN, QUICK, Experiment
from tests.support.template import WHEEL, files, run


def test_its_notebook_shows_a_run(own_experiment: Experiment, tmp_path: Path) -> None:
    """Executed as it stands, on a real run: a figure, the receipt's weights, and its test metrics computed again."""
    notebook = own_experiment.root / "notebooks" / "start.ipynb"
    cells = json.loads(notebook.read_text())["cells"]
    assert all(cell["id"] and not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    jupyter = [str(Path(LABTRAIN).with_name("jupyter")), "nbconvert", "--to", "notebook", "--execute"]
    command = [*jupyter, "notebooks/start.ipynb", "--output-dir", str(tmp_path)]
    empty = run(*command, cwd=own_experiment.root)
    assert empty.returncode != 0
    assert "no complete run: python train.py" in empty.stderr
    trained = own_experiment.train(*QUICK, "trainer.max_epochs=1", cwd=own_experiment.root)
    done = run(*command, cwd=own_experiment.root)
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in json.loads((tmp_path / "start.ipynb").read_text())["cells"]
               for output in cell.get("outputs", [])]  # fmt: skip
    text = "".join("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)
    assert trained.digest in text
    assert f"{trained.receipt['results']['metrics']['test/acc']:.4f}" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def test_it_stands_alone_and_passes_its_ci(own_experiment: Experiment) -> None:
    """`make setup` in the experiment makes an environment from its own locks and wheel; the steps of its workflow pass
    there as they stand, and the regression fails once the model is another; it makes another experiment.
    """
    root = own_experiment.root
    setup = run("make", "setup", cwd=root)
    assert setup.returncode == 0, setup.stderr
    assert run("make", "setup", cwd=root).stderr == "", "the second make setup had something to do"
    python = str(root / ".venv" / "bin" / "python")
    where = run(python, "-c", "import labtrain; print(labtrain.__file__)", cwd=root)
    assert where.stdout.startswith(str(root / ".venv"))
    doctor = run(str(root / ".venv/bin/labtrain"), "doctor", "--json", cwd=root)
    assert doctor.returncode == 0, doctor.stdout

    workflow = yaml.safe_load((root / ".github/workflows/ci.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    outputs = {}
    for step in steps:
        done = run("bash", "-e", "-c", step, cwd=root)
        assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
        outputs[step] = done.stdout
    assert "4 passed" in outputs["make test"]
    assert "runs/regression/" in outputs["make regression"]
    golden = root / "tests" / "golden" / "regression.txt"
    assert golden.read_text().strip() in outputs["make regression"]

    model = root / "model.py"
    model.write_text(model.read_text().replace("nn.ReLU()", "nn.SiLU()"))
    failed = run("make", "regression", cwd=root)
    assert failed.returncode != 0
    assert (
        f"expected {golden.read_text().strip()} from tests/golden/regression.txt: the training has changed"
        in failed.stderr
    )
    assert "\n\nhint: " in failed.stderr
    assert "make golden" in failed.stderr
    recorded = run("make", "golden", cwd=root)
    assert recorded.returncode == 0, recorded.stderr
    assert recorded.stdout == f"tests/golden/regression.txt: {golden.read_text()}"
    again = run("make", "regression", cwd=root)
    assert again.returncode == 0, again.stderr

    child = run(str(root / ".venv/bin/labtrain"), "new", "../child", cwd=root)
    assert child.returncode == 0, child.stderr
    assert files(root.parent / "child")["vendor/" + Path(WHEEL).name] == files(root)[WHEEL], (
        "an installed labtrain packs another wheel"
    )


def test_its_gate_runs_where_a_lock_changes(own_experiment: Experiment, tmp_path: Path) -> None:
    """The workflow's own command, on a baseline that is a receipt and its trail in the experiment's repository."""
    workflow = yaml.safe_load((own_experiment.root / ".github/workflows/gate.yml").read_text())
    paths = workflow[True]["pull_request"]["paths"]  # YAML 1.1 reads `on` as true
    for name in ("requirements.lock", "labtrain.lock", "conda-lock.yml", "flake.lock", "nix/wheels.json"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in paths), name
    (command,) = [step["run"] for step in workflow["jobs"]["gate"]["steps"] if "labtrain gate" in step.get("run", "")]
    done = own_experiment.train(*QUICK, "trainer.max_steps=4", f"paths.runs={tmp_path / 'runs'}")
    baseline = own_experiment.root / "baselines" / "digits"
    baseline.mkdir(parents=True)
    for name in ("receipt.json", "trail.jsonl"):
        shutil.copy(done.folder / name, baseline)
    command = command.replace(".venv/bin/labtrain", LABTRAIN)
    assert "yes: 1 of 1 give the same bits" in run("sh", "-c", command, cwd=own_experiment.root).stdout
    assert (own_experiment.root / "gate.html").exists()
    found = json.loads((baseline / "receipt.json").read_text())
    found["results"]["weights_digest"] = "0" * 64
    receipt.write(baseline, found)
    done = run("sh", "-c", command, cwd=own_experiment.root)
    assert done.returncode == 1
    assert "no: different bits, weights_digest" in done.stdout


def test_a_plotting_script_can_be_kept_out_of_the_name(own_experiment: Experiment, tmp_path: Path) -> None:
    """Another script gives another run; one that .labtrainignore names does not, until the experiment imports it."""
    root, options = own_experiment.root, (*QUICK, f"paths.runs={tmp_path}/runs", "trainer.max_steps=2")
    first = own_experiment.train(*options)
    (root / "plot.py").write_text("SCALE = 1.0\n")
    assert own_experiment.train(*options).folder != first.folder
    (root / ".labtrainignore").write_text("plot.py\n")
    again = own_experiment.train(*options)
    assert again.folder == first.folder
    assert "is complete: nothing to train" in again.err
    (root / "model.py").write_text("import plot\n" + (root / "model.py").read_text())
    importing = own_experiment.train(*options)
    (root / "plot.py").write_text("SCALE = 2.0\n")
    assert own_experiment.train(*options).folder not in (first.folder, importing.folder)


def test_a_name_with_a_hyphen(tmp_path: Path) -> None:
    assert run(LABTRAIN, "new", "vit-small", cwd=tmp_path).returncode == 0
    trained = Experiment(tmp_path / "vit-small").train(*QUICK, "trainer.max_steps=2")
    assert trained.folder.parent == tmp_path / "vit-small" / "runs" / "vit-small"
