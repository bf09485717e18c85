import signal
from pathlib import Path

import torch

from labtrain.callbacks import Trail, clock, tensor_names
from labtrain.trail import read_trail
from tests.conftest import QUICK, Experiment


def test_a_clock_reads_as_people_write_it() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 90061)] == ["0:00:00", "0:01:00", "0:59:59", "25:01:01"]


def test_a_line_that_waits_for_a_device_is_written_before_a_checkpoint_and_at_the_end(tmp_path: Path) -> None:
    """Or a training that goes on from that checkpoint would lack it."""
    trail = Trail(tmp_path / "trail.jsonl", every_n_steps=1)
    trail.file = trail.path.open("a", buffering=1)
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


MANUAL = """

def _training_step(self, batch, batch_idx):
    first, second = self.optimizers()
    optimizer = first if batch_idx % 2 else second
    images, labels = batch
    loss = nn.functional.cross_entropy(self(images), labels)
    optimizer.zero_grad()
    self.manual_backward(loss)
    optimizer.step()
    return {"loss_of": loss} if batch_idx % 3 else None


def _configure_optimizers(self):
    half = [*self.parameters()]
    return [torch.optim.SGD(half[:4], 0.01), torch.optim.SGD(half[4:], 0.01)]


DigitsNet.automatic_optimization = False
DigitsNet.training_step, DigitsNet.configure_optimizers = _training_step, _configure_optimizers
"""


def test_manual_optimization_with_two_optimizers_has_a_trail_of_what_each_step_did(own_experiment: Experiment) -> None:
    """A line's gradients are those of its own batch, however often lines are written; a loss only where there is one."""
    model = own_experiment.root / "model.py"
    model.write_text(model.read_text() + MANUAL)
    command = (*QUICK, "trainer.max_epochs=1", "determinism.shards=null", "resume=never")
    each = own_experiment.train(*command, cwd=own_experiment.root).trail()
    third = own_experiment.train(*command, "trail.every_n_steps=3", cwd=own_experiment.root).trail()
    assert len(each) == 20
    assert third == [line for line in each if line["step"] % 3 == 0]
    assert {line["loss"] for line in each} == {"nan"}
    assert len({line["gradients"] for line in each}) == 20


LOOKING = """

def _looking(self, batch, batch_idx):
    filled = bool(torch.empty(1000).isnan().all())
    with open("seen", "a") as file:
        file.write(f"{self.global_step} {filled or torch.utils.deterministic.fill_uninitialized_memory}\\n")
    if self.global_step == 18 and open("seen").read().count("18 ") == 1:
        __import__("os").kill(0, 9)
    return _step(self, batch, batch_idx)


_step, DigitsNet.training_step = DigitsNet.training_step, _looking
"""


def test_new_memory_is_filled_in_the_first_step_of_a_run_alone(own_experiment: Experiment) -> None:
    """Not of a process: code that reads what nobody has written finds the same in a training that was resumed."""
    model, folder = own_experiment.root / "model.py", own_experiment.root
    model.write_text(model.read_text() + LOOKING)
    command = (*QUICK, "trainer.max_epochs=1", "determinism.shards=1", "checkpoint.every_n_steps=3")
    own_experiment.train(*command, cwd=folder, start_new_session=True, code=-signal.SIGKILL)
    run = own_experiment.train(*command, cwd=folder)
    lines = (folder / "seen").read_text().splitlines()
    assert len(lines) == 20 + 19 - run.receipt["segments"][1]["from_step"]
    assert set(lines) == {"0 True", *(f"{step} False" for step in range(1, 20))}
