"""A folder of a run in which one thing is wrong, and every command that reads it, in one process.

All of it is drawn from a seed: the same number is the same damage. What is damaged is each file of a run as somebody
else may have written it, by bits, by bytes, by values, and by kind: a pipe, a link, a folder in its place.
"""

import copy
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

import labtrain
from labtrain.base import exact_json
from labtrain.base.console import visible
from labtrain.base.errors import LabtrainError
from labtrain.checkpoints.format import check_loads, load_folder, write_files
from labtrain.checkpoints.staging import Staging
from labtrain.cli import main
from labtrain.record import receipt
from labtrain.record.differences import open_run
from labtrain.record.own_runs import checkpoints_of
from labtrain.record.resume import find_origin
from labtrain.record.sources import source_digests
from labtrain.record.trail import HISTORY, TRAIL, cut_trail, read_trail
from labtrain.review.report.data import read_runs
from labtrain.review.signature import check_signature
from labtrain.review.verdicts import VERIFIED, read_verifications
from labtrain.stores.layout import newest_whole, stores_of
from labtrain.stores.prune import leftovers, superseded
from labtrain.stores.store import MANIFEST, SCHEMA, STATE, WEIGHTS, Store
from labtrain.training.callbacks.checkpoint import FolderIO
from labtrain.training.callbacks.history import best_of
from tests.conftest import ROOT
from tests.support.saver import resumable

SECONDS = 60  # in which one command has to end, on a busy machine
STEPS = (20, 40)  # of its checkpoints
TEXTS = [
    "",
    "..",
    "../../victim",
    "/victim",
    "\x1b[2K\ryes          the same bits to the end",
    "a\nyes          the same bits to the end",
    "\u202egpj.exe\u2066",
    "x\x00y",
    "\x7f\x9b31m",
    "caf\u00e9 \u6f22 \U0001f469\u200d\U0001f680",
    "\udcff",
    "\ud800",
    "-rf",
    "; touch canary",
    "$(touch canary)",
    "memory://victim",
    "sftp://127.0.0.1:9/victim",
    "s3://victim",
    "nosuch://host/x",
    "x" * 5000,
    "__metadata__",
    "nan",
    "1e400",
    "2026-11-29T04:59:36",
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-23:59",
    "step-0000000020",
    "0" * 64,
]
NUMBERS = [0, 1, -1, 2, 255, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(10**19), 1e308, -0.0, 0.5, 1e-320]
VALUES = [None, True, False, [], {}, [[]], [None], {"a": 1}, {"(float)": "nan"}, {"(float)": []}, {"(items)": [[1, 2]]},
          {"(items)": 7}, {"(items)": [[[], 1]]}, {"_target_": "os.mkdir", "path": "canary"}]  # fmt: skip


@dataclass
class World:
    """A place with a run in it, and things around it that nobody may touch.

    Attributes:
        root: a new folder.
        base: the run, whole; copied for each damage.
    """

    root: Path
    canary: Path = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self.base, self.lab = self.root / "base", self.root / "lab"
        self.canary, self.victim, self.out = self.root / "canary", self.root / "victim", self.root / "out"
        for folder in (self.root / "home" / ".ssh", self.victim, self.lab, self.out):
            folder.mkdir(parents=True)
        (self.victim / "receipt.json").write_text("{}")
        (self.victim / "secret").write_text("PRIVATE-KEY")
        for name in ("train.py", "model.py"):
            (self.lab / name).write_text(f"open({str(self.canary)!r}, 'w')\n")
        self.key = self.root / "home" / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", self.key], check=True)
        self.signers = self.root / "home" / "signers"
        self.signers.write_text(f"ada@lab {self.key.with_suffix('.pub').read_text()}")
        self._make_base()
        self.other = self.root / "other"
        shutil.copytree(self.base, self.other)
        self.fresh()
        self.before = self.listing()

    @property
    def run_dir(self) -> Path:
        """Where the damaged copy lies: below the experiment's folder, as a run does."""
        return self.lab / "runs" / "lab" / "0123456789ab"

    def _make_base(self) -> None:
        self.base.mkdir()
        shutil.copy(ROOT / "tests" / "golden" / TRAIL, self.base)
        found = json.loads((ROOT / "tests" / "golden" / receipt.FILE).read_text())
        found["code"] |= {"sources": source_digests(self.lab), "commit": None, "patch": None}
        found["config"]["checkpoint"]["monitor"] = "val/acc"
        found["config"]["logger"] = {"wandb": {"project": "p", "settings": {"base_url": "http://127.0.0.1:9"}}}
        found["config"]["data"]["root"] = "${oc.env:HOME}/data"
        manifests = [self._checkpoint(step, found["run_id"]) for step in STEPS]
        names = [f"step-{step:010d}" for step in STEPS]
        found["checkpoints"] = [
            {"path": f"checkpoints/{name}", "step": step, "weights_digest": each["weights_digest"], "score": None}
            for name, step, each in zip(names, STEPS, manifests, strict=True)
        ]
        found["results"]["weights_digest"] = manifests[-1]["weights_digest"]
        receipt.write(self.base, found)
        line = {"time": 1.8e9, "step": 5, "samples_per_s": 9.5, "flops_per_s": 10**9, "peak_flops_per_s": 10**12,
                "memory_bytes": 10**8, "gpu_memory_bytes": None, "lr": [0.1], "metrics": {"val/acc": 0.5}}  # fmt: skip
        (self.base / HISTORY).write_text("".join(json.dumps({**line, "step": step}) + "\n" for step in range(1, 6)))
        said = {"when": "2026-11-29T05:00:00+00:00", "by": "ada", "host": "vm", "cpu": "x", "gpus": [], "labtrain": "1",
                "receipt": found["digest"], "from_step": 0, "to_step": 300, "whole": True, "same": True,
                "found": "the same bits to the end"}  # fmt: skip
        (self.base / VERIFIED).write_text(json.dumps(said) + "\n" + json.dumps({**said, "same": False}) + "\n")
        (self.base / "config.yaml").write_text("a: 1\n")
        (self.base / "code.patch").write_text("")
        subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", self.key, "-n", "labtrain-receipt",
                        self.base / receipt.FILE], check=True, capture_output=True)  # fmt: skip
        weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int64)}
        torch.save({"state_dict": weights, "global_step": 7, "epoch": 1, "optimizer_states": [{"lr": [0.1, weights["a"]]}]},
                   self.base / "in.ckpt")  # fmt: skip

    def _checkpoint(self, step: int, run_id: str) -> dict[str, Any]:
        store, name = Store(self.base / "checkpoints"), f"step-{step:010d}"
        rows = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (4,))
        weights = {"a": torch.full((2, 3), float(step)), "b": torch.tensor([step]), "rows": rows}
        state = resumable(step, state_dict=weights)
        written = write_files(self.base / "checkpoints" / name, Staging().copy(state))
        manifest = {"schema": SCHEMA, "run_id": run_id, "step": step, "epoch": 1, "batch": 0, "finished": False,
                    "metrics": {"val/acc": 0.5}, "logs": {}, "scores": {}, **written}  # fmt: skip
        store.commit(name, manifest)
        return manifest

    def listing(self) -> dict[str, tuple[int, ...]]:
        """Return what lies around the run: mode, size, time of change and content's place of everything else."""
        found = {}
        for folder, below, files in os.walk(self.root):
            if Path(folder) in (self.lab / "runs", self.out):
                below.clear()
                files = []
            for name in [*below, *files]:
                entry = os.lstat(f"{folder}/{name}")
                if not stat.S_ISDIR(entry.st_mode):
                    found[f"{folder}/{name}"] = (entry.st_mode, entry.st_size, entry.st_mtime_ns, entry.st_ino)
                else:
                    found[f"{folder}/{name}"] = (entry.st_mode,)
        return found

    def fresh(self) -> Path:
        """Return the folder of a whole run, a new copy."""
        for folder in (self.lab / "runs", self.out):
            shutil.rmtree(folder, ignore_errors=True)
        self.out.mkdir()
        shutil.copytree(self.base, self.run_dir, copy_function=shutil.copy)
        return self.run_dir


# ------------------------------------------------------------------------------------------------------------- damage


class Mutator:
    """Draws one damage to a run's folder.

    Args:
        seed: of the draws.
        world: where the run lies.

    Attributes:
        file: the name of what is damaged.
        told: how, in words.
    """

    def __init__(self, seed: int, world: World) -> None:
        self.draw, self.world, self.told, self.file = random.Random(seed), world, "", ""

    def damage(self, run_dir: Path) -> None:
        """Damage one file of a run; `told` says how."""
        checkpoint = run_dir / "checkpoints" / f"step-{self.draw.choice(STEPS):010d}"
        files: list[tuple[Path, list[Callable[[Path], None]]]] = [
            (run_dir / receipt.FILE, [self._json, self._signed, self._signed, self._signed]),
            (run_dir / TRAIL, [self._line, self._honest_trail]),
            (run_dir / HISTORY, [self._line]),
            (run_dir / VERIFIED, [self._line]),
            (run_dir / f"{receipt.FILE}.sig", []),
            (run_dir / "in.ckpt", [self._pickled, self._pickled, self._archive]),
            (checkpoint / MANIFEST, [self._json, self._signed, self._signed]),
            (checkpoint / WEIGHTS, [self._header, self._header]),
            (checkpoint / STATE, [self._pickled, self._pickled, self._archive]),
            (checkpoint, []),
            (run_dir / ".lock", []),
            (run_dir / "code.patch", []),
            (run_dir / "checkpoints" / ".writer.json", [self._new]),
        ]
        path, ways = self.draw.choice(files)
        way = self.draw.choice([*ways, self._bytes, self._kind, *ways])
        if not path.exists():
            path.touch()
        if path.is_dir() and way == self._bytes:
            way = self._kind
        way(path)
        self.file = path.name
        self.told = f"{path.relative_to(run_dir)}: {way.__name__[1:]} {self.told}"
        if path.parent == checkpoint and path.name != MANIFEST and self.draw.random() < 0.7:
            self._forge_manifest(checkpoint, path)

    def _forge_manifest(self, checkpoint: Path, path: Path) -> None:
        """Have the manifest say what the file is now."""
        if not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 30:
            return
        manifest, data = json.loads((checkpoint / MANIFEST).read_text()), path.read_bytes()
        manifest["files"][path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "digest": exact_json.digest_of(manifest)}))
        self.told += ", and the manifest says so"

    # by bytes

    def _bytes(self, path: Path) -> None:
        path.write_bytes(self.changed_bytes(path.read_bytes()))

    def changed_bytes(self, data: bytes) -> bytes:
        """Return other bytes: flipped, cut, repeated, overwritten, or none."""
        raw = bytearray(data)
        if not raw:
            return self.draw.randbytes(20)
        at = self.draw.randrange(len(raw))
        match self.draw.randrange(8):
            case 0 | 1:
                for _ in range(self.draw.choice((1, 1, 3, 30))):
                    raw[self.draw.randrange(len(raw))] ^= 1 << self.draw.randrange(8)
            case 2:
                del raw[at:]
            case 3:
                del raw[at : at + self.draw.randrange(1, 40)]
            case 4:
                raw[at:at] = raw[at : at + self.draw.randrange(1, 200)]
            case 5:
                raw[at : at + 8] = self.draw.choice((b"\xff" * 8, b"\x00" * 8, b"\xed\xa0\x80\xff\xfe\x00{}"))
            case 6:
                raw[:] = b"[" * 100_000 if self.draw.random() < 0.5 else b'{"a":' * 100_000
            case _:
                raw[:] = self.draw.choice(
                    (b"", b"null", b"[]", b"{}", b"\x80\x04", b"PK\x03\x04", b"\xff\xfe{\x00}\x00")
                )
        return bytes(raw)

    # by kind

    def _kind(self, path: Path) -> None:
        """Replace a file, or a folder, by something else of its name."""
        kind = self.draw.choice(("gone", "folder", "pipe", "link", "link out", "loop", "socket", "sparse", "dangling"))
        self.told = kind
        if kind in ("link", "link out") and path.exists():
            away = path.with_name("moved") if kind == "link" else self.world.victim / "secret"
            if kind == "link":
                path.rename(away)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        match kind:
            case "folder":
                path.mkdir()
                (path / "x").write_text("x")
            case "pipe":
                os.mkfifo(path)
            case "link":
                path.symlink_to(path.with_name("moved"))
            case "link out":
                path.symlink_to(self.world.victim / "secret")
            case "loop":
                path.symlink_to(path)
            case "dangling":
                path.symlink_to(self.world.victim / "made")
            case "socket":
                here = Path.cwd()
                os.chdir(path.parent)
                with suppress(OSError), socket.socket(socket.AF_UNIX) as made:
                    made.bind(path.name)
                os.chdir(here)
            case "sparse":
                with path.open("wb") as file:
                    file.truncate(1 << 42)

    def _new(self, path: Path) -> None:
        value = {"token": "t", "host": os.uname().nodename, "process": 1}
        path.write_text(json.dumps(self.changed(value)))

    # by values

    def _json(self, path: Path) -> None:
        path.write_text(self._dumped(self.changed(json.loads(path.read_text()))))

    def _signed(self, path: Path) -> None:
        """As a forger does it, who writes the digest anew."""
        found = self.changed(json.loads(path.read_text()))
        if isinstance(found, dict):
            with suppress(Exception):
                found["digest"] = exact_json.digest_of(exact_json.loads(json.dumps(found)))
        path.write_text(self._dumped(found))

    def _line(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        at = self.draw.randrange(len(lines))
        lines[at] = self._dumped(self.changed(json.loads(lines[at]))).replace("\n", "")
        path.write_text("\n".join(lines) + "\n")

    def _honest_trail(self, path: Path) -> None:
        """A changed line, and a receipt that says its sha256."""
        self._line(path)
        found = json.loads((path.parent / receipt.FILE).read_text())
        found["trail"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        found["digest"] = exact_json.digest_of(found)
        (path.parent / receipt.FILE).write_text(json.dumps(found))

    def _dumped(self, value: Any) -> str:
        text = json.dumps(value)
        match self.draw.randrange(30):
            case 0:
                return text[:1] + '"step": 1, "step": 2, ' + text[1:]
            case 1:
                return text.replace("1", "NaN", 1)
            case 2:
                return text.replace(": ", ": " + "[" * 50_000, 1)
            case _:
                return text

    def changed(self, tree: Any) -> Any:
        """Return a tree with one or two places that are other ones."""
        tree = copy.deepcopy(tree)
        for _ in range(self.draw.choice((1, 1, 2))):
            places = list(_places(tree))
            if not places:
                return self.value(tree)
            owner, key = self.draw.choice(places)
            match self.draw.randrange(10):
                case 0 if isinstance(owner, dict):
                    del owner[key]
                case 1 if isinstance(owner, dict):
                    owner[self.draw.choice(TEXTS)] = owner.pop(key)
                case 2 if isinstance(owner, list):
                    owner *= 3
                case 3:
                    deep: Any = owner[key]
                    for _ in range(self.draw.choice((5, 150, 400))):
                        deep = [deep]
                    owner[key] = deep
                case _:
                    owner[key] = self.value(owner[key])
                    self.told = f"{key!r} is {owner[key]!r}"[:200]
        return tree

    def value(self, before: Any) -> Any:
        """Return another value than one that stood there, of its kind more often than not."""
        kind = type(before)
        draw = self.draw.random()
        if draw < 0.35 and kind in (int, float):
            return self.draw.choice(NUMBERS)
        if draw < 0.45 and kind is int:
            return before ^ (1 << self.draw.randrange(8))
        if draw < 0.55 and kind is str:
            text = self.draw.choice(TEXTS)
            if text in ("/victim", "memory://victim"):
                text = text.replace("/victim", str(self.world.victim))
            return text if self.draw.random() < 0.8 else before + text
        if draw < 0.65 and kind is str and before:
            at = self.draw.randrange(len(before))
            return before[:at] + chr(self.draw.randrange(0x250)) + before[at + 1 :]
        return self.draw.choice([*VALUES, *NUMBERS, *TEXTS])

    # a header of safetensors

    def _header(self, path: Path) -> None:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
        if self.draw.random() < 0.2:
            said = self.draw.choice((1 << 42, 2**64 - 1, 0, len(data), len(data) - 8, size - 1))
            path.write_bytes(struct.pack("<Q", said) + data[8:])
            return
        text = self._dumped(self.changed(header)).encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(text)) + text + rest)

    # a pickle

    def _pickled(self, path: Path) -> None:
        """Write another state as torch.save does, or a pickle that would run code."""
        loaded = torch.load(path, weights_only=True)
        match self.draw.randrange(9):
            case 0:
                path.write_bytes(self._evil(archived=True))
            case 1:
                path.write_bytes(self._evil(archived=False))
            case 2:
                laughs: Any = ["ha"] * 10
                for _ in range(self.draw.choice((9, 40))):
                    laughs = [laughs] * 10
                torch.save({**loaded, "optimizer_states": laughs}, path)
            case 3:
                loop: list[Any] = []
                loop.append(loop)
                torch.save({**loaded, "optimizer_states": loop}, path)
            case 4:
                strange = self.draw.choice(
                    (torch.ones(1).expand(10**9), torch.ones(3, device="meta"), torch.ones(2, dtype=torch.complex128),
                     torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.nn.Parameter(torch.ones(2)),
                     torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**12,)), torch.Size([2]), 7, "x"),
                )  # fmt: skip
                tree = {**loaded, "more": strange}
                if "state_dict" in tree:
                    tree["state_dict"] = {**tree["state_dict"], self.draw.choice(["a", 7, *TEXTS]): strange}
                with suppress(Exception):
                    torch.save(tree, path)
            case 5:
                torch.save(self.value(""), path)
            case 6:
                torch.save(loaded, path, _use_new_zipfile_serialization=False)
            case _:
                with suppress(Exception):
                    torch.save(self.changed(loaded), path)

    def _evil(self, *, archived: bool) -> bytes:
        code = pickle.dumps({"state_dict": _Evil(self.world.canary)})
        if not archived:
            return code
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", code)
            archive.writestr("x/version", "3\n")
            archive.writestr("x/byteorder", "little")
        return file.getvalue()

    def _archive(self, path: Path) -> None:
        """Write the same files in another archive: compressed, renamed, doubled, with other bytes in one."""
        with zipfile.ZipFile(path) as archive:
            entries = [(each.filename, archive.read(each)) for each in archive.infolist()]
        at = self.draw.randrange(len(entries))
        compression = zipfile.ZIP_STORED
        match self.draw.randrange(5):
            case 0:
                compression = zipfile.ZIP_DEFLATED
            case 1:
                entries[at] = (self.draw.choice(["../../victim/made", "/x", "x/../data.pkl", "x"]), entries[at][1])
            case 2:
                del entries[at]
            case 3:
                entries.append((f"{entries[0][0].partition('/')[0]}/data/99", bytes(10_000_000)))
                compression = zipfile.ZIP_DEFLATED
            case _:
                entries[at] = (entries[at][0], self.changed_bytes(entries[at][1]))
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in entries:
                archive.writestr(name, data)


class _Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict | list):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            yield node, key
            yield from _places(value)


# ------------------------------------------------------------------------------------------------------------ commands


def commands(world: World) -> dict[str, Callable[[], Any]]:
    """Return everything that reads a run, by name: commands as they are typed, and functions for people's code."""
    run, out, store = world.run_dir, world.out, f"{world.run_dir}/checkpoints"

    def cli(*arguments: object) -> Callable[[], Any]:
        return lambda: typed(*map(str, arguments))

    return {
        "ls": cli("ls", world.lab / "runs"),
        "ls --json": cli("ls", world.lab / "runs", "--json", "--sort", "-metric"),
        "diff": cli("diff", world.other, run),
        "diff --json": cli("diff", run, world.other, "--json"),
        "report": cli("report", world.other, run, "-o", out / "report.html"),
        "crate": cli("crate", run, "-o", out / "run.zip", "--weights"),
        "verify --steps 0": cli("verify", run / receipt.FILE, "--steps", 0, "--signers", world.signers),
        "verify --json": cli("verify", run, "--steps", 0, "--json"),
        "gate": cli("gate", run, "--seeds", 2),
        "sign": cli("sign", run, "--key", world.key),
        "digest": cli("digest", run),
        "digest --all": cli("digest", run, "--all"),
        "digest checkpoint": cli("digest", f"{store}/step-{STEPS[-1]:010d}"),
        "digest file": cli("digest", f"{store}/step-{STEPS[-1]:010d}/{WEIGHTS}"),
        "store ls": cli("store", "ls", store),
        "store ls --json": cli("store", "ls", store, "--json"),
        "store check": cli("store", "check", store),
        "store prune": cli("store", "prune", store, "--keep-last", 1),
        "store export": cli("store", "export", run, out / "out.ckpt"),
        "store import": cli("store", "import", run / "in.ckpt", out / "imported"),
        "load_weights": lambda: labtrain.load_weights(run),
        "load_weights file": lambda: labtrain.load_weights(f"{store}/step-{STEPS[0]:010d}/{WEIGHTS}"),
        "resume": lambda: resumed(run),
        "resume=RUN": lambda: find_origin(str(run), world.lab / "runs" / "lab"),
        "read_runs": lambda: read_runs([world.other, run]),
        "read_verifications": lambda: read_verifications(run),
        "check_signature": lambda: check_signature(run, signers=world.signers),
        "history": lambda: best_of(run, monitor="val/acc", mode="max"),
        "trail": lambda: (read_trail(run), cut_trail(run / TRAIL, last_step=250)),
        "writer": lambda: (list(leftovers(Store(store), older_than_s=1)), superseded(Store(store), keep_last=1)),
    }


CHANGES = {"sign", "store prune", "trail", "writer"}  # commands that may change the run
SLOW = {"report", "verify --steps 0", "verify --json"}
OF_CHECKPOINTS = {"digest", "digest --all", "digest checkpoint", "digest file", "store ls", "store ls --json",
                  "store check", "store prune", "store export", "load_weights", "load_weights file", "resume",
                  "resume=RUN", "writer", "diff", "crate", "verify --steps 0"}  # fmt: skip
READERS = {  # of each file that is not read by all
    TRAIL: {
        "diff",
        "diff --json",
        "report",
        "read_runs",
        "trail",
        "crate",
        "verify --steps 0",
        "verify --json",
        "gate",
    },
    HISTORY: {"ls", "ls --json", "report", "read_runs", "history", "crate"},
    VERIFIED: {"report", "read_runs", "read_verifications", "crate"},
    f"{receipt.FILE}.sig": {"sign", "check_signature", "verify --steps 0", "crate"},
    "in.ckpt": {"store import"},
    ".lock": {"ls", "ls --json", "crate"},
    "code.patch": {"crate", "verify --steps 0"},
    ".writer.json": {"store ls", "store prune", "store check", "writer", "resume"},
    **dict.fromkeys((MANIFEST, WEIGHTS, STATE, *(f"step-{step:010d}" for step in STEPS)), OF_CHECKPOINTS),
}


def typed(*arguments: str) -> str:
    """Run a command as it is typed; return its standard output.

    Raises:
        AssertionError: it ends in a traceback, with another exit code than an answer's, or prints a control character.
    """
    done = CliRunner().invoke(main, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception.with_traceback(done.exception.__traceback__)
    assert done.exit_code in (0, 1, 2), done.output
    assert visible(done.output) == done.output, ascii(done.output)
    assert "Traceback" not in done.output, done.output
    if arguments[0] == "verify":
        assert not done.stdout.startswith("yes"), done.output
        assert "\nyes" not in done.output, done.output
    return done.stdout


def resumed(run_dir: Path) -> Any:
    """Choose the checkpoint that a training goes on from, as training.find_checkpoint does, and load it."""
    _, found = open_run(run_dir)
    place = checkpoints_of(run_dir, found)
    newest = newest_whole(stores_of(run_dir, place), into=run_dir.parent, to_resume=True, look=check_loads)
    if newest is not None:
        load_folder(newest[1])
        FolderIO().load_checkpoint(newest[1])
    return newest


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no end in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(world: World, seed: int, *, quick: int, slow: float) -> list[str]:
    """Damage a run and let what reads it do so; return what went wrong, a text each.

    Args:
        world: where it lies.
        seed: of the damage.
        quick: how many commands are tried at most, drawn from those that read what is damaged.
        slow: the part of the damages of which a page is made, or a verification begun, as well.
    """
    run_dir, mutator = world.fresh(), Mutator(seed, world)
    mutator.damage(run_dir)
    tried = commands(world)
    readers = sorted(READERS.get(mutator.file, tried.keys()))
    names = [name for name in readers if name not in SLOW]
    names = mutator.draw.sample(names, min(quick, len(names)))
    names += [name for name in readers if name in SLOW and mutator.draw.random() < slow]
    wrong = []
    for name in sorted(names, key=lambda name: name in CHANGES):
        try:
            with in_time(SECONDS):
                tried[name]()
        except LabtrainError:
            pass
        except BaseException as error:
            last = traceback.format_exception(error)[-6:]
            wrong.append(f"seed {seed}, {mutator.told}\n{name}: {''.join(last)}")
        if world.canary.exists():
            wrong.append(f"seed {seed}, {mutator.told}\n{name}: code was run")
            world.canary.rmdir() if world.canary.is_dir() else world.canary.unlink()
        if (now := world.listing()) != world.before:
            changed = sorted(key for key in {*now, *world.before} if now.get(key) != world.before.get(key))
            wrong.append(f"seed {seed}, {mutator.told}\n{name}: changed {changed[:5]}")
            world.before = now
        if "PRIVATE-KEY" in enclosed(world):
            wrong.append(f"seed {seed}, {mutator.told}\n{name}: a file from outside of the run is in what it wrote")
            shutil.rmtree(world.out)
            world.out.mkdir()
    return wrong


def enclosed(world: World) -> str:
    """Return the texts of what commands wrote."""
    file = world.out / "run.zip"
    if not file.exists():
        return ""
    with zipfile.ZipFile(file) as archive:
        return "".join(archive.read(name).decode(errors="replace") for name in archive.namelist())
