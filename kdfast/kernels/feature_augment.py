"""Triton backend of the op ``feature_augment``: each part of a chain with at most one warp in one read and one write.

Around its warp a part may have noise and a cutout on either side; before the warp they are applied to every tap, which
noise from a counter allows. Two operations of different kinds always make one part; a longer chain is split where it must
be. Backward, a pixel gathers from the pixels of the result that read it: those whose source lies within one pixel, a
window around where the inverse map takes it. No atomics.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference._common import accumulator
from ..reference.feature_augment import CHANNELS, CUTOUT, NOISE, WARP
from ._launch import on_device, options

BLOCK = 256  # pixels of one channel: noise at four taps spills registers with more


class Side(NamedTuple):
    """What is done to single pixels on one side of the warp, in order of appearance."""

    deviation: float = 0.0
    low: int = 0
    high: int = 0
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    noise: bool = False
    cut: bool = False
    noise_last: bool = False


class Part(NamedTuple):
    before: Side
    matrix: tuple[float, ...] | None
    after: Side
    channels: Tensor | None  # int32 [C]: the channel that each one reads, -1 for none; None: its own


# Every draw has other numbers: a kernel for each that is 1 or a multiple of 16 would be compiled during training.
KEYS = [f"{side}_{word}" for side in "ba" for word in ("low", "high")]
BOXES = [f"{side}_{edge}" for side in "ba" for edge in ("top", "left", "bottom", "right")]


def _signed(word: float) -> int:
    """The bits of 32-bit key ``word`` as an int32, so that all keys have one type."""
    return int(word) - (int(word) >> 31 << 32)


def _parts(steps: Tensor, channels: Tensor) -> list[Part]:
    """The chain as parts; channels keep their order of events by a table for each part."""
    parts: list[list] = [[]]
    for kind, *numbers in steps.tolist():
        kinds = [k for k, *_ in parts[-1]]
        after = kinds[kinds.index(WARP) + 1 :] if WARP in kinds else kinds
        if (kind == WARP and WARP in kinds) or (kind in (NOISE, CUTOUT) and kind in after):
            parts.append([])
        elif kind == CHANNELS and (NOISE in kinds):
            parts.append([])  # noise of a channel that is dropped or moved later: its own part
        parts[-1].append((kind, *numbers))
    return [_part(part, channels) for part in parts]


def _part(steps: list[tuple], channels: Tensor) -> Part:
    count = channels.shape[1]
    source = None
    sides, matrix = [Side(), Side()], None
    has_warp = any(kind == WARP for kind, *_ in steps)
    place = 0 if has_warp else 1
    for kind, *n in steps:
        if kind == WARP:
            matrix, place = tuple(n), 1
        elif kind == CUTOUT:
            sides[place] = sides[place]._replace(box=tuple(map(int, n[:4])), cut=True)
        elif kind == NOISE:
            last = sides[place].cut
            sides[place] = sides[place]._replace(
                deviation=n[0], low=_signed(n[1]), high=_signed(n[2]), noise=True, noise_last=last
            )
        else:
            row = channels[int(n[0])]
            source = torch.arange(count, dtype=torch.int32) if source is None else source
            source = torch.where(row >= 0, source[row.clamp_min(0).long()], -1)
    return Part(sides[0], matrix, sides[1], source)


@triton.jit
def _multiply(factor: tl.constexpr, word):
    product = word.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _normal(place, low, high):
    """Numbers of the reference: Philox 4x32-10 at place // 4, Box-Muller, the one of the four that is asked for."""
    counter = place // 4
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    k0, k1 = low.to(tl.uint32), high.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    lane = place % 4
    u = ((tl.where(lane < 2, c0, c2) >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-8
    v = ((tl.where(lane < 2, c1, c3) >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-8
    # A quarter turn earlier the cosine is the sine; sines and cosines of small angles are exact enough.
    angle = 6.283185307179586 * (v - 0.5)
    wave = tl.where(lane % 2 == 0, tl.cos(angle), tl.sin(angle))
    return -tl.sqrt(-2.0 * tl.log(u)) * wave


@triton.jit
def _pixel(
    value, place, y, x, deviation, low, high, top, left, bottom, right,
    NOISE: tl.constexpr, CUT: tl.constexpr, NOISE_LAST: tl.constexpr,
):  # fmt: skip
    if NOISE and not NOISE_LAST:
        value += (deviation * _normal(place, low, high)).to(value.dtype)
    if CUT:
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        value = tl.where(inside, 0.0, value)
    if NOISE and NOISE_LAST:
        value += (deviation * _normal(place, low, high)).to(value.dtype)
    return value


@triton.jit(do_not_specialize=KEYS + BOXES)
def forward(
    x_ptr, x_b, x_c, x_h, x_w, out_ptr, out_b, out_c, out_h, out_w, source_ptr, channels, height, width,
    m0, m1, m2, m3, m4, m5,
    b_deviation, b_low, b_high, b_top, b_left, b_bottom, b_right,
    a_deviation, a_low, a_high, a_top, a_left, a_bottom, a_right,
    MOVES: tl.constexpr, WARPS: tl.constexpr, B_NOISE: tl.constexpr, B_CUT: tl.constexpr, B_LAST: tl.constexpr,
    A_NOISE: tl.constexpr, A_CUT: tl.constexpr, A_LAST: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    image, channel = plane // channels, plane % channels
    source = tl.load(source_ptr + channel).to(tl.int64) if MOVES else channel
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = pixel < height * width
    i, j = pixel // width, pixel % width
    shown = source + pixel * 0 >= 0
    x_ptr += image * x_b + tl.maximum(source, 0) * x_c
    base = (image * channels + channel) * height * width
    if WARPS:
        cx, cy = (width - 1) * 0.5, (height - 1) * 0.5
        u = m0 * (j - cx) + m1 * (i - cy) + m2 + cx
        v = m3 * (j - cx) + m4 * (i - cy) + m5 + cy
        u, v = tl.minimum(tl.maximum(u, -2.0), width + 1.0), tl.minimum(tl.maximum(v, -2.0), height + 1.0)
        u0, v0 = tl.floor(u), tl.floor(v)
        value = tl.zeros([BLOCK], ACC)
        for k in tl.static_range(4):
            wx = u - u0 if k % 2 == 1 else 1 - (u - u0)
            wy = v - v0 if k // 2 == 1 else 1 - (v - v0)
            col, row = u0.to(tl.int32) + k % 2, v0.to(tl.int32) + k // 2
            inside = ok & (col >= 0) & (col < width) & (row >= 0) & (row < height)
            address = x_ptr + row.to(tl.int64) * x_h + col.to(tl.int64) * x_w
            tap = tl.load(address, inside & shown, other=0.0).to(ACC)
            tap = _pixel(
                tap, base + row * width + col, row, col, b_deviation, b_low, b_high, b_top, b_left, b_bottom,
                b_right, B_NOISE, B_CUT, B_LAST,
            )  # fmt: skip
            value += tl.where(inside, tap * (wx * wy).to(ACC), 0.0)
    else:
        value = tl.load(x_ptr + i.to(tl.int64) * x_h + j.to(tl.int64) * x_w, ok & shown, other=0.0).to(ACC)
    value = _pixel(
        value,
        base + pixel,
        i,
        j,
        a_deviation,
        a_low,
        a_high,
        a_top,
        a_left,
        a_bottom,
        a_right,
        A_NOISE,
        A_CUT,
        A_LAST,
    )
    out_ptr += image * out_b + channel * out_c
    tl.store(out_ptr + i.to(tl.int64) * out_h + j.to(tl.int64) * out_w, value, ok)


@triton.jit(do_not_specialize=BOXES)
def backward(
    g_ptr, g_b, g_c, g_h, g_w, to_ptr, to_b, to_c, to_h, to_w, shown_ptr, channels, height, width,
    m0, m1, m2, m3, m4, m5, n0, n1, n3, n4, reach_x, reach_y,
    b_top, b_left, b_bottom, b_right, a_top, a_left, a_bottom, a_right,
    MOVES: tl.constexpr, WARPS: tl.constexpr, B_CUT: tl.constexpr, A_CUT: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``n``: the inverse of the matrix; a window starts ``reach`` before the point that the inverse map leads to."""
    plane = tl.program_id(0).to(tl.int64)
    image, channel = plane // channels, plane % channels
    result = tl.load(shown_ptr + channel).to(tl.int64) if MOVES else channel
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shown = result + pixel * 0 >= 0
    ok = pixel < height * width
    i, j = pixel // width, pixel % width
    g_ptr += image * g_b + tl.maximum(result, 0) * g_c
    value = tl.zeros([BLOCK], ACC)
    if WARPS:
        cx, cy = (width - 1) * 0.5, (height - 1) * 0.5
        dx, dy = j - cx - m2, i - cy - m5
        first_col = tl.ceil(tl.minimum(tl.maximum(n0 * dx + n1 * dy + cx - reach_x, -9.0), width + 1.0)).to(
            tl.int32
        )
        first_row = tl.ceil(tl.minimum(tl.maximum(n3 * dx + n4 * dy + cy - reach_y, -9.0), height + 1.0)).to(
            tl.int32
        )
        for k in range(WINDOW * WINDOW):
            col, row = first_col + k % WINDOW, first_row + k // WINDOW
            inside = ok & shown & (col >= 0) & (col < width) & (row >= 0) & (row < height)
            u = m0 * (col - cx) + m1 * (row - cy) + m2 + cx - j
            v = m3 * (col - cx) + m4 * (row - cy) + m5 + cy - i
            weight = tl.maximum(1 - tl.abs(u), 0.0) * tl.maximum(1 - tl.abs(v), 0.0)
            if A_CUT:
                inside = inside & ((row < a_top) | (row >= a_bottom) | (col < a_left) | (col >= a_right))
            address = g_ptr + row.to(tl.int64) * g_h + col.to(tl.int64) * g_w
            value += tl.load(address, inside & (weight > 0), other=0.0).to(ACC) * weight.to(ACC)
    else:
        inside = ok & shown
        if A_CUT:
            inside = inside & ((i < a_top) | (i >= a_bottom) | (j < a_left) | (j >= a_right))
        value = tl.load(g_ptr + i.to(tl.int64) * g_h + j.to(tl.int64) * g_w, inside, other=0.0).to(ACC)
    if B_CUT:
        value = tl.where((i >= b_top) & (i < b_bottom) & (j >= b_left) & (j < b_right), 0.0, value)
    to_ptr += image * to_b + channel * to_c
    tl.store(to_ptr + i.to(tl.int64) * to_h + j.to(tl.int64) * to_w, value, ok)


def _grid(pixels: int, planes: int) -> tuple[int, int]:
    return planes, triton.cdiv(pixels, BLOCK)  # the second axis ends at 65,535


def _readers(channels: Tensor | None) -> Tensor | None:
    """Which channel of the result reads each one, -1 for none."""
    if channels is None:
        return None
    shown, read = torch.full_like(channels, -1), channels >= 0
    shown[channels[read].long()] = torch.arange(len(channels), dtype=torch.int32)[read]
    return shown


def _on_device(channels: Tensor | None, x: Tensor) -> Tensor:
    if channels is None:
        return x  # not read
    if not x.is_cuda:
        return channels.to(x.device)
    if torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "feature_augment: channels that are dropped or shuffled are drawn on the host, a CUDA graph would not draw again"
        )
    return channels.pin_memory().to(x.device, non_blocking=True)


def _acc(x: Tensor) -> tl.dtype:
    return tl.float64 if accumulator(x) == torch.float64 else tl.float32


def feature_augment(x: Tensor, steps: Tensor, channels: Tensor) -> Tensor:
    """Implementation of ``kdfast::feature_augment_triton``; the reference says what it computes."""
    batch, count, height, width = x.shape
    out = torch.empty_like(x)
    if not out.numel():
        return out
    grid = _grid(height * width, batch * count)
    parts = _parts(steps, channels)
    with on_device(x):
        for n, part in enumerate(parts):
            # All but the last part keep what the next reads in the type that sums run in.
            to = out if n == len(parts) - 1 else torch.empty_like(x, dtype=accumulator(x))
            matrix = part.matrix or (0.0,) * 6
            b, a = part.before, part.after
            forward[grid](
                x, *x.stride(), to, *to.stride(), _on_device(part.channels, x), count, height, width, *matrix,
                b.deviation, b.low, b.high, *b.box, a.deviation, a.low, a.high, *a.box,
                part.channels is not None, part.matrix is not None,
                b.noise, b.cut, b.noise_last, a.noise, a.cut, a.noise_last, _acc(to), BLOCK,
                **options(4),
            )  # fmt: skip
            x = to
    return out


def feature_augment_backward(grad: Tensor, steps: Tensor, channels: Tensor) -> Tensor:
    """Implementation of ``kdfast::feature_augment_backward_triton``."""
    batch, count, height, width = grad.shape
    found = torch.empty_like(grad)
    if not found.numel():
        return found
    grid = _grid(height * width, batch * count)
    parts = _parts(steps, channels)[::-1]
    with on_device(grad):
        for n, part in enumerate(parts):
            to = found if n == len(parts) - 1 else torch.empty_like(grad, dtype=accumulator(grad))
            matrix, inverse, reach, window = part.matrix or (0.0,) * 6, (0.0,) * 4, (0.0, 0.0), 1
            if part.matrix is not None:
                inverse, reach, window = _window(part.matrix)
            backward[grid](
                grad, *grad.stride(), to, *to.stride(), _on_device(_readers(part.channels), grad), count, height, width,
                *matrix, *inverse, *reach, *part.before.box, *part.after.box,
                part.channels is not None, part.matrix is not None, part.before.cut, part.after.cut,
                window, _acc(to), BLOCK, **options(4),
            )  # fmt: skip
            grad = to
    return found


def _window(matrix: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, float], int]:
    """The inverse, how far from its image the pixels that read one can lie, and how many there can be along a side."""
    a, b, _, d, e, _ = matrix
    determinant = a * e - b * d
    if abs(determinant) < 1e-3:
        raise NotImplementedError(f"feature_augment: the chain's affine map is almost singular: {matrix}")
    inverse = (e / determinant, -b / determinant, -d / determinant, a / determinant)
    reach = abs(inverse[0]) + abs(inverse[1]), abs(inverse[2]) + abs(inverse[3])
    return inverse, reach, math.floor(2 * max(reach)) + 1
