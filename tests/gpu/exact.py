"""Checks of exactness by digest: runs of small models that are whole, shared by two processes, killed and moved."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from labtrain.base.errors import EXIT_STOPPED, DeviceError
from labtrain.checkpoints.format import load_folder
from labtrain.stores.layout import list_checkpoints
from labtrain.training.speed import check_compiler
from tests.gpu.harness import LeftOutError, Place
from tests.gpu.worker import SAID, work
from tests.support import exact
from tests.support.exact import Runner, outcome

SIZE, BATCH_SIZE, EPOCHS = 37, 8, 2  # the last batch of five leaves shards without a sample
STEPS = 10


def runner(place: Place, name: str, *, nodes: bool = True) -> Runner:
    """Return what trains below a folder of the check; with `nodes`, several processes share the device."""
    preload = "tests.gpu.worker"
    return Runner(place.child(name), work=work, preload=preload, accelerator=place.accelerator, nodes=nodes)


def gpt(place: Place, precision: str = "32-true", **model: Any) -> dict[str, Any]:
    """Return the configuration of a GPT; on a GPU of a size with which its fused kernels are used."""
    width, context = (512, 256) if place.on_gpu else (32, 32)
    model = {"_target_": "tests.gpu.models.GPT", "width": width, "context": context, **model}
    return _config(model, "tokens", context, precision)


def resnet(place: Place, precision: str = "32-true", target: str = "ResNet", **model: Any) -> dict[str, Any]:
    """Return the configuration of a ResNet, or of another model of images."""
    width, side = (64, 64) if place.on_gpu else (8, 16)
    sized = {"width": width} if target == "ResNet" else {}
    return _config({"_target_": f"tests.gpu.models.{target}", **sized, **model}, "images", side, precision)


def _config(model: dict[str, Any], kind: str, length: int, precision: str) -> dict[str, Any]:
    config = exact.configure("mlp", "even", precision, trainer={"max_epochs": EPOCHS})
    config["model"], config["callbacks"] = model, {"at": {"_target_": "tests.gpu.models.Kill"}}
    config["data"] = {"_target_": "tests.gpu.models.Data", "kind": kind, "size": SIZE, "batch_size": BATCH_SIZE,
                      "length": length}  # fmt: skip
    return dict(config)


def killed_at(step: int, rank: int, number: int = signal.SIGKILL) -> str:
    """Return what has a rank killed after a step."""
    return f"{step} {int(number)} {rank}"


def moved(trains: Runner, config: dict[str, Any]) -> dict[str, Any]:
    """Train on 2 processes, killed, on 1, killed, and on 2 to the end."""
    config = copy.deepcopy(config)
    config["checkpoint"]["every_n_steps"] = 2
    assert trains.run(config, world=2, code=None, signal_at=killed_at(3, 1)) is None, "it was not killed"
    assert trains.run(config, world=1, code=None, signal_at=killed_at(6, 0)) is None, "it was not killed"
    found = outcome(trains.run(config, world=2))
    receipts = [*trains.folder.glob("runs/*/*/receipt.json")]
    segments = [each for path in receipts for each in json.loads(path.read_text())["segments"]]
    assert [each["devices"] for each in segments] == [2, 1, 2], segments
    steps = [each["from_step"] for each in segments]
    assert 0 == steps[0] < steps[1] < steps[2], steps
    return found


def staged(trains: Runner) -> int:
    """Return how many exchanges of the last start passed through the host."""
    return sum(map(int, re.findall(rf"^{SAID} (\d+)$", trains.said(), re.MULTILINE)))


def same(place: Place, config: dict[str, Any]) -> str:
    """Hold that a configuration has one outcome: weights, whole state, metrics, trail, name. Return the digest."""
    one, two, three = (runner(place, name) for name in ("one", "two", "moved"))
    run_dir = one.run(config)
    assert run_dir is not None
    whole = outcome(run_dir)
    on_device(place, run_dir)
    figure = f"{digest_of(whole)} {whole['steps']} steps"
    if config["trainer"]["precision"] == "16-mixed":
        number = skipped(run_dir)
        assert number > 0, "the scaler has skipped no step"
        figure += f", {number} skipped"
    shared = outcome(two.run(config, world=2))
    assert staged(two) > 0, "nothing was exchanged through the host"
    hold(shared, whole, "2 processes")
    hold(moved(three, config), whole, "killed and moved")
    return figure


def hold(found: dict[str, Any], whole: dict[str, Any], where: str) -> None:
    """Raise an AssertionError that names what differs between two outcomes."""
    unlike = [key for key in whole if found.get(key) != whole[key]]
    if "trail" in unlike:
        first = next((a["step"] for a, b in zip(found["trail"], whole["trail"], strict=False) if a != b), "the end")
        unlike[unlike.index("trail")] = f"trail from step {first}"
    weights = f"{found['weights_digest'][:19]} instead of {whole['weights_digest'][:19]}"
    assert not unlike, f"{where}: {', '.join(unlike)} differ from 1 process (weights {weights})"


def digest_of(found: dict[str, Any]) -> str:
    return str(found["weights_digest"]).removeprefix("sha256:")[:12]


def on_device(place: Place, run_dir: Path) -> None:
    """Hold that a run was trained where the check says."""
    hardware = json.loads((run_dir / "receipt.json").read_text())["hardware"]
    assert bool(hardware.get("gpus")) is place.on_gpu, hardware


def skipped(run_dir: Path) -> int:
    """Return how many steps the scaler has skipped: the optimizer has not counted them."""
    folder, manifest = list_checkpoints(run_dir / "checkpoints")[-1]
    counted = load_folder(folder)["optimizer_states"][0]["state"][0]["step"]
    return int(manifest["step"]) - int(counted)


def gpt_in_fp32(place: Place) -> str:
    return same(place, gpt(place))


def gpt_in_bf16(place: Place) -> str:
    return same(place, gpt(place, "bf16-mixed"))


def gpt_in_fp16(place: Place) -> str:
    return same(place, gpt(place, "16-mixed"))


def resnet_in_fp32(place: Place) -> str:
    return same(place, resnet(place))


def resnet_in_bf16(place: Place) -> str:
    return same(place, resnet(place, "bf16-mixed"))


def resnet_in_fp16(place: Place) -> str:
    return same(place, resnet(place, "16-mixed"))


def channels_last(place: Place) -> str:
    config = resnet(place, "bf16-mixed")
    config["speed"]["channels_last"] = True
    config["callbacks"]["seen"] = {"_target_": "tests.gpu.models.ChannelsLast"}
    return same(place, config)


def checkpoint_activations(place: Place) -> str:
    plain = outcome(runner(place, "plain").run(gpt(place)))
    config = gpt(place)
    config["speed"]["checkpoint_activations"] = True
    config["callbacks"]["seen"] = {"_target_": "tests.gpu.models.Recomputes"}
    found = same(place, config)
    assert digest_of(plain) == found.split()[0], f"{found}, and without recomputed activations {digest_of(plain)}"
    return found


def compiled(place: Place) -> str:
    """Inductor's cache is the check's own: each compiles at least once."""
    try:
        check_compiler({"compile": True}, place.accelerator)  # type: ignore[typeddict-item]
    except DeviceError as error:
        raise LeftOutError(str(error)) from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place.child("inductor"))
    config = gpt(place, dropout=0.0, layers=1)
    config["speed"]["compile"] = True
    config["trainer"]["max_epochs"] = 1
    one, two, killed = (runner(place, name) for name in ("one", "two", "killed"))
    whole = outcome(one.run(config))
    assert "nothing was compiled" not in one.said(), one.said()
    hold(outcome(two.run(config, world=2)), whole, "2 processes")
    config["checkpoint"]["every_n_steps"] = 2
    assert killed.run(config, code=None, signal_at=killed_at(3, 0)) is None, "it was not killed"
    hold(outcome(killed.run(config)), whole, "killed and resumed")
    return f"{digest_of(whole)} {whole['steps']} steps"


def two_devices(place: Place) -> str:
    """As `same`, each process with a device of its own."""
    if place.on_gpu:
        import torch

        if (have := torch.cuda.device_count()) < 2:
            raise LeftOutError(f"needs 2 GPUs, found {have}")
    config = resnet(place, "bf16-mixed")
    whole = outcome(runner(place, "one", nodes=False).run(config))
    hold(outcome(runner(place, "two", nodes=False).run(config, world=2)), whole, "2 devices")
    hold(moved(runner(place, "moved", nodes=False), config), whole, "killed and moved")
    return f"{digest_of(whole)} over {'NCCL' if place.on_gpu else 'gloo'}"


def strict_and_off(place: Place) -> str:
    """Train the same twice in each mode, in folders of their own."""
    digests: dict[str, list[str]] = {}
    for mode in ("strict", "off"):
        for number in (1, 2):
            config = resnet(place, target="Scattered")
            config["determinism"]["mode"] = mode
            found = outcome(runner(place, f"{mode}-{number}").run(config))
            digests.setdefault(mode, []).append(digest_of(found))
    assert len(set(digests["strict"])) == 1, f"strict gave {' and '.join(digests['strict'])}"
    off = "one digest" if len(set(digests["off"])) == 1 else "two digests"
    return f"strict {digests['strict'][0]} twice; off {off}"


def fsdp(place: Place) -> str:
    """On a GPU in a group of one; on a CPU in two processes, and resumed on one."""
    world = 1 if place.on_gpu else 2
    config = gpt(place)
    config["trainer"]["strategy"] = "fsdp"
    whole = outcome(runner(place, "whole", nodes=False).run(config, world=world))
    config["checkpoint"]["every_n_steps"] = 2
    killed = runner(place, "killed", nodes=False)
    assert killed.run(config, world=world, code=None, signal_at=killed_at(5, 0)) is None, "it was not killed"
    hold(outcome(killed.run(config, world=world)), whole, "killed and resumed")
    stopped = runner(place, "stopped", nodes=False)
    signal_at = killed_at(5, 0, signal.SIGTERM)
    stopped.run(config, world=world, code=EXIT_STOPPED, signal_at=signal_at)
    assert "results then depend on the number of devices" in stopped.said(), stopped.said()
    if place.on_gpu:
        return f"{digest_of(whole)} in a group of one"
    (run_dir,) = stopped.folder.glob("runs/exact/[0-9a-f]*")
    _, manifest = list_checkpoints(run_dir / "checkpoints")[-1]
    for steps in (manifest["step"], STEPS):  # no more step, and to the end
        shutil.copytree(run_dir, origin := place.folder / f"origin {steps}" / run_dir.name)
        again = copy.deepcopy(config) | {"resume": str(origin)}
        again["trainer"] |= {"max_steps": steps, "max_epochs": None}
        on_one = runner(place, f"on one {steps}", nodes=False)
        moved_dir = on_one.run(again)
        found = outcome(moved_dir)
        segment = json.loads((Path(str(moved_dir)) / "receipt.json").read_text())["segments"][-1]
        assert (segment["devices"], segment["from_step"], found["steps"]) == (1, manifest["step"], steps), segment
        assert "results then depend on the number of devices" in on_one.said(), on_one.said()
        same_weights = found["weights_digest"] == manifest["weights_digest"]
        assert same_weights is (steps == manifest["step"]), f"{found['weights_digest']} after {steps} steps"
    return f"{digest_of(whole)} on {world} processes; resumed on 1 from step {manifest['step']} with the same weights"


def template(place: Place) -> str:
    """By its train.py, as a person starts it; killed from inside after a step."""
    from labtrain.project.new import make_experiment

    root = place.folder / "digits"
    make_experiment(root, author="a test")
    whole = _train(root, place, "whole", "0 0 0")
    code, _ = _start(root, place, "killed", killed_at(9, 0))
    assert code == -signal.SIGKILL, f"it ended with {code}"
    again = _train(root, place, "killed", "0 0 0")
    results, segments = again["results"], again["segments"]
    assert [each["status"] for each in segments] == ["killed", "complete"], segments
    assert segments[1]["from_step"] > 0, "it began again"
    for key in ("weights_digest", "state_digest", "metrics"):
        assert results[key] == whole["results"][key], f"{key}: {results[key]} instead of {whole['results'][key]}"
    assert bool(whole["hardware"].get("gpus")) is place.on_gpu, whole["hardware"]
    return f"{digest_of(results)} {results['steps']} steps"


def _start(root: Path, place: Place, name: str, signal_at: str) -> tuple[int, str]:
    overrides = [f"paths.runs={place.folder / name}", "trainer.enable_progress_bar=false", "logger=none",
                 "trainer.max_epochs=2", "checkpoint.every_n_steps=4", f"trainer.accelerator={place.accelerator}",
                 "+callbacks.at._target_=tests.gpu.models.Kill"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "train.py", *overrides], cwd=root, capture_output=True, text=True, check=False,
        env={**os.environ, "SIGNAL_AT": signal_at},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def _train(root: Path, place: Place, name: str, signal_at: str) -> dict[str, Any]:
    code, said = _start(root, place, name, signal_at)
    assert code == 0, f"exit code {code}\n{said}"
    (path,) = (place.folder / name).glob("*/*/receipt.json")
    return dict(json.loads(path.read_text()))
