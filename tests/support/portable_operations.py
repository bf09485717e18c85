"""Prints a digest a line for many operations in portable mode: run natively and under an emulated older CPU, compared.

Run by test_portable.py in a process whose environment holds the portable variables.
"""

import hashlib
import warnings

import numpy as np
import torch
from torch import nn

from labtrain.exact import determinism

determinism.apply("portable", threads=1)
functional = nn.functional
draw = torch.Generator().manual_seed(0)

UNIT = ["sqrt", "rsqrt", "log", "log2", "log10", "log1p", "asin", "acos", "erfinv", "lgamma", "digamma"]
REAL = [
    "exp",
    "exp2",
    "expm1",
    "sin",
    "cos",
    "tan",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "sigmoid",
    "erf",
    "erfc",
    "reciprocal",
    "square",
]
ACTIVATIONS = ["gelu", "silu", "softplus", "mish", "elu", "selu", "logsigmoid", "hardswish"]


def show(name: str, *tensors: torch.Tensor) -> None:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(
            tensor.detach().float().contiguous().numpy().tobytes()
            if tensor.dtype == torch.bfloat16
            else tensor.detach().contiguous().numpy().tobytes()
        )
    print(name, sha.hexdigest()[:16])


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


for dtype in (torch.float32, torch.float64):
    unit = torch.rand(100_001, generator=draw, dtype=dtype) * 0.98 + 0.01
    real = torch.randn(100_001, generator=draw, dtype=dtype) * 5
    for name in UNIT + REAL:
        show(f"{dtype} {name}", getattr(torch, name)(unit if name in UNIT else real))
    for name in ACTIVATIONS:
        show(f"{dtype} {name}", getattr(functional, name)(real))
    for exponent in (0.5, -0.5, 1.7, 2, 3, -1, -2):
        show(f"{dtype} ** {exponent}", unit**exponent)
    rows = real[:1000].view(10, 100)
    show(
        f"{dtype} reductions",
        rows.softmax(1),
        rows.logsumexp(1),
        rows.std(1),
        rows.norm(),
        rows.cumsum(1),
        functional.layer_norm(rows, (100,)),
    )
    show(f"{dtype} products", rows @ rows.T, torch.einsum("ij,kj->ik", rows, rows), rows @ rows[0])
    show(
        f"{dtype} random",
        torch.randn(1000, generator=draw, dtype=dtype),
        torch.empty(1000, dtype=dtype).exponential_(generator=draw),
    )

torch.manual_seed(0)
for autocast in (False, True):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        convolutions = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2),
            nn.GroupNorm(4, 64),
            nn.Conv2d(64, 64, 3, groups=64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 7),
        )
        scores = convolutions(torch.randn(18, 3, 17, 19))
        functional.cross_entropy(scores.float(), torch.arange(18) % 7).backward()
        show(f"convolutions, autocast {autocast}", scores, *gradients(convolutions))
        transformer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
        out = transformer(torch.randn(16, 20, 64))
        out.float().square().mean().backward()
        show(f"transformer, autocast {autocast}", out, *gradients(transformer))
        for kind in (nn.LSTM, nn.GRU):
            recurrent = kind(32, 48, 2, batch_first=True)
            out = recurrent(torch.randn(8, 12, 32))[0]
            out.float().square().mean().backward()
            show(f"{kind.__name__}, autocast {autocast}", out, *gradients(recurrent))

UNFUSED = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta"]
FUSED = ["SGD", "Adam", "AdamW", "Adagrad"]
for name, options in [(name, {}) for name in UNFUSED] + [(name, {"fused": True}) for name in FUSED]:
    module = nn.Linear(40, 41)
    optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.01, **options)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(5, 40)).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
    show(f"optimizer {name}, {options}", module.weight, module.bias)

# Libraries have kernels of their own for small matrices: each size of 2 to 16, and some that are cut into blocks.
SIZES = (*range(2, 17), 20, 24, 33, 48, 65, 100)


def linear_algebra(size: int, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Return what each operation of torch.linalg, and what is like it, makes of matrices of one size."""
    linalg, seeded = torch.linalg, torch.Generator().manual_seed(size)
    square, right = (torch.randn(size, width, generator=seeded, dtype=dtype) for width in (size, 3))
    tall, more = (torch.randn(size + 3, width, generator=seeded, dtype=dtype) for width in (size, 2))
    array = square.numpy()
    definite = torch.from_numpy(array @ array.conj().T) + size * torch.eye(size, dtype=dtype)
    low = torch.tril(square) + 2 * torch.eye(size, dtype=dtype)
    several = definite.expand(3, size, size).clone()
    found = {
        "cholesky": linalg.cholesky(definite),
        "cholesky, upper": linalg.cholesky(definite, upper=True),
        "cholesky, several": linalg.cholesky(several),
        "torch.cholesky": torch.cholesky(definite),
        "cholesky_solve": torch.cholesky_solve(right, low),
        "cholesky_inverse": torch.cholesky_inverse(low),
        "qr": linalg.qr(tall),
        "householder_product": linalg.householder_product(*torch.geqrf(tall)),
        "svd": linalg.svd(square),
        "svdvals": linalg.svdvals(square),
        "eigh": linalg.eigh(definite),
        "eigvalsh": linalg.eigvalsh(definite),
        "eig": linalg.eig(square),
        "eigvals": linalg.eigvals(square),
        "inv": linalg.inv(square),
        "solve": linalg.solve(square, right),
        "lu_factor": linalg.lu_factor(square)[0],
        "lu_solve": linalg.lu_solve(*linalg.lu_factor(square), right),
        "det": linalg.det(square),
        "slogdet": linalg.slogdet(square),
        "solve_triangular": linalg.solve_triangular(low, right, upper=False),
        "solve_triangular, upper": linalg.solve_triangular(low.T.contiguous(), right, upper=True),
        "lstsq": linalg.lstsq(tall, more).solution,
        "pinv": linalg.pinv(square),
        "ldl_factor": linalg.ldl_factor(definite)[0],
        "ldl_solve": linalg.ldl_solve(*linalg.ldl_factor(definite), right),
        "matrix_exp": linalg.matrix_exp(square),
        "matrix_norm": linalg.matrix_norm(square, 2),
        "vector_norm": linalg.vector_norm(square),
        "products": [square @ square, square @ square[0], torch.dot(square[0], square[1]), several @ several],
    }
    return {name: [part] if isinstance(part, torch.Tensor) else list(part) for name, part in found.items()}


warnings.filterwarnings("ignore", message="torch.cholesky is deprecated")
for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
    by_name: dict[str, list[torch.Tensor]] = {}
    for size in SIZES:
        for name, parts in linear_algebra(size, dtype).items():
            by_name.setdefault(name, []).extend(parts)
    for name, parts in by_name.items():
        show(f"{dtype} {name}", *parts)
array = np.random.RandomState(0).rand(1000).astype(np.float32)
show(
    "numpy", *(torch.from_numpy(function(array)) for function in (np.exp, np.log, np.sin, np.tanh, np.sqrt, np.arctan))
)
show("numpy product", torch.from_numpy(array.reshape(10, 100) @ array.reshape(100, 10)))
