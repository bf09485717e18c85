"""output.log: what a run's processes printed, over all its starts."""

import signal
from pathlib import Path

from tests.conftest import QUICK, Experiment
from tests.support.training import kill_when

TALKING = """
import sys
import lightning.pytorch as pl


class Talks(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        print(f"epoch {trainer.current_epoch} on stdout of rank {trainer.global_rank}")
        sys.stderr.write("\\r 10%\\r 50%\\r\\x1b[31m100%\\x1b[0m\\n")
        print("the key is", "sk-" + "a1B2c3D4" * 6)
"""


def test_output_log_has_the_lines_of_all_starts_and_ranks(own_experiment: Experiment, tmp_path: Path) -> None:
    """Without colours, without lines that move, without credentials."""
    (own_experiment.root / "talks.py").write_text(TALKING)
    options = (*QUICK, f"paths.runs={tmp_path}/runs", "trainer.max_epochs=3", "trainer.accelerator=cpu")
    options = (*options, "+callbacks.talks._target_=talks.Talks", "trainer.devices=2", "checkpoint.every_n_steps=10")
    trained = own_experiment.train(*options)
    text = (trained.folder / "output.log").read_text()
    lines = text.splitlines()
    for epoch in range(3):
        assert f"epoch {epoch} on stdout of rank 0" in lines
        assert f"[rank 1] epoch {epoch} on stdout of rank 1" in lines
    assert lines.count("100%") == 3
    assert "\x1b" not in text
    assert "a1B2c3D4a1B2" not in text
    assert "acc" in text  # the table at the end


def test_output_log_is_continued_by_a_resume(experiment: Experiment) -> None:
    options = (*QUICK, "paths.runs=runs", "trainer.max_epochs=4", "checkpoint.keep_last=9")
    assert kill_when(experiment, *options, checkpoints=2) == -signal.SIGKILL
    trained = experiment.train(*options)
    text = (trained.folder / "output.log").read_text()
    assert text.count("BatchNorm normalises over the 16 samples") == 2
    assert "resumes from step-" in text


def test_nothing_is_kept_of_a_start_that_is_refused(experiment: Experiment, tmp_path: Path) -> None:
    experiment.train("paths.runs=runs", "trainer.gradient_clip_algorithm=cut", code=2)
    assert list(tmp_path.iterdir()) == []
