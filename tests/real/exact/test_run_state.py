"""A training in a process that goes on: what it sets ends with it."""

import subprocess
import sys
from pathlib import Path

STORY = """
import os, random, tempfile
import numpy as np, lightning.pytorch, torch
import labtrain
from pathlib import Path
from labtrain.exact import determinism
from labtrain.record.resume import make_job
from tests.support.exact import configure

def state():
    return repr([
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.get_num_threads(),
        torch.utils.deterministic.fill_uninitialized_memory, torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled, determinism.run_seed(), determinism.run_mode(),
        torch.nn.Module.__setattr__, "__setattr__" in vars(lightning.pytorch.LightningModule),
        sorted(os.environ.keys() - {"PYTORCH_NVML_BASED_CUDA_CHECK"}),  # Lightning's
        random.getstate(), np.random.get_state()[1].tolist(), torch.default_generator.get_state().tolist(),
    ])

def config(seed):
    found = configure("mlp", data={"size": 16, "batch_size": 8}, trainer={"max_epochs": 1, "accelerator": "cpu"})
    found["model"] = {"_target_": "tests.support.names_models.Tiny"}
    return found | {"seed": seed, "paths": {"runs": tempfile.mkdtemp()}, "callbacks": {}}

def train(config):
    return labtrain.train(make_job(config, root=Path.cwd(), command=[]))

torch.set_num_threads(2)
torch.backends.cudnn.benchmark = True
torch.manual_seed(5)
before = state()
roots = torch.rand(10000).sqrt()
torch.manual_seed(5)
digests = [train(config(1)).weights_digest]
assert state() == before, "state"
loader = labtrain.DataLoader(list(range(8)), 4, shuffle=True)
print(list(loader)[0].tolist())
digests.append(train(config(1)).weights_digest)
assert digests[0] == digests[1]
broken = config(3)
broken["model"]["_target_"] = "tests.support.names_models.Missing"
try:
    train(broken)
except labtrain.LabtrainError:
    assert state() == before, "state after an error"
assert torch.equal(torch.rand(10000).sqrt(), roots)
"""
ALONE = "import labtrain; print(list(labtrain.DataLoader(list(range(8)), 4, shuffle=True))[0].tolist())"


def test_a_process_is_after_a_training_as_it_was_before(tmp_path: Path) -> None:
    """Flags, generators, variables: as found; a loader of one's own is outside of any run; a second training is itself."""
    here, alone = (
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
        for code in (STORY, ALONE)
    )
    assert here.returncode == 0, here.stderr
    assert here.stdout.splitlines()[-1] == alone.stdout.strip()
