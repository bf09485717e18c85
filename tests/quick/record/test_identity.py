import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.record.identity import Job, first_free, lock_digest, name, route
from labtrain.record.resume import fresh, make_job
from labtrain.record.sources import read_code

CONFIG = {
    "experiment": "digits",
    "seed": 42,
    "resume": "auto",
    "model": {"_target_": "model.Net", "width": 8},
    "data": {"_target_": "data.Data", "batch_size": 64, "num_workers": 0},
    "callbacks": {},
    "logger": {"tensorboard": {}},
    "trail": {"every_n_steps": 1},
    "paths": {"runs": "runs"},
    "checkpoint": {"url": None, "keep_last": 2},
    "determinism": {"mode": "strict", "shards": 4, "threads": 1},
    "trainer": {
        "accelerator": "auto",
        "strategy": "auto",
        "devices": 1,
        "num_nodes": 1,
        "max_epochs": 3,
        "enable_progress_bar": True,
        "log_every_n_steps": 10,
    },
}


def changed(key: str, value: object) -> dict:
    config = json.loads(json.dumps(CONFIG))
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    return config


def run_id(config: dict, code: str = "c", lock: str = "l") -> str:
    return name(config, code=code, lock=lock)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("experiment", "other"),
        ("resume", "never"),
        ("logger", {}),
        ("trail.every_n_steps", 0),
        ("paths.runs", "/scratch"),
        ("checkpoint.url", "/scratch"),
        ("data.num_workers", 4),
        ("trainer.enable_progress_bar", False),
        ("trainer.log_every_n_steps", 1),
    ],
)
def test_how_a_run_is_executed_is_no_part_of_its_name(key: str, value: object) -> None:
    assert run_id(changed(key, value)) == run_id(CONFIG)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 43),
        ("model.width", 9),
        ("data.batch_size", 65),
        ("trainer.max_epochs", 4),
        ("determinism.mode", "portable"),
        ("determinism.threads", 2),
        ("determinism.shards", 8),
        ("determinism.shards", None),
        ("trainer.strategy", "fsdp"),
    ],
)
def test_what_determines_the_bits_is(key: str, value: object) -> None:
    assert run_id(changed(key, value)) != run_id(CONFIG)


@pytest.mark.parametrize(
    ("key", "value"), [("trainer.devices", 4), ("trainer.num_nodes", 2), ("trainer.strategy", "ddp")]
)
def test_the_devices_are_part_of_the_name_only_without_shards(key: str, value: object) -> None:
    assert run_id(changed(key, value)) == run_id(CONFIG)
    plain = changed("determinism.shards", None)
    more = json.loads(json.dumps(plain))
    more["trainer"][key.partition(".")[2]] = value
    assert run_id(more) != run_id(plain)


def test_code_and_lock_are_part_of_the_name() -> None:
    assert len({run_id(CONFIG), run_id(CONFIG, code="d"), run_id(CONFIG, lock="m")}) == 3
    assert len(run_id(CONFIG)) == 12


def code_digest(root: Path) -> str:
    return read_code(root, CONFIG).digest


def test_the_code_is_the_experiments_own_sources(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("x = 1\n")
    first = code_digest(tmp_path)
    for elsewhere in (
        "tests/test_model.py",
        "runs/a/model.py",
        "vendor/x.py",
        ".hidden/x.py",
        "env/lib/x.py",
        "conda_env/lib/x.py",
        "__pycache__/model.cpython-311.pyc",
        "notes.md",
    ):
        path = tmp_path / elsewhere
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("y = 1\n")
    (tmp_path / "env" / "pyvenv.cfg").touch()
    (tmp_path / "conda_env" / "conda-meta").mkdir()
    assert code_digest(tmp_path) == first
    (tmp_path / "model.py").write_text("x = 2\n")
    second = code_digest(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "layer.py").write_text("z = 1\n")
    found = {first, second, code_digest(tmp_path)}
    for compiled in (
        "fast.cpython-311-x86_64-linux-gnu.so",
        "parts/hidden.pyc",
    ):  # what Python imports without a source
        (tmp_path / compiled).write_bytes(b"1")
        found.add(code_digest(tmp_path))
    assert len(found) == 5


def test_a_job_goes_to_stage_two_whole(tmp_path: Path) -> None:
    job = make_job(CONFIG, root=tmp_path, command=["train.py", "seed=42"])
    assert Job.from_json(job.to_json()) == job


def test_a_job_of_a_replay_writes_below_its_own_folder_alone(tmp_path: Path) -> None:
    """Whatever path the job was given: through `..`, through a link, or beside a folder of the same beginning."""
    job = make_job(CONFIG | {"paths": {"runs": str(tmp_path / "runs")}}, root=tmp_path, command=[])
    job.hold("/anywhere")
    held = dataclasses.replace(job, within=str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "link").symlink_to(tmp_path)
    held.hold(tmp_path / "scratch" / "runs" / "digits")
    for place in ("", "../scratch2/x", "scratch2", "scratch/../x", "scratch/link/x"):
        with pytest.raises(LabtrainError, match="the only folder that this training may write to"):
            held.hold(tmp_path / place)


@pytest.mark.parametrize(("name", "good"), [("70123-1", True), ("night_2", True), ("../x", False), ("a b", False)])
def test_a_launchers_name_is_part_of_a_folders_name(name: str, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With resume=never all ranks begin in RUN-NAME; a name with a slash would be a folder elsewhere."""
    for key, value in {"TORCHELASTIC_RUN_ID": name, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0",
                       "LOCAL_RANK": "0", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    if good:
        assert fresh(Path("runs/0123456789ab")).name == f"0123456789ab-{name}"
    else:
        with pytest.raises(ConfigError, match="may have only letters, digits, _ and -"):
            fresh(Path("runs/0123456789ab"))


def test_never_starts_beside(tmp_path: Path) -> None:
    run_dir = tmp_path / "abc"
    assert first_free(run_dir) == run_dir
    run_dir.mkdir()
    (tmp_path / "abc-2").mkdir()
    assert first_free(run_dir) == tmp_path / "abc-3"


def test_the_lock_is_that_of_the_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """conda's builds have bits of their own, so a run there has a name of its own; so have those for a CPU."""
    for lock in ("requirements.lock", "conda-lock.yml", "conda-lock-cpu.yml", "requirements-conda.lock"):
        (tmp_path / lock).write_text(lock)
    wheels = lock_digest(tmp_path)
    assert route() == "wheels"
    (tmp_path / "prefix" / "conda-meta").mkdir(parents=True)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "prefix"))
    assert route() == "conda"
    conda = lock_digest(tmp_path)
    assert conda != wheels
    (tmp_path / "prefix" / "conda-meta" / "pytorch-2.9.1-cpu_mkl_py312_hd3d05ca_101.json").touch()
    assert route() == "conda-cpu"
    assert lock_digest(tmp_path) not in (conda, wheels)
    monkeypatch.setattr("sys.prefix", "/nix/store/abc-env")
    assert route() == "nix"
    assert lock_digest(tmp_path) == wheels
    assert lock_digest(tmp_path / "nothing") == ""


def test_what_train_py_adds_to_its_path_is_there_when_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the environment, and a relative one too: hashed by stage 1, and found by the process that trains."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mylabutils.py").write_text("")
    (tmp_path / "lib" / "torchmetrics.py").write_text("")  # comes after the environment's, and so is none of the code
    root = tmp_path / "exp"
    root.mkdir()
    (root / "model.py").write_text("from mylabutils import K\nimport torchmetrics\n")
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [str(root), *sys.path[1:], "../lib"])
    job = make_job(CONFIG, root=root, command=["train.py"])
    code = (
        "from pathlib import Path\nfrom labtrain.record.identity import Job\nfrom labtrain.record.sources import read_code\n"
        f"job = Job.from_json({job.to_json()!r})\njob.enter_path()\nfound = read_code(Path(job.root), job.config)\n"
        "print(found.digest == job.code_digest, *found.outside)\nimport mylabutils\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "True mylabutils.py\n"
