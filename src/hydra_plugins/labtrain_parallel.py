"""Hydra's launcher `parallel` (labtrain/launch/parallel.py). Hydra imports this file at each start: nothing heavy here.

https://hydra.cc/docs/1.3/advanced/plugins/develop/
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class ParallelConf:
    """Its keys: `hydra.launcher.jobs`, how many runs at once; null: as many as have GPUs."""

    _target_: str = "hydra_plugins.labtrain_parallel.ParallelLauncher"
    jobs: int | None = None


ConfigStore.instance().store(group="hydra/launcher", name="parallel", node=ParallelConf, provider="labtrain")


class ParallelLauncher(Launcher):
    """Trains the runs of a sweep side by side."""

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from labtrain.launch.parallel import SweepJob, gpus_of, run_all, visible_gpus

        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs, there = [], len(visible_gpus())
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            gpus = gpus_of(config.trainer.accelerator, config.trainer.devices, there)
            said = " ".join(filter_overrides(overrides))
            jobs.append(SweepJob(number=number, said=said, gpus=gpus, run=partial(self._run, config)))
        return run_all(jobs, most=self.jobs)

    def _run(self, config: DictConfig) -> JobReturn:
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
