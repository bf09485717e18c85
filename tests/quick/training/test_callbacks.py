from pathlib import Path

import torch

from labtrain.base.files import Lines
from labtrain.record.trail import read_trail
from labtrain.training.callbacks.steps import Trail, clock, tensor_names


def test_a_clock_reads_as_people_write_it() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 90061)] == ["0:00:00", "0:01:00", "0:59:59", "25:01:01"]


def test_a_line_that_waits_for_a_device_is_written_before_a_checkpoint_and_at_the_end(tmp_path: Path) -> None:
    """Or a training that goes on from that checkpoint would lack it."""
    trail = Trail(tmp_path / "trail.jsonl", every_n_steps=1)
    trail.file = Lines(trail.path)
    loss = torch.tensor([0.25], dtype=torch.float64).view(torch.int64)
    for step, end in (
        (1, lambda: trail.on_save_checkpoint(None, None, {})),
        (2, lambda: trail.teardown(None, None, "")),
    ):  # type: ignore[arg-type]
        line = {"step": step, "epoch": 0, "loss": True, "batch": None, "gradients": True}
        trail.pending = line, torch.cat([loss, torch.tensor([1, -1, 2, 3])])
        assert len(read_trail(tmp_path)) == step - 1
        end()
        assert read_trail(tmp_path)[-1] == {
            "step": step, "epoch": 0, "loss": 0.25, "batch": None,
            "gradients": "0000000200000003", "weights": "0000000000000001ffffffffffffffff"}  # fmt: skip
    assert trail.file is None


def test_the_tensors_of_a_trail_are_the_weights_and_what_else_is_trained() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    assert tensor_names(model) == list(model.state_dict())
    model._register_state_dict_hook(lambda module, state, prefix, meta: state.__delitem__("0.weight"))
    assert tensor_names(model)[-1] == "0.weight"
