"""The generated experiment: its files, the two ways to make it, and its gate."""

import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from labtrain.assets import LOCKS, SOURCES, asset
from labtrain.project.new import build_wheel
from tests.conftest import LABTRAIN, ROOT, Experiment
from tests.support.template import WHEEL, files, run

OWN = {
    ".github/workflows/ci.yml",
    ".github/workflows/gate.yml",
    ".dockerignore",
    ".gitignore",
    "Makefile",
    "README.md",
    "conf/config.yaml",
    "conf/experiment/regression.yaml",
    "data.py",
    "model.py",
    "notebooks/start.ipynb",
    "pyproject.toml",
    "setup.sh",
    "tests/golden/regression.txt",
    "tests/test_experiment.py",
    "train.py",
    "train.sbatch",
}
COPIED = {"labtrain.lock", WHEEL} | {
    str(name / path.relative_to(source))
    for name, source in ((Path(name), ROOT / SOURCES[name]) for name in LOCKS)
    for path in [source, *source.rglob("*")]
    if path.is_file()
}


def test_both_ways_make_the_same_files_and_only_these(tmp_path: Path) -> None:
    """`cookiecutter template/` and `labtrain new`; the wheel has the same bytes each time."""
    by_hand = run(
        str(Path(LABTRAIN).with_name("cookiecutter")),
        str(ROOT / "template"),
        "--no-input",
        "-o",
        "one",
        cwd=tmp_path,
        env={"HOME": str(tmp_path)},
    )
    assert by_hand.returncode == 0, by_hand.stderr
    (tmp_path / "scratch").mkdir()
    outside = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "scratch")}
    by_labtrain = run(LABTRAIN, "new", "two/digits", cwd=tmp_path, env=outside)
    assert by_labtrain.returncode == 0, by_labtrain.stderr
    assert by_labtrain.stdout == "two/digits\n"
    assert f"next: cd two/digits && {Path(LABTRAIN).with_name('python')} train.py" in by_labtrain.stderr
    activated = {"PATH": f"{Path(LABTRAIN).parent}:{os.environ['PATH']}"}
    assert "&& python train.py" in run(LABTRAIN, "new", "three", cwd=tmp_path, env=outside | activated).stderr
    assert files(tmp_path / "one" / "digits") == files(tmp_path / "two" / "digits")
    assert set(files(tmp_path / "one" / "digits")) == OWN | COPIED
    assert not (tmp_path / "home").exists(), "labtrain new left something in the home directory"
    assert list((tmp_path / "scratch").iterdir()) == [], "labtrain new left something in the temporary directory"


def test_it_is_small(shared_experiment: Experiment) -> None:
    lines = sum(len((shared_experiment.root / name).read_text().splitlines()) for name in OWN if name.endswith(".py"))
    assert len(OWN) <= 20
    assert lines <= 300


def test_nothing_of_the_template_is_left_in_it(shared_experiment: Experiment) -> None:
    for name in OWN:
        text = (shared_experiment.root / name).read_text()
        assert "cookiecutter" not in text.replace("cookiecutter template/", ""), name
    assert "${{ hashFiles('requirements.lock') }}" in (shared_experiment.root / ".github/workflows/ci.yml").read_text()


def test_it_is_formatted_and_lints(shared_experiment: Experiment) -> None:
    ruff = str(Path(LABTRAIN).with_name("ruff"))
    for command in (["format", "--check", "."], ["check", "."]):
        done = run(ruff, *command, "--no-cache", cwd=shared_experiment.root)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "overrides", "experiment", "mode"),
    [
        (False, [], "digits", "strict"),
        (False, ["experiment=foo.1"], "foo.1", "strict"),
        (False, ["experiment=regression"], "regression", "portable"),
        (False, ["experiment=regression", "determinism.mode=off"], "regression", "off"),
        (False, ['experiment="7"'], "7", "strict"),
        (True, [], "digits", "strict"),
        (True, ["experiment=foo"], "foo", "strict"),
    ],
)
def test_experiment_names_the_runs_and_picks_a_file_where_there_is_one(
    own_experiment: Experiment, old: bool, overrides: list[str], experiment: str, mode: str
) -> None:
    """Also in an experiment of before there was such a group: there it is a key."""
    if old:
        config = own_experiment.root / "conf" / "config.yaml"
        now = config.read_text().replace("${hydra:runtime.choices.experiment}", "digits")
        config.write_text(now.replace(", optional experiment: digits", ""))
        shutil.rmtree(own_experiment.root / "conf" / "experiment")
    done = own_experiment.train(*overrides, "--cfg", "job", "--resolve")
    found = yaml.safe_load(done.out)
    assert (found["experiment"], found["determinism"]["mode"]) == (experiment, mode)


def test_a_number_is_no_name_of_an_experiment(shared_experiment: Experiment) -> None:
    done = shared_experiment.train("experiment=7", code=2)
    assert "Got int" in done.err
    assert "hint: quote a name that is a number: 'experiment=\"7\"'" in done.err


def test_the_lock_names_the_wheel_that_made_it(shared_experiment: Experiment) -> None:
    wheel = shared_experiment.root / WHEEL
    assert (
        shared_experiment.root / "labtrain.lock"
    ).read_text() == f"./{WHEEL} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
    assert (shared_experiment.root / "requirements.lock").read_bytes() == (ROOT / "requirements.lock").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("labtrain/training/fit.py") == (ROOT / "src/labtrain/training/fit.py").read_bytes()
        for name in ("requirements.lock", "conda-lock-cpu.yml", "pixi.toml", "pixi.lock"):
            assert archive.read(f"labtrain/assets/{name}") == (ROOT / name).read_bytes()
        assert "labtrain/conf/labtrain.yaml" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".pyc")]


def test_its_locks_agree_and_are_exported_with_its_wheel(own_experiment: Experiment) -> None:
    """`labtrain lock check` and `lock export` in an experiment; a change there is named, as in the repository."""
    root = own_experiment.root
    done = run(LABTRAIN, "lock", "check", cwd=root)
    assert done.returncode == 0, done.stdout
    done = run(LABTRAIN, "lock", "export", cwd=root)
    assert done.returncode == 0, done.stderr
    assert f'path = "{WHEEL}"' in (root / "pylock.toml").read_text()
    text = (root / "pixi.lock").read_text()
    (root / "pixi.lock").write_text(text.replace("size: 8244", "size: 8245"))
    done = run(LABTRAIN, "lock", "check", cwd=root)
    assert done.returncode == 1
    assert "pixi.lock  _openmp_mutex-4.5-7_kmp_llvm.conda" in done.stdout


def test_the_assets_are_those_that_hatchling_packs() -> None:
    import tomllib

    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "force-include"
    ]
    assert {target.removeprefix("labtrain/assets/"): source for source, target in packed.items()} == SOURCES
    assert all(asset(name).exists() for name in SOURCES)


def test_the_packed_wheel_holds_what_hatchlings_does(tmp_path: Path) -> None:
    """Ours is packed where there may be no source tree; its files are those of a build from the source."""
    hatch = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    assert hatch.returncode == 0, hatch.stderr
    built = next(tmp_path.glob("*.whl"))
    packed = build_wheel(tmp_path / "packed")

    def contents(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            return {
                name: archive.read(name)
                for name in archive.namelist()
                if not name.endswith((".dist-info/RECORD", ".pyc"))
            }

    assert contents(packed) == contents(built)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["new", "two words"], "'two words' is not a valid name"),
        (["new", "9lives"], "'9lives' is not a valid name"),
        (["new", "./-lives"], "'-lives' is not a valid name"),
        (["new", "there"], "there already exists"),
        (["new", "missing/../there"], "there already exists"),
    ],
)
def test_a_bad_target_is_refused_and_nothing_is_made(command: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    done = run(LABTRAIN, *command, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "\n\nhint: " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_experiment_inside_another_is_refused(own_experiment: Experiment) -> None:
    """Its files would be part of the other's code, so runs of the other could not be verified."""
    for target, below in (("tumours", "."), ("deep/tumours", "."), ("tumours", "notebooks")):
        before = files(own_experiment.root)
        done = run(LABTRAIN, "new", target, cwd=own_experiment.root / below)
        assert done.returncode == 2
        assert f"{target} is inside the experiment {own_experiment.root}\n\n" in done.stderr
        assert f"hint: labtrain new {'../' * (1 + (below != '.'))}tumours\n" in done.stderr
        assert files(own_experiment.root) == before


def test_a_bad_name_is_refused_by_cookiecutter_too(tmp_path: Path) -> None:
    cookiecutter = str(Path(LABTRAIN).with_name("cookiecutter"))
    done = run(
        cookiecutter,
        str(ROOT / "template"),
        "--no-input",
        "-o",
        "out",
        "name=two words",
        cwd=tmp_path,
        env={"HOME": str(tmp_path / "home")},
    )
    assert done.returncode != 0
    assert "'two words' is not a valid name" in done.stderr
    assert not (tmp_path / "out" / "two words").exists()
