"""Triton backend of the op ``attention_mask``.

Launches: forward 5 (pool, a sum over blocks, masks, errors, finish), backward 1. Each reads and writes what the
formula needs once: pool both maps, errors both maps, backward both maps and one gradient; maps of one channel
come beside. A program holds a block of pixels of one image and walks over the channels, so that sums over
channels are final and sums over pixels leave C numbers per block, added in a fixed order. Maps are read in place
whatever their strides.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference._common import accumulator
from ._launch import on_device

ELEMENTS, WARPS = (
    2048,
    4,
)  # of a tile: 16 values in every thread, of two maps at once; half as many in float64
PIXELS, PIXELS_CHANNELS_LAST = (
    256,
    128,
)  # of a block at most; the sums left per block take 1/256 or 1/128 of a map
MASK_BLOCK, MASK_WARPS = 4096, 16  # one program makes a whole mask


class Map(NamedTuple):
    """A map [B, C, H, W] in place; ``flat``: its pixels lie along one stride."""

    data: Tensor
    image: int
    channel: int
    row: int
    pixel: int
    width: int


class Config(NamedTuple):
    """Compile-time side of a launch."""

    channels: int  # of a tile
    pixels: int
    flat: bool
    acc: tl.dtype


def _split(value: float) -> tuple[float, float]:
    """A number in two parts, since kernels take float32: enough for float64."""
    high = ctypes.c_float(value).value
    return high, value - high


def _map(x: Tensor) -> Map:
    b, c, h, w = x.stride()
    return Map(x, b, c, h, h if x.shape[3] == 1 else w, x.shape[3])


def _is_flat(x: Tensor) -> bool:
    return 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)


def _config(*maps: Tensor) -> Config:
    c, pixels = maps[0].shape[1], maps[0].shape[2] * maps[0].shape[3]
    channels_last = maps[0].stride(1) == 1 and pixels > 1
    most = PIXELS_CHANNELS_LAST if channels_last else PIXELS
    block = min(most, triton.next_power_of_2(pixels))
    wide = accumulator(*maps) == torch.float64
    channels = min(ELEMENTS // (1 + wide) // block, triton.next_power_of_2(c))
    acc = tl.float64 if wide else tl.float32
    return Config(channels, block, all(map(_is_flat, maps)), acc)


@triton.jit
def _number(parts, acc: tl.constexpr):
    return tl.full([], 0, acc) + parts[0] + parts[1]


@triton.jit
def _load(m, image, channels, pixels, ok, c: tl.constexpr):
    """A tile [channels, pixels] of the map, 0 where not ``ok``."""
    return tl.load(_address(m, image, channels, pixels, c), ok, other=0.0).to(c.acc)


@triton.jit
def _address(m, image, channels, pixels, c: tl.constexpr):
    if c.flat:
        offsets = pixels.to(tl.int64) * m.pixel
    else:
        offsets = (pixels // m.width).to(tl.int64) * m.row + (pixels % m.width).to(tl.int64) * m.pixel
    start = m.data + image.to(tl.int64) * m.image
    return start + channels.to(tl.int64)[:, None] * m.channel + offsets[None, :]


@triton.jit
def _block(blocks, c: tl.constexpr):
    """Which image and which of its pixels this program has."""
    program = tl.program_id(0)
    return program // blocks, program % blocks, program % blocks * c.pixels + tl.arange(0, c.pixels)


@triton.jit
def _pool(m, spatial, parts, image, slot, pixels, count, channels, c: tl.constexpr, SIGNED: tl.constexpr):
    """spatial [pixels] and parts [C] of one block, of |x| or of x."""
    total = tl.zeros([c.pixels], c.acc)
    for start in range(0, channels, c.channels):
        index = start + tl.arange(0, c.channels)
        x = _load(m, image, index, pixels, (index < channels)[:, None] & (pixels < count)[None, :], c)
        if not SIGNED:
            x = tl.abs(x)
        total += tl.sum(x, 0)
        tl.store(parts + slot * channels + index, tl.sum(x, 1) / count, index < channels)
    tl.store(spatial + image * count + pixels, total / channels, pixels < count)


@triton.jit
def pool(x, y, spatial, parts, batch, channels, count, blocks, maps, c: tl.constexpr, SIGNED: tl.constexpr):
    """spatial [kinds, maps, B, P] and parts [kinds, maps, B, blocks, C]; grid: (B * blocks, maps)."""
    image, block, pixels = _block(blocks, c)
    which = tl.program_id(1).to(tl.int64)
    slot = (which * batch + image) * blocks + block
    size, parts_size = maps.to(tl.int64) * batch * count, maps.to(tl.int64) * batch * blocks
    for kind in tl.static_range(2 if SIGNED else 1):
        to = spatial + kind * size + which * batch * count
        at = kind * parts_size + slot
        if which == 0:
            _pool(x, to, parts, image.to(tl.int64), at, pixels, count, channels, c, kind == 1)
        else:
            _pool(y, to, parts, image.to(tl.int64), at, pixels, count, channels, c, kind == 1)


@triton.jit
def _softmax_terms(values, n, inverse, acc: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum of v * inverse and the sum of exp(v * inverse - maximum), over n values (or sums of two)."""
    first, second = values
    most = tl.full([BLOCK], float("-inf"), acc)
    total = tl.zeros([BLOCK], acc)
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        v = tl.load(first + index, index < n, other=float("-inf")).to(acc)
        if second is not None:
            v += tl.load(second + index, index < n, other=0.0).to(acc)
        v = v * inverse
        new = tl.maximum(most, v)
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(most - shift) + tl.exp(v - shift)
        most = new
    highest = tl.max(most, 0)
    return highest, tl.sum(total * tl.exp(most - highest), 0)


@triton.jit
def masks(
    spatial, channel, spatial_mask, channel_mask, squares, batch, count, channels, temperature,
    ACC: tl.constexpr, SIGNED: tl.constexpr, SUM: tl.constexpr, CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Masks [B, n] and, for L_AT, squared distances [2, B]; grid: (B, 2), spatial and channel attention."""
    image, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if which == 0:
        _mask(spatial, spatial_mask, squares, image, batch, count, temperature, ACC, SIGNED, SUM, True, BLOCK)
    else:
        _mask(
            channel, channel_mask, squares + batch, image, batch, channels, temperature,
            ACC, SIGNED, SUM, CHANNEL, BLOCK,
        )  # fmt: skip


@triton.jit
def _mask(
    pooled, out, squares, image, batch, n, temperature,
    ACC: tl.constexpr, SIGNED: tl.constexpr, SUM: tl.constexpr, USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    student, teacher = pooled + image * n, pooled + (batch + image) * n
    inverse = 1 / _number(temperature, ACC)
    if SUM:
        highest, total = _softmax_terms((student, teacher), n, inverse, ACC, BLOCK)
        highest_t, total_t = highest, total
    else:
        highest, total = _softmax_terms((student, None), n, inverse, ACC, BLOCK)
        highest_t, total_t = _softmax_terms((teacher, None), n, inverse, ACC, BLOCK)
    share, share_t = n / total, n / total_t
    square = tl.zeros([BLOCK], ACC)
    last = 2 * batch * n if SIGNED else 0
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        s, t = tl.load(student + index, index < n, other=0.0), tl.load(teacher + index, index < n, other=0.0)
        if SUM:
            weight = tl.exp((s + t) * inverse - highest) * share
        else:
            weight = (tl.exp(s * inverse - highest) * share + tl.exp(t * inverse - highest_t) * share_t) / 2
        if not USED:
            weight = tl.zeros([BLOCK], ACC) + 1
        tl.store(out + image * n + index, weight, index < n)
        d = tl.load(student + last + index, index < n, other=0.0) - tl.load(
            teacher + last + index, index < n, other=0.0
        )
        square += d * d
    tl.store(squares + image, tl.sum(square, 0))


@triton.jit
def errors(
    x, y, spatial_mask, channel_mask, sums, spatial_error, parts, channels, count, blocks,
    c: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """sums [B * blocks] of M^s M^c (x - y)²; what each mask multiplies: spatial_error [B, P], parts [B, blocks, C]."""
    image, block, pixels = _block(blocks, c)
    image = image.to(tl.int64)
    inside = pixels < count
    weight = tl.load(spatial_mask + image * count + pixels, inside, other=0.0).to(c.acc)
    total = tl.zeros([c.pixels], c.acc)
    for start in range(0, channels, c.channels):
        index = start + tl.arange(0, c.channels)
        ok = (index < channels)[:, None] & inside[None, :]
        d = _load(x, image, index, pixels, ok, c) - _load(y, image, index, pixels, ok, c)
        factor = tl.load(channel_mask + image * channels + index, index < channels, other=0.0).to(c.acc)
        total += tl.sum(d * d * factor[:, None], 0)
        if THROUGH:
            by_channel = tl.sum(d * d * weight[None, :], 1)
            tl.store(parts + (image * blocks + block) * channels + index, by_channel, index < channels)
    if THROUGH:
        tl.store(spatial_error + image * count + pixels, total, inside)
    tl.store(sums + tl.program_id(0), tl.sum(total * weight, 0))


@triton.jit
def _sum(values, n, acc: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], acc)
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + index, index < n, other=0.0).to(acc)
    return tl.sum(total, 0)


@triton.jit
def _factor(weight, distance):
    return tl.where(distance > 0, weight / tl.where(distance > 0, distance, 1.0), 0.0)


@triton.jit
def finish(
    squares, sums, loss, terms, batch, programs, transfer_weight, masked_weight,
    ACC: tl.constexpr, TRANSFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Distances, what their gradients are divided by, and the loss; one program."""
    transfer_weight, masked_weight = _number(transfer_weight, ACC), _number(masked_weight, ACC)
    masked = tl.sqrt(_sum(sums, programs, ACC, BLOCK))
    spatial, channel = masked * 0, masked * 0
    if TRANSFER:
        spatial = tl.sqrt(_sum(squares, batch, ACC, BLOCK))
        channel = tl.sqrt(_sum(squares + batch, batch, ACC, BLOCK))
    tl.store(loss, transfer_weight * (spatial + channel) + masked_weight * masked)
    tl.store(terms, spatial)
    tl.store(terms + 1, channel)
    tl.store(terms + 2, masked)
    tl.store(terms + 3, _factor(transfer_weight, spatial))
    tl.store(terms + 4, _factor(transfer_weight, channel))
    tl.store(terms + 5, _factor(masked_weight, masked))


@triton.jit
def _difference(pooled, at, size, side, kinds, ok):
    """Own minus other attention, of the last kind, at offset ``at`` of [kinds, 2, size]."""
    pair = pooled + (kinds - 1) * 2 * size
    return tl.load(pair + side * size + at, ok, other=0.0) - tl.load(
        pair + (1 - side) * size + at, ok, other=0.0
    )


@triton.jit
def gradient(
    x, other, out, grad_loss, terms, spatial, channel, spatial_mask, channel_mask, grad_spatial, grad_channel,
    batch, channels, count, blocks, side,
    c: tl.constexpr, MASKED: tl.constexpr, KINDS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """out = sign(x) (spatial + channel terms) + (the same without sign) + weight (x - other).

    KINDS: of the pooled attention that L_AT compares (0: none); GIVEN: of the means whose gradients are given.
    Grid: (B * pixel blocks, channel blocks).
    """
    image, block, pixels = _block(blocks, c)
    image = image.to(tl.int64)
    index = tl.program_id(1) * c.channels + tl.arange(0, c.channels)
    inside, known = pixels < count, index < channels
    ok = known[:, None] & inside[None, :]
    at_pixel, at_channel = image * count + pixels, image * channels + index
    pixel_size, channel_size = batch.to(tl.int64) * count, batch.to(tl.int64) * channels
    value = _load(x, image, index, pixels, ok, c)
    result = tl.zeros([c.channels, c.pixels], c.acc)
    signs = (value > 0).to(c.acc) - (value < 0).to(c.acc)
    if KINDS > 0 or MASKED:
        scale = tl.load(grad_loss).to(c.acc)
    if KINDS > 0:
        by_pixel = _difference(spatial, at_pixel, pixel_size, side, KINDS, inside)
        by_channel = _difference(channel, at_channel, channel_size, side, KINDS, known)
        by_pixel *= scale * tl.load(terms + 3) / channels
        by_channel *= scale * tl.load(terms + 4) / count
        part = by_pixel[None, :] + by_channel[:, None]
        result += part * signs if KINDS == 1 else part
    for kind in tl.static_range(GIVEN):
        by_pixel = tl.load(grad_spatial + kind * pixel_size + at_pixel, inside, other=0.0) / channels
        by_channel = tl.load(grad_channel + kind * channel_size + at_channel, known, other=0.0) / count
        part = by_pixel[None, :] + by_channel[:, None]
        result += part * signs if kind == 0 else part
    if MASKED:
        weight = tl.load(spatial_mask + at_pixel, inside, other=0.0) * scale * tl.load(terms + 5)
        factor = tl.load(channel_mask + at_channel, known, other=0.0)
        result += weight[None, :] * factor[:, None] * (value - _load(other, image, index, pixels, ok, c))
    address = _address(out, image, index, pixels, c)
    tl.store(address, result.to(out.data.dtype.element_ty), ok)


class _Call:
    """Sizes of one call."""

    def __init__(self, *maps: Tensor) -> None:
        self.x, self.dtype = maps[0], accumulator(*maps)
        self.batch, self.channels, h, w = maps[0].shape
        self.size, self.count = (h, w), h * w
        self.config = _config(*maps)
        self.blocks = triton.cdiv(self.count, self.config.pixels)

    def new(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=self.dtype)

    def pool(self, maps: list[Tensor], signed: bool) -> tuple[Tensor, Tensor]:
        """spatial [kinds, maps, B, 1, H, W], channel [kinds, maps, B, C]"""
        kinds, count = 1 + signed, len(maps)
        spatial = self.new(kinds, count, self.batch, 1, *self.size)
        parts = self.new(kinds, count, self.batch, self.blocks, self.channels)
        if self.batch > 0:
            pool[(self.batch * self.blocks, count)](
                _map(maps[0]), _map(maps[-1]), spatial, parts, self.batch, self.channels, self.count,
                self.blocks, count, self.config, signed, num_warps=WARPS,
            )  # fmt: skip
        return spatial, parts.sum(3)

    def errors(
        self, x: Tensor, y: Tensor, spatial_mask: Tensor, channel_mask: Tensor, through: bool
    ) -> Tensor:
        """Sums per program; the masks' second rows where there are any."""
        sums = self.new(self.batch * self.blocks)
        parts = self.new(self.batch, self.blocks, self.channels) if through else sums
        if self.batch > 0:
            errors[(self.batch * self.blocks,)](
                _map(x), _map(y), spatial_mask, channel_mask, sums, spatial_mask[-1], parts, self.channels,
                self.count, self.blocks, self.config, through, num_warps=WARPS,
            )  # fmt: skip
        if through:
            torch.sum(parts, 1, out=channel_mask[1])
        return sums

    def finish(self, squares: Tensor, sums: Tensor, transfer_weight: float, masked_weight: float):
        loss, terms = self.new(), self.new(2, 3)
        finish[(1,)](
            squares, sums, loss, terms, self.batch, sums.shape[0], _split(transfer_weight),
            _split(masked_weight), self.config.acc, transfer_weight != 0, 1024, num_warps=WARPS,
        )  # fmt: skip
        return loss, terms


def attention_pool(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Implementation of ``kdfast::attention_pool_triton``; see :mod:`kdfast.reference.attention_mask`."""
    with on_device(x):
        spatial, channel = _Call(x).pool([x], signed)
    return spatial[:, 0], channel[:, 0]


def attention_mask(
    student: Tensor,
    teacher: Tensor,
    adapted: Tensor | None,
    temperature: float,
    transfer_weight: float,
    masked_weight: float,
    softmax_of_sum: bool,
    channel_mask: bool,
    signed: bool,
    through: bool,
) -> tuple[Tensor, ...]:
    """Implementation of ``kdfast::attention_mask_triton``."""
    x = student if adapted is None else adapted
    call = _Call(student, teacher, x)
    with on_device(student):
        spatial, channel = call.pool([student, teacher], signed)
        spatial_mask = call.new(1 + through, call.batch, 1, *call.size)
        channel_weights = call.new(1 + through, call.batch, call.channels)
        squares = call.new(2, call.batch)
        if call.batch > 0:
            masks[(call.batch, 2)](
                spatial, channel, spatial_mask, channel_weights, squares, call.batch, call.count, call.channels,
                _split(temperature), call.config.acc, signed, softmax_of_sum, channel_mask, MASK_BLOCK,
                num_warps=MASK_WARPS,
            )  # fmt: skip
        sums = call.errors(x, teacher, spatial_mask, channel_weights, through)
        loss, terms = call.finish(squares, sums, transfer_weight, masked_weight)
    return loss, terms, spatial, channel, spatial_mask, channel_weights


def masked_distance(x: Tensor, y: Tensor, spatial_mask: Tensor, channel_mask: Tensor) -> Tensor:
    """Implementation of ``kdfast::masked_distance_triton``."""
    call = _Call(x, y)
    masks = spatial_mask.contiguous()[None], channel_mask.contiguous()[None]
    with on_device(x):
        sums = call.errors(x, y, *masks, False)
        return call.finish(sums, sums, 0.0, 1.0)[1]


def attention_mask_backward(
    x: Tensor,
    other: Tensor | None,
    grad_loss: Tensor | None,
    terms: Tensor | None,
    spatial: Tensor | None,
    channel: Tensor | None,
    spatial_mask: Tensor | None,
    channel_mask: Tensor | None,
    grad_spatial: Tensor | None,
    grad_channel: Tensor | None,
    side: int,
) -> Tensor:
    """Implementation of ``kdfast::attention_mask_backward_triton``."""
    out = torch.empty_like(x)
    call = _Call(x, out) if other is None else _Call(x, other, out)
    if call.batch == 0:
        return out
    kinds = 0 if spatial is None else spatial.shape[0]
    given = 0 if grad_spatial is None else grad_spatial.shape[0]
    small = [
        x.new_empty(0, dtype=call.dtype) if v is None else v.contiguous()
        for v in (grad_loss, terms, spatial, channel, spatial_mask, channel_mask, grad_spatial, grad_channel)
    ]
    grid = (call.batch * call.blocks, triton.cdiv(call.channels, call.config.channels))
    with on_device(x):
        gradient[grid](
            _map(x), _map(x if other is None else other), _map(out), *small, call.batch, call.channels,
            call.count, call.blocks, side, call.config, other is not None, kinds, given, num_warps=WARPS,
        )  # fmt: skip
    return out
