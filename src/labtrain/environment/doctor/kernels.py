"""Run kernels on each GPU, and NCCL between them, in processes of their own with a time limit.

A broken card or driver crashes or hangs these processes, not the doctor. Results that are the same on several GPUs are
one check.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from labtrain.environment.doctor.cuda_errors import in_words
from labtrain.environment.doctor.processes import Ended, run_together
from labtrain.environment.doctor.report import Check, Status, skipped
from labtrain.environment.doctor.verdicts import CONV3D_HINT

GROUP = "kernels"
TIMEOUT_S = 120.0
PROCESS = "labtrain.environment.doctor.kernels_process"
COLLECTIVES = "labtrain.environment.doctor.collectives_process"
# NCCL's log, one file a process, has what it chose: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
NCCL_LOG = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,P2P,SHM,NET,TUNING"}
ALGORITHM = re.compile(r"AllReduce: \d+ Bytes -> Algo (\w+) proto (\w+)")
TRANSPORT = re.compile(r"Channel .* via (P2P/[A-Za-z]+|SHM|NET/\w+)")
WARNING = re.compile(r"NCCL WARN (.*)")
KNOWN = "the known result"
# Hints for an error that cuda_errors.py does not know.
WHOLE_ERROR = f"python -m {PROCESS} cuda:0 shows the whole error"
TOPOLOGY = "nvidia-smi topo -m shows how the GPUs are connected"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one process said of one check.

    Attributes:
        name: of the check.
        status: ok, warned, failed or skipped.
        found: what it found, or the error.
        gpu: NVML's number of the GPU; torch's if NVML does not know it.
    """

    name: str
    status: Status
    found: str
    gpu: int


def checks(device: str, count: int, numbers: Mapping[str, int], *, timeout_s: float = TIMEOUT_S) -> Iterator[Check]:
    """Yield the group's checks.

    Args:
        device: cuda, or cpu in the doctor's own tests.
        count: of the devices that torch sees.
        numbers: NVML's number of each GPU, by UUID.
        timeout_s: of all kernels together, and of NCCL.
    """
    if device == "cuda" and count == 0:
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
            found = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides every GPU"
            yield skipped(GROUP, "kernels", found, "a GPU that torch sees")
            return
        count = 1  # torch sees no GPU: CUDA's own error says why
    begun = [[PROCESS, f"{device}:{index}" if device == "cuda" else device] for index in range(count)]
    results = [
        result for index, lines in enumerate(_finished(begun, timeout_s)) for result in _results(lines, numbers, index)
    ]
    yield from _merged(results, WHOLE_ERROR, device)
    if count > 1:
        yield from collectives(device, count, timeout_s=timeout_s)


def collectives(device: str, count: int, *, timeout_s: float = TIMEOUT_S) -> Iterator[Check]:
    """Yield the checks of NCCL between all devices; of gloo on CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        log = {**NCCL_LOG, "NCCL_DEBUG_FILE": f"{folder}/nccl.%p"}
        begun = [[COLLECTIVES, device, str(rank), str(count), f"{folder}/store"] for rank in range(count)]
        results = [
            result
            for rank, lines in enumerate(_finished(begun, timeout_s, log))
            for result in _results(lines, {}, rank)
        ]
        text = "".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob("nccl.*")))
    results = [dataclasses.replace(each, name="NCCL start") if each.name == "start" else each for each in results]
    if failed := [result for result in results if result.status == "failed"]:
        warning = "".join(f"; NCCL: {line}" for line in WARNING.findall(text)[-1:])
        yield from _merged([dataclasses.replace(each, found=each.found + warning) for each in failed], TOPOLOGY, device)
        return
    for result in results:
        if result.gpu == 0:  # rates differ a little between ranks
            seen = chosen(text) if result.name.endswith("all-reduce") else ""
            yield Check(group=GROUP, name=result.name, status=result.status, found=result.found + seen, wanted=KNOWN)


def chosen(log: str) -> str:
    """Return which algorithm, protocol and transport NCCL chose, from its log; empty if it does not say."""
    algorithms = [f"{algorithm}, {protocol}" for algorithm, protocol in ALGORITHM.findall(log)][-1:]
    transports = sorted(set(TRANSPORT.findall(log)))
    return "".join(f"; {text}" for text in [*algorithms, *([f"via {', '.join(transports)}"] if transports else [])])


def _finished(
    arguments: Sequence[Sequence[str]], timeout_s: float, environment: Mapping[str, str] | None = None
) -> Iterator[list[dict[str, str]]]:
    """Yield the lines of each process; a last one tells of a check that it did not finish."""
    commands = [[sys.executable, "-m", *each] for each in arguments]
    for ended in run_together(commands, timeout_s, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **(environment or {})}):
        lines = list(_parsed(ended.output))
        if ended.code != 0:
            name = next((line["begin"] for line in reversed(lines) if "begin" in line), "start")
            found = f"no answer in {timeout_s:g} seconds" if ended.code is None else _why(ended)
            lines.append({"name": name, "status": "failed", "found": found})
        yield lines


def _parsed(output: str) -> Iterator[dict[str, str]]:
    """Yield the JSON lines of an output; libraries print other ones between them."""
    for line in output.splitlines():
        if line.startswith('{"'):
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _why(ended: Ended) -> str:
    """Return why a process ended: its signal, and the line of its errors that says most."""
    lines = [line.strip() for line in ended.errors.splitlines() if line.strip()]
    telling = next((line for line in reversed(lines) if in_words(line)), lines[-1] if lines else "")
    return f"{ended.reason}: {telling}" if telling else ended.reason


def _results(lines: Sequence[Mapping[str, str]], numbers: Mapping[str, int], index: int) -> Iterator[Result]:
    """Yield the results of one process."""
    gpu = next((numbers[line["uuid"]] for line in lines if line.get("uuid") in numbers), index)
    for line in lines:
        if {"name", "status", "found"} <= set(line) and (line["name"] != "start" or line["status"] == "failed"):
            yield Result(name=line["name"], status=cast(Status, line["status"]), found=line["found"], gpu=gpu)


def _merged(results: Sequence[Result], unknown_hint: str, device: str) -> Iterator[Check]:
    """Yield a check for all GPUs with the same result, in the order of the checks."""
    same: dict[tuple[str, str, str], list[int]] = {}
    for name in dict.fromkeys(result.name for result in results):
        for result in results:
            if result.name == name:
                same.setdefault((name, result.status, result.found), []).append(result.gpu)
    for (name, status, found), gpus in same.items():
        words = in_words(found) if status == "failed" else None
        hint = {"failed": words.hint if words else unknown_hint, "warned": CONV3D_HINT}
        yield Check(
            group=GROUP,
            name=f"{'GPU' if device == 'cuda' else 'CPU'} {spans(gpus)} {name}",
            status=cast(Status, status),
            found=f"{words.why}: {found}" if words else found,
            wanted=KNOWN if status != "warned" else "through cuDNN",
            hint=hint.get(status, ""),
        )


def spans(numbers: Sequence[int]) -> str:
    """Return sorted numbers as text: 0-3,5."""
    text: list[str] = []
    numbers = sorted(numbers)
    for number in numbers:
        if number - 1 not in numbers:
            last = number
            while last + 1 in numbers:
                last += 1
            text.append(f"{number}-{last}" if last > number else f"{number}")
    return ",".join(text)
