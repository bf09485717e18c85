"""Runs from elsewhere: what a command-line word names, and what hostile repositories, locks, wheels and zips cannot do."""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from labtrain.assets import asset
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.untrusted import scratch_folder
from labtrain.environment.from_lock import ForeignLock, interpreter_for, read_foreign_lock
from labtrain.environment.lock.pins import parse_pins
from labtrain.record.differences import open_run
from labtrain.review.crate import SEAL
from labtrain.review.foreign.bundle import is_bundle, unpack
from labtrain.review.foreign.judge import foreign_in
from labtrain.review.foreign.repository import Target, fetch, repository_in
from labtrain.review.replay import Replay
from labtrain.review.verification import alone, append_verdict
from tests.support.verification import git

WHEEL = "labtrain-9.9.9-py3-none-any.whl"


def words(folder: Path) -> dict[str, tuple[str, str] | None]:
    """What each word names: (url, revision), or a run."""
    return {
        "https://host/lab/digits": ("https://host/lab/digits", ""),
        "https://ada@host/lab/digits@v1.2": ("https://ada@host/lab/digits", "v1.2"),
        "https://ada:secret@host/digits": ("https://ada:secret@host/digits", ""),
        "ssh://git@host:22/digits.git@feature/x": ("ssh://git@host:22/digits.git", "feature/x"),
        "git@host:lab/digits": ("git@host:lab/digits", ""),
        "git@host:lab/digits.git@0123abc": ("git@host:lab/digits.git", "0123abc"),
        "https://host/@lab/digits": ("https://host/@lab/digits", ""),
        "https://host/@lab/digits@feature/x": ("https://host/@lab/digits", "feature/x"),
        "git@host:@lab/digits@v1": ("git@host:@lab/digits", "v1"),
        "ext::sh -c id": ("ext::sh -c id", ""),
        f"{folder}/work": (f"{folder}/work", ""),
        f"{folder}/work@main": (f"{folder}/work", "main"),
        f"{folder}/bare.git": (f"{folder}/bare.git", ""),
        f"{folder}/file.bundle": (f"{folder}/file.bundle", ""),
        f"{folder}/run": None,
        f"{folder}/receipt.json": None,
        "digits/906ca0": None,
        "906ca0d1e2f3": None,
        "runs/digits/906ca0d1e2f3": None,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work tree with two receipts, a bare clone of it, a git bundle, a run inside a repository, and a receipt."""
    root = tmp_path_factory.mktemp("places")
    (root / "work").mkdir()
    git(root / "work", "init", "-q", "-b", "main")
    for name in ("a/receipt.json", "b/receipt.json", "c.json", "no receipt/x.txt"):
        (root / "work" / name).parent.mkdir(exist_ok=True)
        (root / "work" / name).write_text("{}")
    git(root / "work", "add", "-A")
    git(root / "work", "commit", "-qm", "all")
    git(root, "clone", "-q", "--bare", "work", "bare.git")
    git(root / "work", "bundle", "create", "-q", str(root / "file.bundle"), "HEAD", "main")
    (root / "run" / ".git").mkdir(parents=True)
    for place in (root / "run", root):
        (place / "receipt.json").write_text("{}")
    return root


def test_a_word_names_a_repository_or_a_run(folder: Path) -> None:
    """A run's folder, id and receipt keep their meaning; only the last @ after the host begins a commit."""
    for word, wanted in words(folder).items():
        found = repository_in(word)
        assert (found and (found.url, found.revision)) == wanted, word
    assert foreign_in(str(folder / "work")) == Target(url=str(folder / "work"), revision="")
    assert str(Target(url="https://ada:secret@host/digits", revision="")).count("secret") == 0


@pytest.mark.parametrize(
    "url", ["ext::sh -c touch% RAN", "fd::17", "http://host/x", "s3://lab/x", "--upload-pack=touch RAN", "-x"]
)
def test_git_starts_no_program_for_an_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(ConfigError, match="labtrain clones only"):
        fetch(Target(url=url, revision=""), tmp_path / "scratch", named=None)
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


@pytest.mark.parametrize("revision", ["--all", "a..b", "main^{tree}", "@{-1}", "main:a", "HEAD~1"])
def test_a_revision_is_a_commit_a_tag_or_a_branch(revision: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="not a commit, tag or branch"):
        repository_in(f"https://host/x@{revision}")


@pytest.mark.parametrize(
    ("revision", "named", "said"),
    [
        ("", None, r"2 receipts in commit [0-9a-f]{12}[\s\S]*\n +a/receipt\.json\n +b/receipt\.json"),
        ("main", "d", r"no d in commit[\s\S]*it has:\n +a/receipt\.json"),
        ("v9", None, "no such commit, tag or branch; it has main"),
        ("0" * 40, None, "no such commit"),
        ("", "a", r"receipt\.json is broken"),
        ("", "c.json", r"c\.json"),
    ],
)
def test_errors_say_what_the_repository_has(
    revision: str, named: str | None, said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DamagedError), match=said) as caught:
        fetch(Target(url=str(folder / "work"), revision=revision), tmp_path, named=named)
    assert caught.value.hint
    assert str(tmp_path) not in str(caught.value)


def test_nothing_of_a_repository_runs_when_it_is_cloned(folder: Path, tmp_path: Path) -> None:
    """No hook, filter or file system monitor of its configuration, no submodule, and no link is a receipt."""
    root, canary = tmp_path / "hostile", tmp_path / "ran"
    git(tmp_path, "clone", "-q", str(folder / "work"), str(root))
    (root / ".gitattributes").write_text("* filter=evil\n")
    (root / ".gitmodules").write_text(f'[submodule "s"]\npath = s\nurl = {folder / "bare.git"}\n')
    (root / "linked").mkdir()
    (root / "linked" / "receipt.json").symlink_to("/etc/passwd")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "evil")
    for hook in ("post-checkout", "reference-transaction", "post-index-change"):
        (root / ".git" / "hooks" / hook).write_text(f"#!/bin/sh\ntouch {canary}\n")
        (root / ".git" / "hooks" / hook).chmod(0o755)
    for key in ("filter.evil.smudge", "core.fsmonitor", "uploadpack.packObjectsHook", "core.sshCommand"):
        git(root, "config", key, f"touch {canary}; cat")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(ConfigError, match=r"2 receipts") as caught:
        fetch(Target(url=str(root), revision=""), tmp_path / "scratch", named=None)
    assert "linked" not in str(caught.value)
    assert not canary.exists()


# ---------------------------------------------------------------------------------------------------------- the lock


def experiment(root: Path, lock: str, wheel: bytes = b"a wheel") -> Path:
    """The files of an experiment that its environment is made from."""
    (root / "vendor").mkdir(parents=True)
    (root / "vendor" / WHEEL).write_bytes(wheel)
    (root / "requirements.lock").write_text(lock)
    digest = hashlib.sha256(wheel).hexdigest()
    (root / "labtrain.lock").write_text(f"./vendor/{WHEEL} --hash=sha256:{digest}\n")
    return root


PIN = f"six==1.17.0 --hash=sha256:{'0' * 64}\n"


@pytest.mark.parametrize(
    "line",
    ["--index-url https://host/", "--extra-index-url=https://host/", "-i https://host", "--find-links /tmp", "-e .",
     "-r other.txt", "-c other.txt", "pkg @ file:///tmp/pkg", "pkg @ https://host/p.whl", "./pkg.whl", "/tmp/pkg",
     "git+https://host/x", "six==1.17.0", "six>=1", "--trusted-host host", "--no-binary :all:", "six==${HOME}",
     f"six==1.17.0 --hash=md5:{'0' * 32}", f"six==1.17.0 --config-settings=a --hash=sha256:{'0' * 64}"],
)  # fmt: skip
def test_only_pins_with_hashes_are_obeyed(line: str, tmp_path: Path) -> None:
    """An index, a path, a URL or an option in a foreign lock is refused, and the error has the line."""
    with pytest.raises(DamagedError, match="not a pin with hashes") as caught:
        read_foreign_lock(experiment(tmp_path / "x", f"{PIN}{line}\n"))
    assert line[:60] in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_the_wheel_must_be_the_locked_one(tmp_path: Path) -> None:
    root = experiment(tmp_path / "x", PIN)
    assert read_foreign_lock(root).wheel == b"a wheel"
    (root / "vendor" / WHEEL).write_bytes(b"another")
    with pytest.raises(DamagedError, match=r"labtrain\.lock says"):
        read_foreign_lock(root)
    (root / "vendor" / WHEEL).unlink()
    (root / "vendor" / WHEEL).symlink_to("/etc/passwd")
    with pytest.raises(DamagedError, match="a link to /etc/passwd"):
        read_foreign_lock(root)
    for text in (f"./vendor/../{WHEEL} --hash=sha256:{'0' * 64}", f"/tmp/{WHEEL} --hash=sha256:{'0' * 64}", "-e ."):
        (root / "labtrain.lock").write_text(text)
        with pytest.raises(DamagedError, match=r"labtrain\.lock"):
            read_foreign_lock(root)
    (root / "labtrain.lock").unlink()
    with pytest.raises(ConfigError, match=r"no labtrain\.lock at that commit"):
        read_foreign_lock(root)


def test_a_source_archive_is_built_only_if_our_lock_has_it() -> None:
    """antlr4-python3-runtime has no wheel. With another hash or version uv may only take a wheel, so it fails."""
    own = asset("requirements.lock").read_text()
    assert lock_of(own).only_as_wheels() == []
    pin = next(pin for pin in lock_of(own).pins if pin.name == "antlr4-python3-runtime")
    assert lock_of(own.replace(pin.hashes[0], "0" * 64)).only_as_wheels() == [pin.name]
    assert lock_of(own.replace(f"{pin.name}=={pin.version}", f"{pin.name}==4.9.2")).only_as_wheels() == [pin.name]
    again = lock_of(lock_of(own).requirements())
    assert {(each.name, each.version, each.marker, each.hashes) for each in again.pins} == {
        (each.name, each.version, each.marker, each.hashes) for each in lock_of(own).pins
    }


def lock_of(text: str, wheel: bytes = b"") -> ForeignLock:
    return ForeignLock(pins=parse_pins(text, Path("requirements.lock")), wheel=wheel, wheel_name=WHEEL,
                       wheel_sha256=hashlib.sha256(wheel).hexdigest())  # fmt: skip


def wheel_with(files: dict[str, str]) -> bytes:
    """A labtrain wheel with these files."""
    info = "labtrain-9.9.9.dist-info"
    files = files | {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: labtrain\nVersion: 9.9.9\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return made.getvalue()


def test_a_hostile_wheel_runs_nothing_when_its_environment_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its .pth, sitecustomize or package; and an installation that was cut short is not taken for an environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    canary = tmp_path / "ran"
    code = f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n"
    data = "labtrain-9.9.9.data/data"
    wheel = wheel_with({"evil.pth": code, "sitecustomize.py": code, "labtrain/__init__.py": code,
                        f"{data}/pyvenv.cfg": f"home = {tmp_path}\n"})  # fmt: skip
    lock, said = lock_of("", wheel), list[str]()
    asked = {"version": sys.version.split()[0], "own_sha256": lambda: "", "say": said.append}
    broken = lock_of(f"six==1.17.0 --hash=sha256:{'0' * 64}\n", wheel)
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.raises(LabtrainError, match="uv pip sync failed"):
        interpreter_for(broken, **asked)  # type: ignore[arg-type]
    environments = tmp_path / "cache" / "labtrain" / "environments"
    assert [path.suffix for path in environments.iterdir()] == [".lock"]
    (environments / "interrupted.making").mkdir()
    made = interpreter_for(lock, **asked)  # type: ignore[arg-type]
    assert "made now" in made.said
    assert next(made.reads[0].glob("lib/*/site-packages/evil.pth")).exists()
    assert "kept from before" in interpreter_for(lock, **asked).said  # type: ignore[arg-type]
    next(made.reads[0].glob("lib/*/site-packages/labtrain/__init__.py")).unlink()
    assert made.reads[1] == Path(sys.base_prefix)  # not the folder that the wheel's pyvenv.cfg names
    assert not canary.exists()
    subprocess.run([made.python, "-c", ""], check=False)
    assert canary.exists()  # so it would have run


# ---------------------------------------------------------------------------------------------------------- the zip


def packed(files: dict[str, bytes], *, extra: list[zipfile.ZipInfo | str] | None = None, sealed: bool = False) -> bytes:
    """A zip with these files, metadata that names them, and more entries."""
    graph = [{"@id": name, "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = SEAL + b"0" * 64 if sealed else b""
        archive.writestr("ro-crate-metadata.json", json.dumps({"@graph": graph}))
        for name, data in files.items():
            archive.writestr(name, data)
        for entry in extra or ():
            archive.writestr(entry, b"x")
    found = made.getvalue()
    return found[:-64] + hashlib.sha256(found[:-64]).hexdigest().encode() if sealed else found


def link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


def refused(data: bytes, folder: Path) -> str:
    """Return the error of unpacking a zip."""
    (folder / "x.zip").write_bytes(data)
    (folder / "scratch").mkdir(exist_ok=True)
    with pytest.raises(DamagedError) as caught:
        unpack(folder / "x.zip", folder / "scratch")
    return str(caught.value)


FILES = {"train.py": b"import model\n", "receipt.json": asset("golden/receipt.json").read_bytes()}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: packed(FILES, extra=["../x"]), "not a file's relative name"),
        (lambda: packed(FILES, extra=["/etc/x"]), "not a file's relative name"),
        (lambda: packed(FILES, extra=["a//x"]), "not a file's relative name"),
        (lambda: packed(FILES, extra=["a\\..\\x"]), "not a file's relative name"),
        (lambda: packed(FILES, extra=[".git/config"]), "not a file's relative name"),
        (lambda: packed(FILES, extra=["folder/"]), "not a file's relative name"),
        (lambda: packed(FILES, extra=["train.py"]), "train.py is there twice"),
        (lambda: packed(FILES, extra=["train.py/x"]), "train.py is a file and a folder"),
        (lambda: packed(FILES, extra=[link()]), "link is not a plain file"),
        (lambda: packed(FILES, extra=["more.py"]), "more.py is not in ro-crate-metadata.json"),
        (lambda: packed({"zeros": bytes(300_000_000)}), "too much to unpack"),
        (lambda: packed(FILES)[:-30], "not a whole zip file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_hostile_zip_is_refused_before_anything_is_written(
    data: Callable[[], bytes], said: str, tmp_path: Path
) -> None:
    assert said in refused(data(), tmp_path)
    assert not any((tmp_path / "scratch").iterdir())


def test_each_changed_byte_of_a_bundle_is_found(tmp_path: Path) -> None:
    """In a file's content the error names the file. A zip without a seal, packed anew, is checked file by file."""
    files = {"train.py": b"import model\n", "receipt.json": FILES["receipt.json"]}
    for sealed in (True, False):
        assert "not the sources of its receipt" in refused(packed(files, sealed=sealed), tmp_path)
        (tmp_path / "scratch").rename(tmp_path / f"scratch {sealed}")
    whole = packed(files, sealed=True)
    content = whole.index(b"train.py") + len(b"train.py") + 3
    for place in {*range(0, len(whole), 97), *range(len(whole) - 200, len(whole))}:
        changed = bytearray(whole)
        changed[place] ^= 1
        said = refused(bytes(changed), tmp_path) if is_zip(changed, tmp_path) else "not a zip"
        assert "not the sources" not in said, place
        subprocess.run(["rm", "-rf", tmp_path / "scratch"], check=True)
    changed = bytearray(whole)
    changed[content] ^= 1
    assert "train.py was changed" in refused(bytes(changed), tmp_path)


def is_zip(data: bytes, folder: Path) -> bool:
    (folder / "y.zip").write_bytes(data)
    return is_bundle(folder / "y.zip")


@pytest.mark.parametrize("change", ["no receipt", "not JSON", "linked above", "linked", "a pipe", "a broken line"])
def test_a_rerun_that_spoils_its_own_files_is_one_error(change: str, tmp_path: Path) -> None:
    """The judge follows no link out of the rerun's folder, waits for no pipe, and names no temporary folder."""
    replay = Replay.__new__(Replay)
    replay.scratch = tmp_path / "first"
    replay.run_dir = replay.scratch / "runs" / "digits" / "906ca0d1e2f3"
    replay.run_dir.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere" / "906ca0d1e2f3"
    elsewhere.mkdir(parents=True)
    for folder in (replay.run_dir, elsewhere):
        (folder / "receipt.json").write_bytes(asset("golden/receipt.json").read_bytes())
        (folder / "trail.jsonl").write_bytes(asset("golden/trail.jsonl").read_bytes())
    assert replay.final_receipt()["status"] == "complete"
    assert replay.trail_sha256(1)
    match change:
        case "no receipt":
            (replay.run_dir / "receipt.json").unlink()
        case "not JSON":
            (replay.run_dir / "receipt.json").write_bytes(b"\xff" * 100_000)
        case "linked above":
            replay.run_dir.parent.rename(tmp_path / "away")
            replay.run_dir.parent.symlink_to(elsewhere.parent)
        case "linked":
            replay.run_dir.rename(tmp_path / "away")
            replay.run_dir.symlink_to(elsewhere)
        case "a pipe":
            (replay.run_dir / "trail.jsonl").unlink()
            os.mkfifo(replay.run_dir / "trail.jsonl")
        case "a broken line":
            (replay.run_dir / "trail.jsonl").write_text("[]\n")
    with pytest.raises(LabtrainError, match=r"the rerun left no valid (receipt|trail): ") as caught:
        replay.final_receipt(), replay.trail_sha256(1)
    assert len(str(caught.value)) < 500
    assert caught.value.exit_code == 2
    assert str(replay.scratch) not in str(caught.value)
    assert "/proc/" not in str(caught.value)


def test_errors_do_not_name_a_folder_that_is_gone() -> None:
    with pytest.raises(DamagedError) as caught, scratch_folder("labtrain-x-", of="run.zip") as folder:
        raise DamagedError(f"{folder}/code/receipt.json is broken", hint=f"mv {folder}/code {folder}/code.broken")
    assert str(caught.value) == "run.zip: code/receipt.json is broken\n\nhint: ask whoever made run.zip for it again"


@pytest.mark.parametrize("data", [b"\xff" * 1_000_000, b'{"schema": ' + b"x" * 1_000_000, b"{}", b"[]"])
def test_errors_about_a_receipt_are_short_and_plain(data: bytes, tmp_path: Path) -> None:
    for name in ("receipt.json", "other.json"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DamagedError) as caught, alone(tmp_path / name) as (place, _):
            open_run(place)
        assert len(str(caught.value)) < 600
        assert "Error(" not in str(caught.value)


def test_a_zip_is_seen_by_its_end_too(tmp_path: Path) -> None:
    """Its first byte was changed, or there is text before it: it is refused as a changed bundle, not as a receipt."""
    data = packed({"train.py": b"x"}, sealed=True)
    for changed in (b"x" + data[1:], b"text before" + data):
        assert is_zip(changed, tmp_path)
        assert "changed" in refused(changed, tmp_path)


def test_a_verdict_is_not_written_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "x.verified.jsonl").symlink_to(tmp_path / "mine")
    assert not append_verdict(tmp_path / "x.verified.jsonl", b"line\n")
    assert "a link to" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"
    assert append_verdict(tmp_path / "y.verified.jsonl", b"line\n")


def test_a_name_with_a_line_end_stays_in_its_line(tmp_path: Path) -> None:
    for name in ("a", "b\nhint: rm -rf x"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "receipt.json").write_text("{}")
    git(tmp_path / "work", "init", "-q", "-b", "main")
    git(tmp_path / "work", "add", "-A")
    git(tmp_path / "work", "commit", "-qm", "all")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(ConfigError, match=r"\n +b\\nhint: rm -rf x/receipt\.json") as caught:
        fetch(Target(url=str(tmp_path / "work"), revision=""), tmp_path / "scratch", named=None)
    assert str(caught.value).count("\nhint: ") == 1
