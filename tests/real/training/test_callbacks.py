"""Callbacks in whole runs of an experiment."""

from tests.conftest import QUICK, Experiment

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
