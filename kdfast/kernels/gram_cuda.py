"""What the CUDA C++ kernels of the op ``gram`` take: small inputs, where launches cost more than arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.gram import COMPARISONS

# csrc/cuda/gram_op.cpp checks the same limits. Beyond them Triton's tiles, or the matrix units, are worth a launch.
MAX_GROUPS, MAX_ROWS, MAX_ELEMENTS = 64, 1024, 1 << 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(x: Tensor, y: Tensor, compare: int, cosine: bool, feature_side: bool) -> str | None:
    """Why the CUDA kernels cannot take these views [G, R1, R2, F1, F2, F3], or None when they can."""
    if COMPARISONS[compare] != "cka" or cosine or feature_side:
        return "it computes compare='cka' on the Gram side, without cosine"
    if x.dtype != y.dtype or x.dtype not in DTYPES:
        return f"it needs x and y of one type, float32, float16 or bfloat16, got {x.dtype} and {y.dtype}"
    groups, rows = x.shape[0], x.shape[1] * x.shape[2]
    elements = max(x.numel(), y.numel())
    if min(x.numel(), y.numel()) == 0:
        return "it needs views with elements"
    if groups > MAX_GROUPS or rows > MAX_ROWS or elements > MAX_ELEMENTS:
        return (
            f"it is for at most {MAX_GROUPS} groups, {MAX_ROWS} rows and {MAX_ELEMENTS} elements,"
            f" got {groups} groups of {rows} rows and {elements} elements"
        )
    for name, v in (("x", x), ("y", y)):
        for what, axes in (("rows", (2, 1)), ("features", (5, 4, 3))):
            if not _evenly_spaced(v, axes):
                return f"the {what} of {name} are not evenly spaced in memory"
    return None


def _evenly_spaced(v: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether the axes, innermost first, are one axis with one stride."""
    expected = None
    for axis in axes:
        size, stride = v.shape[axis], v.stride(axis)
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return False
        expected = size * stride
    return True
