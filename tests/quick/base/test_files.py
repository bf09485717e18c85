"""Files that are written in one step."""

from pathlib import Path

import pytest
import torch

from labtrain.base.files import atomic, write_atomically


def test_a_write_that_fails_leaves_the_old_file_only(tmp_path: Path) -> None:
    """A reader sees the old text or the new one, and no scratch file stays."""
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError, match="half"), atomic(path) as scratch:
        raise RuntimeError("half" * scratch.write_text("x"))
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    write_atomically(path, "new")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])


def test_a_ckpt_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    """torch.save puts the file's name into the archive, without what follows the last dot: our random part."""
    path = tmp_path / "model.ckpt"
    found = []
    for _ in range(2):
        with atomic(path) as scratch:
            torch.save({"weights": torch.arange(3)}, scratch)
        found.append(path.read_bytes())
    assert found[0] == found[1]
