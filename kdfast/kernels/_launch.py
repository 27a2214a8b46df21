"""What Triton launches need here: views passed by stride, the precision of products, the device's context."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MOST_SHAPES = 4096  # that are kept, of those that a process sees
_NOTHING = nullcontext()


class View(NamedTuple):
    """Matrices inside a tensor, read or written in place: a group axis, three row axes, three column axes.

    Row r is (r // (r2 r3), r // r3 % r2, r % r3), likewise for columns. Strides count elements and may be 0.
    """

    data: Tensor
    group: int
    r2: int
    r3: int
    row1: int
    row2: int
    row3: int
    c2: int
    c3: int
    col1: int
    col2: int
    col3: int

    @property
    def flat(self) -> bool:
        """Whether columns lie along one stride, so that they need no division."""
        return self.col1 == 0 and self.col2 == 0

    @property
    def T(self) -> View:
        rows, cols = self[2:7], self[7:12]
        return View(self.data, self.group, *cols, *rows)


def view(v: Tensor, columns: tuple[int, ...] = (3, 4, 5)) -> View:
    """[G, R1, R2, F1, F2, F3] as G matrices [R1*R2, F1*F2*F3], the feature axes in this order."""
    return View(v, *_strides(v.shape, v.stride(), columns))


@lru_cache(MOST_SHAPES)
def _strides(sizes: tuple[int, ...], strides: tuple[int, ...], columns: tuple[int, ...]) -> tuple[int, ...]:
    found = [strides[0]]
    for axes in ((1, 2), columns):
        of = joined(tuple(sizes[i] for i in axes), tuple(strides[i] for i in axes))
        (_, s1), (n2, s2), (n3, s3) = ((1, 0),) * (3 - len(of)) + of
        found += [n2, n3, s1, s2, s3]
    return tuple(found)


@lru_cache(MOST_SHAPES)
def joined(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(size, stride) of axes, outermost first; those that lie along one stride are one, those of size 1 are left out."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return tuple(axes)


def precision(*dtypes: torch.dtype) -> str:
    """``input_precision`` of a product of float32 tiles that were loaded as ``dtypes``.

    Follows ``torch.get_float32_matmul_precision()`` where a float32 tensor takes part. What is loaded as
    float16 or bfloat16 carries at most the 11 significant bits of TF32, and its gradient is stored in as few:
    those use TF32.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if torch.float64 in dtypes or (torch.float32 in dtypes and exact) else "tf32"


def cdiv(a: int, b: int) -> int:
    """Triton's own is made for kernels too, and takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0


def options(warps: int, stages: int = 2, keep: bool = True) -> dict[str, int]:
    """Compiler options of a launch.

    Left alone, ptxas may spill a few registers so that more programs fit a multiprocessor; ``keep`` names the
    largest number of registers, which stops that. Without it ptxas schedules unrolled code less greedily.
    """
    registers = {"maxnreg": 255} if keep and torch.version.hip is None else {}
    return {"num_warps": warps, "num_stages": stages, **registers}


def on_device(v: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    if not v.is_cuda or v.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(v.device)


def capability(v: Tensor) -> int:
    """Of the device's tensor cores; from 9 on they read operands from shared memory."""
    return _capability(v.get_device()) if v.is_cuda else 9


@cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]
