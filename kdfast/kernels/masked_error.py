"""Triton backend of the ops ``masked_error`` and ``area_mask``.

Launches: mask 1; error 2 (sums of blocks, their sum), with the student's gradient in the same pass where it alone learns;
backward 1. Each map is read once and the gradient written once: 12 bytes an element in float32, at 8 operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference._common import accumulator
from ._jit import jit
from ._launch import cdiv, next_power_of_2, on_device, options

ELEMENTS, WARPS = 2048, 4  # of a tile: 16 of each map in a thread
PIXELS = 256  # of a tile at most, where pixels lie side by side; channels_last: so many channels
PARTS = 4096  # sums that the last program adds at most: larger maps have several tiles in a program
FINISH_BLOCK, FINISH_WARPS = 4096, 8
SCALE_BLOCK, SCALE_WARPS = 4096, 4
MASK_BLOCK, BOXES = 256, 16  # pixels of a program, boxes at a time


@triton.jit
def _offsets(pixels, width, row, pixel, FLAT: tl.constexpr):
    if FLAT:
        return pixels.to(tl.int64) * pixel
    else:
        return (pixels // width).to(tl.int64) * row + (pixels % width).to(tl.int64) * pixel


@jit(do_not_specialize=["numel"])
def errors(
    x, y, mask, grad, out, parts, numel, channels, count, width, blocks, groups,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, out_b, out_c, out_h, out_w,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, SCALED: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """VALUE: parts[program] = sum of mask (x - y)²; GRADIENT: out = 2 mask (x - y) / numel, times grad if SCALED.

    A program has PIXELS of one image and STEPS times CHANNELS of their channels.
    """
    program = tl.program_id(0)
    group = program // blocks
    image = (group // groups).to(tl.int64)
    pixels = program % blocks * PIXELS + tl.arange(0, PIXELS)
    inside = pixels < count
    weight = tl.load(mask + image * count + pixels, inside, other=0.0).to(ACC)
    factor = 2 / (tl.zeros([], ACC) + numel)
    if SCALED:
        factor *= tl.load(grad).to(ACC)
    slope = weight * factor
    x += image * x_b + _offsets(pixels, width, x_h, x_w, FLAT)[None, :]
    y += image * y_b + _offsets(pixels, width, y_h, y_w, FLAT)[None, :]
    out += image * out_b + _offsets(pixels, width, out_h, out_w, FLAT)[None, :]
    total = tl.zeros([CHANNELS, PIXELS], ACC)
    for step in range(STEPS):
        channel = (group % groups * STEPS + step) * CHANNELS + tl.arange(0, CHANNELS)
        ok = (channel < channels)[:, None] & inside[None, :]
        channel = channel.to(tl.int64)[:, None]
        d = tl.load(x + channel * x_c, ok, other=0.0).to(ACC)
        d -= tl.load(y + channel * y_c, ok, other=0.0).to(ACC)
        if VALUE:
            total += d * d
        if GRADIENT:
            tl.store(out + channel * out_c, (slope[None, :] * d).to(out.dtype.element_ty), ok)
    if VALUE:
        tl.store(parts + program, tl.sum(total * weight[None, :]))


@jit(do_not_specialize=["numel"])
def finish(parts, value, programs, numel, ACC: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, programs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(parts + index, index < programs, other=0.0)
    tl.store(value, tl.sum(total, 0) / (tl.zeros([], ACC) + numel))


@jit
def scale_in_place(gradient, grad, numel, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Reads nothing but ``grad`` where that is 1, as it is for the loss that a step ends with."""
    factor = tl.load(grad).to(ACC)
    if factor != 1:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + index, index < numel, other=0.0).to(ACC)
        tl.store(gradient + index, (value * factor).to(gradient.dtype.element_ty), index < numel)


@jit
def count_boxes(
    boxes, out, number, height, width, KIND: tl.constexpr, BOXES: tl.constexpr, BLOCK: tl.constexpr
):
    """KIND: place in MULTIPLICITIES. Grid: (B, pixel blocks)."""
    image, pixel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = (pixel // width)[None, :], (pixel % width)[None, :]
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, number, BOXES):
        index = start + tl.arange(0, BOXES)
        box, known = boxes + (image * number + index) * 4, index < number
        x1, y1 = tl.load(box, known, other=0)[:, None], tl.load(box + 1, known, other=0)[:, None]
        x2, y2 = tl.load(box + 2, known, other=-1)[:, None], tl.load(box + 3, known, other=-1)[:, None]
        over = (column >= x1) & (column <= x2) & (row >= y1) & (row <= y2)
        count += tl.sum(over.to(tl.int32), 0)
    value = count.to(tl.float32)
    if KIND == 1:
        value = value * value
    elif KIND == 2:
        value = tl.where(count > 0, 1.0, 0.0)
    tl.store(out + image * height * width + pixel, value, pixel < height * width)


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    b, c, h, w = x.stride()
    return b, c, h, h if x.shape[3] == 1 else w


def _is_flat(x: Tensor) -> bool:
    return 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)


def _tile(x: Tensor, wide: bool) -> tuple[int, int]:
    """Channels and pixels of a tile."""
    elements = ELEMENTS // (1 + wide)
    channels, pixels = (next_power_of_2(n) for n in (x.shape[1], x.shape[2] * x.shape[3]))
    if x.stride(1) == 1 and pixels > 1:
        channels = min(channels, PIXELS)
        return channels, min(pixels, elements // channels)
    pixels = min(pixels, PIXELS)
    return min(channels, elements // pixels), pixels


def _run(x: Tensor, y: Tensor, mask: Tensor, grad: Tensor | None, value: bool, gradient: bool):
    """The mean error, or None, and its gradient for x, or None."""
    dtype = accumulator(x, y)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    batch, channels, height, width = x.shape
    out = torch.empty_like(x) if gradient else x
    found = x.new_empty((), dtype=dtype) if value else None
    if not x.numel():
        return found.zero_() if value else None, out
    ch, px = _tile(x, dtype == torch.float64)
    blocks, tiles = cdiv(height * width, px), cdiv(channels, ch)
    steps = min(next_power_of_2(cdiv(batch * blocks * tiles, PARTS)), next_power_of_2(tiles))
    groups = cdiv(tiles, steps)
    programs = batch * groups * blocks
    parts = x.new_empty(programs, dtype=dtype) if value else x
    with on_device(x):
        errors[(programs,)](
            x, y, mask, x if grad is None else grad, out, parts, x.numel(), channels, height * width, width, blocks,
            groups, *_strides(x), *_strides(y), *_strides(out), value, gradient, grad is not None,
            _is_flat(x) and _is_flat(y) and _is_flat(out), acc, steps, ch, px, **options(WARPS),
        )  # fmt: skip
        if value:
            block = min(FINISH_BLOCK, next_power_of_2(max(programs, 128)))
            finish[(1,)](parts, found, programs, x.numel(), acc, block, num_warps=FINISH_WARPS)
    return found, out


def masked_error(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Implementation of ``kdfast::masked_error_triton``; the reference says what it computes."""
    return _run(x, y, mask.contiguous(), None, True, False)[0]


def masked_error_with_gradient(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Implementation of ``kdfast::masked_error_with_gradient_triton``."""
    return _run(x, y, mask.contiguous(), None, True, True)


def masked_error_backward(x: Tensor, y: Tensor, mask: Tensor, grad: Tensor) -> Tensor:
    """Implementation of ``kdfast::masked_error_backward_triton``."""
    return _run(x, y, mask.contiguous(), grad, False, True)[1]


def scale(gradient: Tensor, grad: Tensor) -> Tensor:
    """``gradient``, a dense tensor, times a scalar, in place."""
    if gradient.numel():
        acc = tl.float64 if accumulator(gradient) == torch.float64 else tl.float32
        with on_device(gradient):
            scale_in_place[(cdiv(gradient.numel(), SCALE_BLOCK),)](
                gradient, grad, gradient.numel(), acc, SCALE_BLOCK, num_warps=SCALE_WARPS
            )
    return gradient


def area_mask(boxes: Tensor, height: int, width: int, multiplicity: int) -> Tensor:
    """Implementation of ``kdfast::area_mask_triton``."""
    batch, number, _ = boxes.shape
    out = boxes.new_empty((batch, 1, height, width), dtype=torch.float32)
    if out.numel():
        block = min(MASK_BLOCK, next_power_of_2(height * width))
        with on_device(boxes):
            count_boxes[(batch, cdiv(height * width, block))](
                boxes.contiguous(), out, number, height, width, multiplicity,
                min(BOXES, next_power_of_2(max(number, 1))), block, num_warps=4,
            )  # fmt: skip
    return out
