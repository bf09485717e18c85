"""Files that somebody else may have written: each that is wrong is one error, in a line, and nothing hangs or grows."""

import json
import os
import pickle
import re
import signal
import struct
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from labtrain.base import untrusted
from labtrain.base.errors import DamagedError
from labtrain.base.files import file_sha256
from labtrain.checkpoints import structure
from labtrain.checkpoints.format import PARTS, check_loads, load_folder, load_plain, write_files
from labtrain.checkpoints.locate import load_weights
from labtrain.checkpoints.staging import Staging
from labtrain.cli import main
from labtrain.record.digests import PLACE, read_safetensors
from labtrain.record.trail import HISTORY, TRAIL, read_history_lines, read_trail
from labtrain.stores.layout import newest_whole
from labtrain.stores.store import SCHEMA, Store
from labtrain.training.callbacks.history import best_of
from tests.support.saver import resumable


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "large", "device"])
def test_only_plain_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            (tmp_path / "y").write_text("y")
            path.symlink_to(tmp_path / "y")
        case "large":
            with path.open("wb") as file:
                file.truncate(1 << 42)
        case "device":
            path = Path("/dev/zero")
    with pytest.raises(untrusted.NotPlainError):
        untrusted.read(path, 1000)


def test_a_read_takes_the_memory_that_the_file_needs(tmp_path: Path) -> None:
    """Not what it may have at most: a trail of 10 kB is read where 8 GB are not to be had."""
    (tmp_path / "x").write_bytes(b"x" * 10_000)
    tracemalloc.start()
    try:
        assert untrusted.read(tmp_path / "x", 1 << 25) == b"x" * 10_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, '{"a": 1, "a": 2}', "NaN", "[1e1, -Infinity]", "1" * 5000,
     str(2**64), r'"\ud800"', r'{"\udfff": 1}', '{"(items)": 7}', '{"(items)": [[[], 1]]}', '{"(float)": {}}',
     b"\xff\xfe{\x00}\x00", b"\x80", "", "{}{}"],
)  # fmt: skip
def test_json_that_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        untrusted.loads(text)


def test_json_that_is_one_is_read() -> None:
    """A path that is no UTF-8 too, and numbers that JSON lacks."""
    value = untrusted.loads(r'{"a": ["\udcff", "\ud83d\ude80", {"(float)": "inf"}, {"(items)": [[1, 2]]}, 1.5, null]}')
    assert value == {"a": ["\udcff", "\U0001f680", float("inf"), {1: 2}, 1.5, None]}


def as_nobody(action: Callable[[], None]) -> None:
    """Run an action in a process of its own, without root's rights: permissions count."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def hostile(folder: Path, victim: Path) -> None:
    """Leave links to a file and a folder beside what cannot be removed before its permissions are changed."""
    closed = folder / "a" / "closed"
    closed.mkdir(parents=True)
    for name in ("file", "link", "folder"):
        (closed / name).symlink_to(victim / "key") if name == "link" else (closed / name).mkdir()
    (closed / "file" / "x").touch()
    os.mkfifo(closed / "pipe")
    (closed / "folder" / "up").symlink_to(victim, target_is_directory=True)
    for name in ("file", "folder", "."):
        (closed / name).chmod(0)
    (folder / "a").chmod(0o500)
    (folder / "b").mkdir()
    (folder / "b" / "key").symlink_to(victim / "key")
    (folder / "b" / "all").symlink_to(victim, target_is_directory=True)
    (folder / "b").chmod(0o500)  # what is in it can be seen, and not removed


@pytest.mark.parametrize("fails", [False, True])
def test_a_scratch_folder_is_removed_through_no_link(fails: bool) -> None:
    """Whatever permissions code has left: nothing outside of it gets others, and all of it is gone."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as around:  # which nobody can reach
        base = Path(around)
        base.chmod(0o777)

        def action() -> None:
            (base / "victim").mkdir(mode=0o750)
            (base / "victim" / "key").touch(0o400)
            tempfile.tempdir = around
            with suppress(ZeroDivisionError), untrusted.scratch_folder("own-") as folder:
                assert folder.stat().st_mode & 0o777 == 0o700
                hostile(folder, base / "victim")
                if fails:
                    1 / 0  # noqa: B018
            assert list(base.iterdir()) == [base / "victim"]
            assert (base / "victim").stat().st_mode & 0o777 == 0o750
            assert (base / "victim" / "key").stat().st_mode & 0o777 == 0o400

        as_nobody(action)


def test_a_deep_folder_is_removed(tmp_path: Path) -> None:
    """Deeper than Python calls itself, and than a path may be long."""
    top = descriptor = os.open(tmp_path, os.O_RDONLY)
    os.mkdir("deep", dir_fd=descriptor)
    for _ in range(3000):
        descriptor, before = os.open("deep", os.O_RDONLY, dir_fd=descriptor), descriptor
        os.mkdir("deep", dir_fd=descriptor)
        if before != top:
            os.close(before)
    os.close(descriptor)
    os.close(top)
    untrusted.remove_tree(tmp_path / "deep")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path.parent)
    with pytest.raises(NotADirectoryError):
        untrusted.remove_tree(tmp_path / "link")


LINES = ["[]", "7", "null", '{"step": "1"}', '{"step": -1}', '{"step": true}', '{"step": 1, "weights": 7}', '{"a": 1}',
         '{"step": 1, "weights": "zz"}', '{"step": 1, "loss": []}', '{"step": 1e400}', '{"step": 1, "epoch": {}}']  # fmt: skip


@pytest.mark.parametrize("line", [*LINES, "[" * 100_000, "\udcff"])
def test_a_line_that_is_none_of_a_trail(line: str, tmp_path: Path) -> None:
    (tmp_path / TRAIL).write_text(f'{{"step": 1}}\n{line}\n', errors="surrogateescape")
    with pytest.raises(DamagedError, match=r"trail\.jsonl is broken: .+"):
        read_trail(tmp_path)


@pytest.mark.parametrize("line", ["[]", "7", '{"step": "1", "metrics": {}}', '{"step": 1, "metrics": []}', '{"step": 1}',
                                  '{"step": 1, "metrics": {"a": "b"}}'])  # fmt: skip
def test_a_line_that_is_none_of_a_history(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What reads it says so; a training that ends goes on without, and says so."""
    (tmp_path / HISTORY).write_text(f"{line}\n")
    with pytest.raises(DamagedError, match=r"history\.jsonl is broken: line 1 "):
        list(read_history_lines(tmp_path))
    assert best_of(tmp_path, monitor="a", mode="max") is None
    assert "the best value is unknown" in capsys.readouterr().err


def header(value: Any, rest: bytes = b"", size: int | None = None) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + rest


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "data",
    [header({}, size=1 << 42), header({}, size=2**64 - 1), b"", b"1234567", header(b"[" * 100_000), header([]),
     header({"a": entry(offsets=(0, 16))}, bytes(8)), header({"a": entry(shape=(3,))}, bytes(8)),
     header({"a": entry(shape=(2**40, 2**40), offsets=(0, 8))}, bytes(8)), header({"a": entry(offsets=(8, 0))}, bytes(8)),
     header({"a": entry(offsets=(-8, 0))}, bytes(8)), header({"a": entry(), "b": entry()}, bytes(8)),
     header({"a": entry(dtype="F1")}, bytes(8)), header({"a": entry(dtype=[])}, bytes(8)), header({"a": 7}, bytes(8)),
     header({"a": entry(shape=7)}, bytes(8)), header({"a": entry(shape=[2.0])}, bytes(8)),
     header({"a": entry(), "__metadata__": 7}, bytes(8)), header({"a": entry(), "__metadata__": {"a": 7}}, bytes(8))],
)  # fmt: skip
def test_a_header_is_held_against_the_file(data: bytes, tmp_path: Path) -> None:
    """Before anything of what it says is read, or room made for it."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    for read in (lambda: list(read_safetensors(path)), lambda: load_weights(path)):
        with pytest.raises(DamagedError, match="is not a complete safetensors file"):
            read()
    done = CliRunner().invoke(main, ["digest", str(path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path} is not a complete safetensors file: ")


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def laughs() -> Any:
    found: Any = ["ha"] * 10
    for _ in range(40):
        found = [found] * 10
    return found


def loop() -> Any:
    found: list[Any] = []
    found.append(found)
    return found


def bomb(path: Path) -> None:
    """An archive of 20 KB that says it is 20 MB."""
    torch.save({"a": torch.zeros(5_000_000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)


MADE: dict[str, Callable[[Path], Any]] = {
    "code": lambda path: path.write_bytes(pickle.dumps(Evil(path.with_name("canary")))),
    "code in an archive": lambda path: torch.save({"state_dict": Evil(path.with_name("canary"))}, path),
    "bomb": bomb,
    "laughs": lambda path: torch.save({"state_dict": {}, "x": laughs()}, path),
    "loop": lambda path: torch.save({"state_dict": {}, "x": loop()}, path),
    "expanded": lambda path: torch.save({"a": torch.ones(1).expand(10**9)}, path),
    "meta": lambda path: torch.save({"a": torch.ones(1, device="meta")}, path),
    "list": lambda path: torch.save([1], path),
    "text": lambda path: path.write_text("hello"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: (torch.save({"a": torch.ones(9)}, path), path.write_bytes(path.read_bytes()[:-40])),
    "no tensors": lambda path: torch.save({"state_dict": {"a": 7}}, path),
    "keys": lambda path: torch.save({"state_dict": {7: torch.ones(1)}}, path),
    "metadata": lambda path: torch.save({"state_dict": {"__metadata__": torch.ones(1)}}, path),
    "half a name": lambda path: torch.save({"state_dict": {"\udcff": torch.ones(1)}}, path),
    "complex": lambda path: torch.save({"a": torch.ones(1, dtype=torch.complex128)}, path),
    "state_dict": lambda path: torch.save({"state_dict": [1]}, path),
    "step": lambda path: torch.save({"state_dict": {"a": torch.ones(1)}, "global_step": "../../x"}, path),
    "steps": lambda path: torch.save({"state_dict": {"a": torch.ones(1)}, "global_step": 10**30}, path),
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_ckpt_that_is_none_is_not_imported(kind: str, tmp_path: Path) -> None:
    """Nothing of it is run, and nothing written."""
    path = tmp_path / "in.ckpt"
    MADE[kind](path)
    done = CliRunner().invoke(main, ["store", "import", str(path), str(tmp_path / "store")])
    assert isinstance(done.exception, SystemExit), done.exception
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") or kind == "folder"  # which click refuses
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.ckpt"]


@pytest.mark.parametrize(("kind", "says"), [
    ("code", "is broken: not a complete file of torch.save, or not only plain values"),
    ("code in an archive", "cannot be read without running code from it: it holds posix.mkdir"),
    ("text", "is broken: not a complete file of torch.save, or not only plain values"),
    ("empty", "is broken: not a complete file of torch.save, or not only plain values"),
    ("old, cut", "is broken: not a complete file of torch.save, or not only plain values"),
    ("no zip", "is broken: File is not a zip file"),
    ("another zip", "is broken: not a complete file of torch.save, or not only plain values"),
    ("old pickle", "is broken: not a complete file of torch.save, or not only plain values"),
])  # fmt: skip
def test_why_a_ckpt_is_not_imported_is_one_line_of_labtrains(
    kind: str, says: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Torch's own words advise to load it with weights_only=False."""
    path = tmp_path / "in.ckpt"
    match kind:
        case "old, cut":
            torch.save({"a": torch.ones(9)}, path, _use_new_zipfile_serialization=False)
            path.write_bytes(path.read_bytes()[:-60])
        case "no zip":
            path.write_bytes(b"PK\x03\x04 no zip")
        case "another zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a/b", "c")
        case "old pickle":
            path.write_bytes(pickle.dumps({"a": 1}, protocol=5))
        case _:
            MADE[kind](path)
    done = CliRunner().invoke(main, ["store", "import", str(path), str(tmp_path / "store")])
    assert done.exit_code == 2
    hint = "hint: in the program that made it: torch.save(model.state_dict(), FILE)"
    assert done.stderr == f"error: {path} {says}\n\n{hint}\n"
    assert [str(warning.message) for warning in recwarn] == []


def test_a_ckpt_by_a_link_is_the_persons_own(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "real.ckpt")
    (tmp_path / "in.ckpt").symlink_to("real.ckpt")
    done = CliRunner().invoke(main, ["store", "import", str(tmp_path / "in.ckpt"), str(tmp_path / "store")])
    assert done.exit_code == 0, done.stderr


def checkpoint(folder: Path, step: int, **more: Any) -> Path:
    """Write a checkpoint that a training could go on from."""
    store, name = Store(folder), f"step-{step:010d}"
    written = write_files(folder / name, Staging().copy(resumable(step, **more)))
    manifest = {"schema": SCHEMA, "run_id": "abc", "step": step, "epoch": 1, "batch": 0, "finished": False, **written}
    store.commit(name, manifest)
    return folder / name


def told(path: Path, **more: Any) -> None:
    """Have a manifest say what the files are now, and more."""
    manifest = json.loads((path / "manifest.json").read_text()) | more
    for name in ("state.pt", "weights.safetensors"):
        if (path / name).is_file():
            manifest["files"][name] = {"sha256": file_sha256(path / name), "size_bytes": (path / name).stat().st_size}
    manifest.pop("digest", None)
    (path / "manifest.json").unlink()
    Store(path.parent).commit(path.name, manifest)


STATES = [
    name for name in MADE if name not in ("no tensors", "keys", "metadata", "half a name", "complex", "state_dict")
]


@pytest.mark.parametrize("kind", [*STATES, "header", "another step", "no place"])
def test_a_resume_takes_the_older_checkpoint(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the newest is as its manifest says, and yet cannot be loaded; that is said."""
    older, newer = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    state = newer / "state.pt"
    if kind == "header":
        (newer / "weights.safetensors").write_bytes(header({}, size=1 << 42))
    elif kind == "another step":
        loaded = load_plain(state)
        torch.save({**loaded, PLACE: {**loaded[PLACE], "global_step": 3}}, state)
    elif kind == "no place":
        torch.save({"optimizer_states": []}, state)
    else:
        state.unlink()
        MADE[kind](state)
    told(newer)
    found = newest_whole([Store(tmp_path)], into=tmp_path, to_resume=True, look=check_loads)
    assert found is not None
    assert found[1] == older
    assert load_folder(older)[PLACE]["global_step"] == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("warning: ")
    assert "using an older checkpoint than" in said
    assert not (newer / "canary").exists()


def parts(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each part of a state, down to the values."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from parts(value, (*path, key))


def put(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a state with another value for one of its parts."""
    if not path:
        return value
    copied = state.copy()
    copied[path[0]] = put(copied[path[0]], path[1:], value) if path[1:] else value
    return copied


# Here a state may hold whatever its owner saves.
ANYTHING = re.compile(
    r"^callbacks\.|Stopping\.|\.loader$|\.metrics\.acc\.|attributes\.\.|data\.|groups\[0\]\.|state[.[]|probes\["
)


def name_of(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


RESUMABLE = {key: value for key, value in resumable(2).items() if key != "state_dict"}


@pytest.mark.parametrize("path", [each for each in parts(RESUMABLE) if not ANYTHING.search(name_of(each))], ids=name_of)
def test_each_part_of_a_state_that_is_of_another_kind_is_named(path: tuple[Any, ...]) -> None:
    structure.check(RESUMABLE)
    with pytest.raises(ValueError, match=f"^its {re.escape(name_of(path))} cannot be of type object"):
        structure.check(put(RESUMABLE, path, object()))


@pytest.mark.parametrize(
    ("path", "value"),
    [((), {PLACE: RESUMABLE[PLACE]}), (("callbacks",), []), (("optimizer_states",), None), (("optimizer_states",), [3]), (("lr_schedulers",), [7]),
     (("lr_schedulers",), [{"last_epoch": "a"}]), (("pytorch-lightning_version",), 3), (("epoch",), "x"), ((PLACE,), [7]),
     ((PLACE, "batches"), "q"), ((PLACE, "batches"), True), ((PLACE, "batches"), -1), ((PLACE, "scheduler_steps"), "a"),
     ((PLACE, "batches_that_stepped"), None), ((PLACE, "callback_metrics"), 3), ((PLACE, "exact"), 1), ((PLACE, "ranks"), []),
     ((PLACE, "callback_metrics"), {"val/acc": "x"}), ((PLACE, "initial"), [1]), ((PLACE, "initial"), {"optimizers": 3}),
     ((PLACE, "outside"), {"trainer": {"max_epochs": "x"}}), ((PLACE, "made"), {"optimizers": 5})],
    ids=repr,
)  # fmt: skip
def test_a_resume_passes_over_a_state_of_another_structure(
    path: tuple[Any, ...], value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    torch.save(put(load_plain(newer / "state.pt"), path, value), newer / "state.pt")
    told(newer)
    found = newest_whole([Store(tmp_path)], into=tmp_path, to_resume=True, look=check_loads)
    assert found is not None
    assert found[1] == older
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"warning: {newer}/state.pt is broken: ")
    assert "using an older checkpoint than" in said


def test_a_tensor_that_lies_in_the_parts_is_one(tmp_path: Path) -> None:
    """As any tensor of a training that is spread over ranks: the norm of its gradients, say."""
    path = checkpoint(tmp_path, 2)
    spread = put(load_plain(path / "state.pt"), (PLACE, "callback_metrics", "loss"), None)
    for parts_of, fits in (
        ([[PLACE, "callback_metrics", "loss"]], True),
        ([], False),
        ([["nothing", 1]], False),
        (7, False),
    ):
        torch.save({**spread, PARTS: parts_of}, path / "state.pt")
        told(path)
        with nullcontext() if fits else pytest.raises(DamagedError, match=r"state.pt is broken: "):
            check_loads(path, json.loads((path / "manifest.json").read_text()))


@pytest.mark.parametrize(
    "change",
    [{"step": "2"}, {"step": -1}, {"step": None}, {"step": True}, {"files": []}, {"files": {}}, {"metrics": {"a": "b"}},
     {"files": {"../weights.safetensors": {"sha256": "0" * 64, "size_bytes": 1}}}, {"run_id": "../x"}, {"scores": []},
     {"files": {"weights.safetensors": {"sha256": 7, "size_bytes": 1}}}, {"files": {"weights.safetensors": []}},
     {"files": {"weights.safetensors": {"sha256": "0" * 64, "size_bytes": -1}}}, {"finished": 1}, {"run_id": []},
     {"weights_digest": 7}, {"epoch": []}, {"logs": 7}, {"schema": {}}],
)  # fmt: skip
def test_a_manifest_is_held_against_what_is_read_of_it(change: dict[str, Any], tmp_path: Path) -> None:
    """One error in each command; `store ls` shows the others."""
    older, newer = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    (newer / "manifest.json").write_text(json.dumps(json.loads((newer / "manifest.json").read_text()) | change))
    for command in (["store", "check", str(tmp_path)], ["store", "ls", str(tmp_path)], ["digest", str(newer)]):
        done = CliRunner().invoke(main, command)
        assert isinstance(done.exception, SystemExit) or done.exception is None, done.exception
        assert "is not a labtrain/checkpoint/1 manifest" in done.output or "was changed" in done.output, done.output
    found = newest_whole([Store(tmp_path)], into=tmp_path)
    assert found is not None
    assert found[1] == older
