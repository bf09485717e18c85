import hashlib
import json
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.record.digests import digest, digest_file, digest_folder, digest_tree, read_safetensors


def test_the_digest_is_what_the_design_says() -> None:
    """sha256 over the sorted entries: key, NUL, dtype, NUL, shape joined by commas, NUL, raw little-endian bytes."""
    state = {"b": torch.tensor([[1, 2, 3]], dtype=torch.int64), "a": torch.tensor(0.5)}
    raw = b"a\0float32\0\0" + struct.pack("<f", 0.5) + b"b\0int64\0" + b"1,3\0" + struct.pack("<3q", 1, 2, 3)
    assert digest(state) == hashlib.sha256(raw).hexdigest()


def test_a_module_has_the_digest_of_its_state_dict() -> None:
    module = torch.nn.BatchNorm1d(3)
    assert digest(module) == digest(module.state_dict()) == digest(OrderedDict(reversed(module.state_dict().items())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_a_file_has_the_digest_of_what_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {
        "x": torch.arange(6).reshape(2, 3).to(dtype),
        "empty": torch.empty(0, 2, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    save_file(state, tmp_path / "w.safetensors")
    assert digest_file(tmp_path / "w.safetensors") == digest(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_parts_have_the_digest_of_the_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    """Cut along either dimension, one part empty; a hole between them is found."""
    rows, columns = torch.arange(20).reshape(5, 4).to(dtype), torch.arange(12).reshape(2, 6).to(dtype)
    scalar = torch.ones((), dtype=dtype)
    write_part(tmp_path, 1, rows=(rows[:3], (0, 0)), columns=(columns[:, 2:], (0, 2)), scalar=(scalar, ()))
    write_part(tmp_path, 2, rows=(rows[3:], (3, 0)), columns=(columns[:, :2], (0, 0)))
    write_part(tmp_path, 3, rows=(rows[5:], (5, 0)))
    assert digest_folder(tmp_path) == digest({"rows": rows, "columns": columns, "scalar": scalar})
    write_part(tmp_path, 2, rows=(rows[4:], (4, 0)), columns=(columns[:, :2], (0, 0)))
    with pytest.raises(DamagedError, match="rows is incomplete: 16 of 20 values"):
        digest_folder(tmp_path)


def write_part(folder: Path, rank: int, **tensors: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    """Write a file as torch.distributed.checkpoint does: each tensor's rows, and where they lie in the whole."""
    offsets = {f"state_dict/{name}": {"saved_offsets": list(where)} for name, (_, where) in tensors.items()}
    save_file(
        {f"state_dict/{name}": part.contiguous() for name, (part, _) in tensors.items()},
        folder / f"shard-{rank:05d}-model-00001-of-00001.safetensors",
        metadata={"DCP_SHARDING_INFO": json.dumps(offsets)},
    )


def test_strides_do_not_matter_and_one_bit_does() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert digest({"x": x.T.contiguous().T}) == digest({"x": x})
    flipped = x.clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    assert digest({"x": flipped}) != digest({"x": x})
    assert digest({"x": x.reshape(3, 2)}) != digest({"x": x})


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_file_that_is_cut_short_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedError, match="not a complete safetensors file"):
        list(read_safetensors(path))


def test_what_is_no_tensor_is_refused_by_name() -> None:
    with pytest.raises(LabtrainError, match="cannot digest lr: must be a tensor, got float"):
        digest({"lr": 0.1})


def test_a_training_state_is_digested_whole() -> None:
    """Nesting, types and order of lists count; the order of keys does not."""
    state = {"step": 3, "groups": [{"lr": 0.1, "on": True}], "exp_avg": torch.ones(2)}
    assert digest_tree(state) == digest_tree(dict(reversed(state.items())))
    others = [
        {**state, "step": 3.0},
        {**state, "groups": [{"lr": 0.1, "on": 1}]},
        {**state, "exp_avg": torch.ones(2, 1)},
    ]
    assert len({digest_tree(tree) for tree in [state, *others]}) == 4
    with pytest.raises(LabtrainError, match=r"state\.path is a object; checkpoints hold only"):
        digest_tree({"path": object()})
