"""The files of a checkpoint: the same bytes as the libraries', in little memory, and an error for every failed write."""

import hashlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from labtrain.checkpoints.format import load_folder, write_files
from labtrain.checkpoints.staging import Staging
from labtrain.record.digests import PIECE_BYTES, WEIGHT_DTYPE_NAMES, dense_entries, digest, tensor_bytes, tensor_pieces
from labtrain.stores.store import STATE, WEIGHTS


def mixed() -> dict[str, Any]:
    """Return a state with every dtype, and with each kind of tensor that is not simply one block of memory."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(*shape).uniform_(-100, 100, generator=generator)

    shared, sparse = numbers(50, 70), numbers(20, 30).clamp(min=0)
    weights = {name: numbers(17).gt(0).to(getattr(torch, name)) for name in WEIGHT_DTYPE_NAMES}
    weights |= {"a": shared, "tied": shared, "strided": shared.T, "zero_d": torch.tensor(3.0), "empty": torch.zeros(0, 5),
                "large": numbers(3000, 1000), "large_strided": numbers(3000, 1000).T, "expanded": numbers(1, 5).expand(4, 5),
                "sliced": numbers(100)[::3], "channels_last": numbers(8, 3, 64, 64).to(memory_format=torch.channels_last),
                "coo": sparse.to_sparse(), "csc": sparse.to_sparse_csc(), 'é"\\\n\x01\u2028😀': numbers(3)}  # fmt: skip
    moments = {
        0: {"m": numbers(1_500_000), "v": numbers(300, 4).T},
        1: {"m": sparse.to_sparse(), "n": numbers(5).bfloat16()},
    }
    return {"state_dict": weights, "optimizer_states": [{"state": moments}], "text": "x" * 3_000_000}


@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support is in beta")
def test_the_files_have_the_bytes_that_the_libraries_write(tmp_path: Path) -> None:
    """So any program reads them, and a state's sha256 does not depend on labtrain's version."""
    state = Staging().copy(mixed())
    written = write_files(tmp_path / "x", state)
    weights = {name: tensor.contiguous() for name, tensor in dense_entries(state["state_dict"]).items()}
    rest = io.BytesIO()
    torch.save({key: value for key, value in state.items() if key != "state_dict"}, rest)
    wanted = {WEIGHTS: safetensors.torch.save(weights), STATE: rest.getvalue()}
    for name, content in wanted.items():
        assert (tmp_path / "x" / name).read_bytes() == content
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        assert written["files"][name] == entry
    read = load_folder(tmp_path / "x")
    assert digest(read["state_dict"]) == digest(mixed()["state_dict"]) == written["weights_digest"]


@pytest.mark.parametrize("shape", [(11, 5, 7), (1001, 3000, 1), (2, 1_500_000, 1), (3_000_000, 1, 2)])
def test_a_strided_tensor_comes_in_pieces(shape: tuple[int, ...]) -> None:
    """In C order, however its memory lies."""
    strided = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape).permute(2, 1, 0)
    pieces = list(tensor_pieces(strided))
    assert len(pieces) == 1 or max(map(len, pieces)) <= PIECE_BYTES
    assert b"".join(pieces) == tensor_bytes(strided).tobytes()


MEMORY = """
import sys
from pathlib import Path
import torch
from labtrain.checkpoints.format import write_files

def peak_mb():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

torch.set_num_threads(1)
def write(name, size):
    plain, strided, moment = torch.ones(size, 1024), torch.ones(size, 1024).T, torch.ones(size, 1024)
    before = peak_mb()
    write_files(Path(sys.argv[1], name), {"state_dict": {"a": plain, "b": strided}, "optimizer_states": [moment]})
    return peak_mb() - before

write("small", 1)
print(write("large", 32768))
"""


def test_a_write_needs_little_memory(tmp_path: Path) -> None:
    """Three tensors of 134 MB, one of them strided: no copy of any."""
    ran = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], check=True, capture_output=True, text=True)
    assert float(ran.stdout) < 50


FAULTS = """
import errno, resource, shutil, signal, sys
from pathlib import Path
import torch
from labtrain.checkpoints.format import write_files
from labtrain.stores.store import MANIFEST, Store

folder = Path(sys.argv[1], "step-0000000001")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is a short one, and then EFBIG
state = {"state_dict": {"a": torch.ones(700_000), "b": torch.ones(3)}, "optimizer_states": [torch.ones(1000), torch.ones(900_000)]}
for limit in [0, 8, 60, 700, 5000, 1 << 20, 2_800_000, 3_000_000, 3_600_000]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_files(folder, state)
    except OSError as error:
        assert error.errno == errno.EFBIG, error
    else:
        raise AssertionError(f"no error at {limit} bytes")
    assert not Store(sys.argv[1]).checkpoints()
    shutil.rmtree(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write_files(folder, state)
"""


def test_a_write_that_fails_anywhere_is_said_by_its_reason(tmp_path: Path) -> None:
    """By the system's error, not by torch's own `enforce fail`; and nothing there reads as complete."""
    ran = subprocess.run([sys.executable, "-c", FAULTS, tmp_path], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
