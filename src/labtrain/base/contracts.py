"""Types of what labtrain writes and reads: configuration, receipt, manifest, lines of trail and history.

No torch.

A file is parsed and checked where it is read (config.check, receipt.read, Store.manifest, read_trail); after that
everything is one of these. `total=False` marks keys that older files, or some kinds of run, do not have.
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

Options = dict[str, Any]  # options, attributes or facts whose keys only other code knows
State = dict[str, Any]  # a state_dict, or what state.pt holds: tensors and plain values by name


def as_options(typed: Mapping[str, object]) -> Options:
    """Return one of the types below as a plain dict, the same object, for code that takes any of its keys."""
    return cast(Options, typed)


# ------------------------------------------------------------------------------------------------------- configuration


class TrainerConfig(TypedDict):
    """`trainer`: the keys of Lightning's Trainer; null takes its default."""

    accelerator: str
    strategy: str
    devices: int | list[int] | str
    num_nodes: int
    precision: str | None
    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: str | None
    limit_train_batches: float | None
    limit_val_batches: float | None
    limit_test_batches: float | None
    fast_dev_run: bool | int
    overfit_batches: float
    val_check_interval: float | str | None
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | None
    log_every_n_steps: int
    enable_progress_bar: bool | None
    enable_model_summary: bool
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    inference_mode: bool
    profiler: str | None
    detect_anomaly: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: int


class DeterminismConfig(TypedDict):
    """`determinism`."""

    mode: str
    shards: int | None
    threads: int


class CheckpointConfig(TypedDict):
    """`checkpoint`: times in seconds."""

    url: str | None
    every_n_steps: int | None
    every_seconds: float | None
    keep_last: int
    keep_best: int
    keep_every_n_steps: int | None
    monitor: str | None
    mode: str
    spool_bytes: int
    deliver_seconds: float


class SpeedConfig(TypedDict):
    """`speed`."""

    compile: bool | str
    checkpoint_activations: bool
    tf32: bool
    channels_last: bool


class TrailConfig(TypedDict):
    """`trail`."""

    every_n_steps: int


class FailuresConfig(TypedDict):
    """`failures`."""

    max_restarts: int
    elastic: bool
    hang_seconds: float | None


class PathsConfig(TypedDict):
    """`paths`."""

    runs: str


EVALUATIONS = ("validate", "test", "predict")  # keys that evaluate a complete run instead of a training


class InitFrom(TypedDict):
    """`init_from`: the weights that a training starts with; no path: those that the model makes."""

    path: str | None
    strict: bool
    rename: dict[str, str] | None
    digest: str | None


class Config(TypedDict):
    """A configuration, composed and resolved."""

    experiment: str
    seed: int
    resume: str
    init_from: InitFrom
    model: Options
    data: Options
    callbacks: dict[str, Options | None]
    logger: dict[str, Options]
    trainer: TrainerConfig
    determinism: DeterminismConfig
    checkpoint: CheckpointConfig
    speed: SpeedConfig
    trail: TrailConfig
    failures: FailuresConfig
    paths: PathsConfig
    gpu_stats: bool


# -------------------------------------------------------------------------------------- receipt (receipt.schema.json)


class CodeRecord(TypedDict):
    """`code`: what the experiment's code was."""

    digest: str
    commit: str | None
    branch: str | None
    dirty: bool | None
    untracked: list[str]
    ignored: list[str]
    patch: str | None
    folder: str | None
    sources: dict[str, str]
    outside: dict[str, str]
    shadows: list[str]
    labtrain: str


class InstalledFiles(TypedDict):
    """Part of `environment`: the installed files that are not as their distribution's RECORD says."""

    files: int | None
    changed_files: list[str] | None


class Installed(TypedDict):
    """`environment`: what was installed."""

    route: str
    lock_digest: str | None
    python: str
    distributions: dict[str, str]
    files: NotRequired[int | None]
    changed_files: NotRequired[list[str] | None]


class Origin(TypedDict):
    """`segments.origin`: another run's checkpoint that the run begins from."""

    run_id: str
    checkpoint: str
    step: int
    digest: str
    url: str


class Change(TypedDict):
    """`segments.changed`: what a resumed training has that differs from the one before."""

    key: str
    before: object
    now: object


class Segment(TypedDict):
    """`segments`: the part of a training that one process made. Times are ISO 8601."""

    started: str
    ended: str | None
    status: str
    why: str | None
    host: str
    devices: int
    from_step: int
    to_step: int | None
    changed: list[Change]
    origin: NotRequired[Origin]


class Best(TypedDict):
    """`results.best`: the best value of the monitored metric."""

    metric: str
    value: float
    step: int


class Results(TypedDict, total=False):
    """`results`: empty until the run is complete."""

    metrics: dict[str, float]
    best: Best | None
    steps: int
    weights_digest: str
    state_digest: str | None


class SavedCheckpoint(TypedDict):
    """`checkpoints`: one that was kept."""

    path: str
    step: int
    weights_digest: str
    score: float | None


class TrailRecord(TypedDict):
    """`trail`: where it is, and what it holds."""

    file: str
    every_n_steps: int
    tensors: list[str]
    sha256: str | None
    missing: NotRequired[list[list[int]]]


class Gpu(TypedDict):
    """`hardware.gpus`: one of the machine."""

    name: str
    memory_bytes: int
    compute_capability: str


class Gpus(TypedDict, total=False):
    """Part of `hardware`: empty for a training on a CPU."""

    gpus: list[Gpu]
    driver: str | None
    cuda: str | None
    cudnn: int | None
    nccl: str


class Hardware(Gpus):
    """`hardware`: the machine that it was run on."""

    cpu: str
    instruction_sets: list[str]
    cores: int | None
    memory_bytes: int
    platform: str
    libc: str


class Flags(TypedDict):
    """Part of `determinism`: torch's flags, and the environment variables that can change bits."""

    deterministic_algorithms: bool
    warn_only: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool
    cudnn_allow_tf32: bool
    float32_matmul_precision: str
    threads: int
    cpu_capability: str
    variables: dict[str, str]


class Determinism(Flags):
    """`determinism`: what the bits depend on."""

    mode: str
    shards: int | None
    seed: int
    any_number_of_devices: bool
    notes: list[str]


class DatasetRecord(TypedDict, total=False):
    """Part of `data`: what only a dataset has."""

    samples: int
    transforms: list[str]


class DataRecord(DatasetRecord):
    """`data`: the fingerprint of a dataset, or of a file or folder that the training read."""

    digest: str
    type: str
    files: int
    bytes: int
    opaque: list[str]


class Receipt(TypedDict):
    """A run's receipt.json."""

    schema: str
    run_id: str
    status: str
    command: list[str]
    config: Config
    code: CodeRecord
    environment: Installed
    hardware: Hardware
    determinism: Determinism
    data: dict[str, DataRecord]
    segments: list[Segment]
    results: Results
    checkpoints: list[SavedCheckpoint]
    trail: TrailRecord
    digest: str


# --------------------------------------------------------------------------------------------------------- other files


class SavedFile(TypedDict):
    """`files` of a manifest."""

    sha256: str
    size_bytes: int


class Link(TypedDict):
    """`before` of a manifest: the checkpoint that was saved before this one."""

    run_id: str
    name: str
    digest: str


class FileMark(TypedDict):
    """`history` of a manifest: what that file was when the checkpoint was saved."""

    sha256: str
    size_bytes: int


class TrailMark(FileMark):
    """`trail` of a manifest: the same, with the first step of the file and the steps that were lost before."""

    first: int
    missing: list[list[int]]


class Manifest(TypedDict, total=False):
    """A checkpoint's manifest.json. It grows while the checkpoint is written."""

    schema: str
    run_id: str
    step: int
    epoch: int
    batch: int
    metrics: dict[str, float]
    scores: dict[str, float]
    logs: dict[str, object]
    files: dict[str, SavedFile]
    weights_digest: str
    state_digest: str
    finished: bool
    before: Link | None
    trail: TrailMark | None
    history: FileMark | None
    digest: str


class TrailLine(TypedDict, total=False):
    """A line of trail.jsonl: one step."""

    step: int
    epoch: int
    loss: float | str | None
    batch: str | None
    gradients: str | None
    weights: str | None


class HistoryLine(TypedDict, total=False):
    """A line of history.jsonl: how a training went at one moment.

    Attributes:
        time: in seconds since the epoch.
        step: steps done.
        samples_per_s: of all devices.
        flops_per_s: floating-point operations of the model's forward and backward, of all devices. Absent in lines of
            earlier versions, as is the next one.
        peak_flops_per_s: of all devices, in the dtype that the precision computes in.
        memory_bytes: of the process.
        gpu_memory_bytes: of its GPU.
        lr: of each parameter group.
        metrics: that were logged, by name.
    """

    time: float
    step: int
    samples_per_s: float | None
    flops_per_s: float | None
    peak_flops_per_s: float | None
    memory_bytes: int
    gpu_memory_bytes: int | None
    lr: list[float]
    metrics: dict[str, float]
