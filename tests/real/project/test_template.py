"""The generated experiment: its files, the two ways to make it, and its gate."""

import email
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from labtrain.assets import LOCKS, SOURCES, asset
from labtrain.project.carried import build_wheel
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
    """Ours is packed where there may be no source tree; its files are those of a build from the source.

    Its metadata say the same, but for the long description.
    """
    hatch = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    assert hatch.returncode == 0, hatch.stderr
    built = next(tmp_path.glob("*.whl"))
    packed = build_wheel(tmp_path / "packed")

    def contents(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            return {
                name: archive.read(name)
                for name in archive.namelist()
                if not name.endswith((".dist-info/RECORD", ".dist-info/WHEEL", ".pyc"))
            }

    def metadata(files: dict[str, bytes]) -> dict[str, list[str]]:
        text = next(files.pop(name) for name in list(files) if name.endswith("/METADATA")).decode()
        fields = email.message_from_string(text)
        left_out = ("Metadata-Version", "Keywords", "Classifier", "Description-Content-Type")
        found = {name: sorted(fields.get_all(name, [])) for name in fields if name not in left_out}
        found["Requires-Dist"] = sorted({str(Requirement(line)) for line in found["Requires-Dist"]})
        found["Requires-Python"] = sorted(found["Requires-Python"][0].split(","))
        return found

    ours, theirs = contents(packed), contents(built)
    assert metadata(ours) == metadata(theirs)
    assert ours == theirs


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


@pytest.fixture(scope="module")
def cookiecutter_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cookiecutter in an environment of its own, without labtrain, and a clone of labtrain's tree."""
    folder = tmp_path_factory.mktemp("alone")
    uv = str(Path(LABTRAIN).with_name("uv"))
    assert run(uv, "venv", "-q", "--no-config", "--python", sys.executable, "venv", cwd=folder).returncode == 0
    installed = run(uv, "pip", "install", "-q", "--python", "venv/bin/python", "cookiecutter", cwd=folder)
    assert installed.returncode == 0, installed.stderr
    assert not list(folder.glob("venv/lib/*/site-packages/labtrain*"))
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / "labtrain" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "labtrain" / name)
    author = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "labtrain"]):
        assert run("git", *command, cwd=folder / "labtrain").returncode == 0
    return folder


def alone(folder: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    home = {"HOME": str(cwd / "home"), "PYTHONPATH": ""}
    return run(str(folder / "venv/bin/cookiecutter"), *words, "--no-input", cwd=cwd, env=home)


@pytest.mark.parametrize("road", ["a path", "a relative path", "an address"])
def test_cookiecutter_alone_makes_what_labtrain_new_makes(
    cookiecutter_alone: Path, road: str, shared_experiment: Experiment, tmp_path: Path
) -> None:
    """In an environment that has never heard of labtrain; the same bytes, also of the wheel."""
    words = {
        "a path": [str(cookiecutter_alone / "labtrain/template")],
        "a relative path": [os.path.relpath(cookiecutter_alone / "labtrain/template", tmp_path)],
        "an address": [f"git+file://{cookiecutter_alone}/labtrain", "--directory", "template"],
    }[road]
    done = alone(cookiecutter_alone, *words, f"name={shared_experiment.root.name}", "author=a test", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = files(tmp_path / shared_experiment.root.name)
    expected = files(shared_experiment.root)
    assert {name: made.get(name) for name in OWN | COPIED} == {name: expected[name] for name in OWN | COPIED}
    assert set(made) == OWN | COPIED
    cloned = tmp_path / "home/.cookiecutters/labtrain"
    assert road != "an address" or run("git", "status", "--porcelain", "--ignored", cwd=cloned).stdout == ""


def test_a_template_without_its_labtrain_is_refused(cookiecutter_alone: Path, tmp_path: Path) -> None:
    """Nothing is made: the hook looks for labtrain before the first file is written."""
    shutil.copytree(ROOT / "template", tmp_path / "template")
    done = alone(cookiecutter_alone, "template", cwd=tmp_path)
    assert done.returncode != 0
    assert f"error: labtrain is not next to the template in {tmp_path}/template" in done.stderr
    assert "hint: cookiecutter REPOSITORY --directory template" in done.stderr
    assert not (tmp_path / "digits").exists()


@pytest.mark.parametrize("lost", ["conda-lock.yml", "containers", "LICENSE", "tests/golden/receipt.json"])
def test_an_incomplete_labtrain_is_refused(cookiecutter_alone: Path, lost: str, tmp_path: Path) -> None:
    """As in a sparse clone: it would make an experiment without these files, with another wheel."""
    shutil.copytree(cookiecutter_alone / "labtrain", tmp_path / "sparse", ignore=shutil.ignore_patterns(".git"))
    path = tmp_path / "sparse" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = alone(cookiecutter_alone, "sparse/template", cwd=tmp_path)
    assert done.returncode != 0
    assert f"error: this labtrain is incomplete: without {lost.removeprefix('tests/')}\n" in done.stderr
    assert not (tmp_path / "digits").exists()


def test_an_older_python_is_refused(tmp_path: Path) -> None:
    """The hook can be read by any Python 3, and says which one it needs."""
    text = (ROOT / "template/hooks/pre_gen_project.py").read_text()
    hook = text.replace("{{ cookiecutter.name | tojson }}", '"digits"').replace("PYTHON = (3, 11)", "PYTHON = (3, 99)")
    (tmp_path / "hook.py").write_text(hook.replace("{{ cookiecutter._repo_dir | tojson }}", '"template"'))
    done = run(sys.executable, "hook.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "Python 3.11 or later expected" in done.stderr


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
