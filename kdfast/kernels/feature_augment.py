"""Triton backend of the op ``feature_augment``: each part of a chain with at most one warp in one read and one write.

Around its warp a part may have a cutout on either side and noise after it. Two operations of different kinds make one part,
but for noise before a warp: its numbers at four taps a pixel would cost more than a pass. A longer chain is split where
it must be. Backward, where noise has no part, a pixel gathers from the pixels of the result that read it: those whose
source lies within one pixel, a window around where the inverse map takes it. No atomics.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..reference._common import accumulator
from ..reference.feature_augment import CHANNELS, CUTOUT, NOISE, WARP, Matrix
from ._launch import cdiv, next_power_of_2, on_device, options
from .feature_augment_passes import pointwise, warp, warp_adjoint

Box = tuple[int, int, int, int]
NOWHERE: Box = (0, 0, 0, 0)

# Of a tile of ``pointwise``: elements, pixels at most (channels at most where these lie side by side), warps. With noise,
# with four counters a value, and without.
COPY = (2048, 512, 4)
NOISY = (1024, 256, 4)
# Of ``warp`` and ``warp_adjoint``: channels, rows, columns, warps; how many tiles of channels one program takes at most,
# and how many programs that leaves at least. Channels last: another tile.
TAPS, TAPS_LAST = (16, 8, 8, 4), (64, 4, 4, 4)
WINDOW, WINDOW_LAST = (16, 8, 8, 4), (64, 4, 4, 4)
NOISY_TAPS, NOISY_TAPS_LAST = (16, 8, 8, 4), (32, 4, 8, 4)
STEPS, PROGRAMS = 4, 1056


class Part(NamedTuple):
    matrix: Matrix | None = None
    before: Box | None = None  # cut out before the warp
    after: Box | None = None
    deviation: float = 0.0  # of the noise, 0 for none
    key: tuple[int, int] = (0, 0)
    noise_last: bool = False  # after the cutout
    first: int = 0  # of the rows of channels
    moves: int = 0  # rows


def _signed(word: float) -> int:
    """The bits of 32-bit key ``word`` as an int32, so that all keys have one type."""
    return int(word) - (int(word) >> 31 << 32)


@lru_cache(maxsize=64)
def _parts(steps: tuple[tuple[float, ...], ...], noise: bool) -> tuple[Part, ...]:
    """The chain as parts, in order; without ``noise`` as it is backward."""
    parts: list[list] = [[]]
    for kind, *numbers in steps:
        if kind == NOISE and not noise:
            continue
        kinds = [k for k, *_ in parts[-1]]
        after = kinds[kinds.index(WARP) + 1 :] if WARP in kinds else kinds
        # Noise of a channel that is moved, or a pixel that is read elsewhere: its own part.
        if (
            (kind == WARP and (WARP in kinds or NOISE in kinds))
            or (kind == CHANNELS and NOISE in kinds)
            or (kind in (NOISE, CUTOUT) and kind in after)
        ):
            parts.append([])
        parts[-1].append((kind, *numbers))
    return tuple(map(_part, parts))


def _part(steps: list[tuple]) -> Part:
    part = Part()
    has_warp = any(kind == WARP for kind, *_ in steps)
    for kind, *n in steps:
        if kind == WARP:
            part = part._replace(matrix=tuple(n))
        elif kind == CUTOUT:
            side = "before" if has_warp and part.matrix is None else "after"
            part = part._replace(**{side: tuple(map(int, n[:4]))})
        elif kind == NOISE:
            key = _signed(n[1]), _signed(n[2])
            part = part._replace(deviation=n[0], key=key, noise_last=part.after is not None)
        else:
            part = part._replace(first=part.first if part.moves else int(n[0]), moves=part.moves + 1)
    return part


def _split(numbers: tuple[float, ...], wide: bool) -> tuple[float, ...]:
    """What float32 arguments can hold of numbers, and for float64 what is left of each."""
    if not wide:
        return numbers
    high = tuple(ctypes.c_float(n).value for n in numbers)
    return high + tuple(n - h for n, h in zip(numbers, high, strict=True))


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    b, c, h, w = x.stride()
    return b, c, h, h if x.shape[3] == 1 else w


def _is_flat(x: Tensor) -> bool:
    return 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)


def _is_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1


def channels_on_device(channels: Tensor, x: Tensor) -> Tensor:
    """The channels of a plan where ``x`` is; without any row they stay where they are, since none is read."""
    if not len(channels) or channels.device == x.device:
        return channels
    if not x.is_cuda:
        return channels.to(x.device)
    if torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "feature_augment: channels that are dropped or shuffled are drawn on the host, a CUDA graph would not draw again"
        )
    return channels.pin_memory().to(x.device, non_blocking=True)


class _Call:
    """One direction of one part, from ``x`` to ``out``."""

    def __init__(self, x: Tensor, out: Tensor, part: Part, table: Tensor) -> None:
        self.part, self.maps = part, (x, *_strides(x), out, *_strides(out))
        self.x, self.out, self.table = x, out, table
        self.batch, self.channels, self.height, self.width = x.shape
        self.last = _is_last(x) and _is_last(out)
        self.wide = accumulator(x) == torch.float64
        self.acc = tl.float64 if self.wide else tl.float32
        # float64 needs them all: the remainders follow.
        self.numbers = _split((part.deviation, *(part.matrix or (0.0,) * (6 * self.wide))), self.wide)

    def pointwise(self, scatter: bool) -> None:
        p, count = self.part, self.height * self.width
        noisy = p.deviation != 0 and not scatter
        elements, side, warps = NOISY if noisy else COPY
        elements //= 1 + self.wide
        channels, pixels = next_power_of_2(self.channels), max(4, next_power_of_2(count))
        if self.last:
            channels = min(channels, side)
            pixels = min(pixels, max(4, elements // channels))
        else:
            while pixels > side or (pixels > 64 and pixels - count % pixels > count // 8 and count % pixels):
                pixels //= 2
            channels = min(channels, elements // pixels)
        blocks, groups = cdiv(count, pixels), cdiv(self.channels, channels)
        pointwise[(self.batch * groups * blocks,)](
            *self.maps, self.table, self.channels, count, self.width, blocks, groups, p.first, self.numbers,
            *p.key, *(p.after or NOWHERE), p.moves, scatter, noisy, p.after is not None, p.noise_last,
            count % 4 == 0, _is_flat(self.x) and _is_flat(self.out), self.acc, channels, pixels, **options(warps),
        )  # fmt: skip

    def _tile(self, contiguous: tuple, last: tuple):
        """steps, channels, rows, columns; tiles side by side, in all; groups of channels, warps"""
        channels, rows, columns, warps = last if self.last else contiguous
        channels = max(1, min(channels, next_power_of_2(self.channels)) // (1 + self.wide))
        side, tiles = cdiv(self.width, columns), cdiv(self.height, rows)
        tiles *= side
        groups = cdiv(self.channels, channels)
        steps = 1
        while steps < min(STEPS, groups) and self.batch * tiles * groups >= 2 * steps * PROGRAMS:
            steps *= 2
        return (steps, channels, rows, columns), side, tiles, cdiv(groups, steps), warps

    def warp(self, scatter: bool) -> None:
        p = self.part
        noisy = p.deviation != 0 and not scatter
        tile, side, tiles, groups, warps = self._tile(
            *((NOISY_TAPS, NOISY_TAPS_LAST) if noisy else (TAPS, TAPS_LAST))
        )
        before, after, numbers = p.before, p.after, self.numbers
        if scatter:
            before, after = after, before
            m = p.matrix
            numbers = _split((0.0, *m[:2], -m[2], *m[3:5], -m[5]), self.wide)
        warp[(self.batch * groups * tiles,)](
            *self.maps, self.table, self.channels, self.height, self.width, side, tiles, groups, p.first, numbers,
            *(before or NOWHERE), *p.key, *(after or NOWHERE), p.moves, scatter, before is not None, noisy,
            after is not None, p.noise_last, self.width % 4 == 0, self.acc, *tile, **options(warps),
        )  # fmt: skip

    def warp_adjoint(self) -> None:
        p = self.part
        tile, side, tiles, groups, warps = self._tile(WINDOW, WINDOW_LAST)
        inverse, (wide, high) = _window(p.matrix, self.height, self.width)
        warp_adjoint[(self.batch * groups * tiles,)](
            *self.maps, self.table, self.channels, self.height, self.width, side, tiles, groups, p.first,
            self.numbers, inverse, *(p.before or NOWHERE), *(p.after or NOWHERE), p.moves, p.before is not None,
            p.after is not None, wide, high, self.acc, *tile, **options(warps),
        )  # fmt: skip

    def forward(self) -> None:
        self.pointwise(False) if self.part.matrix is None else self.warp(False)

    def backward(self) -> None:
        m = self.part.matrix
        if m is None:
            self.pointwise(True)
        elif (*m[:2], *m[3:5]) == (1, 0, 0, 1):
            self.warp(True)
        else:
            self.warp_adjoint()


def _run(x: Tensor, parts: tuple[Part, ...], channels: Tensor, direction) -> Tensor:
    out = torch.empty_like(x)
    if not out.numel():
        return out
    with on_device(x):
        table = channels_on_device(channels, x) if len(channels) else x  # then not read
        for n, part in enumerate(parts):
            # All but the last part keep what the next reads in the type that sums run in.
            to = out if n == len(parts) - 1 else torch.empty_like(x, dtype=accumulator(x))
            direction(_Call(x, to, part, table))
            x = to
    return out


def _steps(steps: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, steps.tolist()))


def feature_augment(x: Tensor, steps: Tensor, channels: Tensor) -> Tensor:
    """Implementation of ``kdfast::feature_augment_triton``; the reference says what it computes."""
    return _run(x, _parts(_steps(steps), True), channels, _Call.forward)


def feature_augment_backward(grad: Tensor, steps: Tensor, channels: Tensor) -> Tensor:
    """Implementation of ``kdfast::feature_augment_backward_triton``."""
    return _run(grad, _parts(_steps(steps), False)[::-1], channels, _Call.backward)


def _window(matrix: Matrix, height: int, width: int) -> tuple[tuple[float, ...], tuple[int, int]]:
    """The inverse of the matrix, how far before the point that it leads to a window starts, and its sides along x and y.

    The pixels that read one lie within the inverse's reach of that point, here by as much more as float32 may be wrong.
    """
    a, b, c, d, e, f = matrix
    determinant = a * e - b * d
    if abs(determinant) < 1e-3:
        raise NotImplementedError(f"feature_augment: the chain's affine map is almost singular: {matrix}")
    inverse = (e / determinant, -b / determinant, -d / determinant, a / determinant)
    reach = abs(inverse[0]) + abs(inverse[1]), abs(inverse[2]) + abs(inverse[3])
    reach = tuple(r * (1 + 1e-6 * (height + width + abs(c) + abs(f))) for r in reach)
    return (*inverse, *reach), tuple(math.floor(2 * r) + 1 for r in reach)
