"""Triton kernels of the op ``attention_mask``; :mod:`kdfast.kernels.attention_mask` launches them.

A program holds a block of pixels of one image and walks over the channels, so that sums over channels are final and
sums over pixels leave C numbers per block, added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._zeros import tile, vector


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
    total = vector(c.pixels, c.acc)
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
    spatial, channel, spatial_mask, channel_mask, differences, squares, batch, count, channels, temperature,
    ACC: tl.constexpr, SIGNED: tl.constexpr, SUM: tl.constexpr, CHANNEL: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Masks [B, n] and, of what L_AT compares, squared distances [2, B] and the differences if they are KEPT.

    Grid: (B, 2), spatial and channel attention.
    """
    image, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if which == 0:
        _mask(
            spatial, spatial_mask, differences[0], squares, image, batch, count, temperature,
            ACC, SIGNED, SUM, True, KEPT, BLOCK,
        )  # fmt: skip
    else:
        _mask(
            channel, channel_mask, differences[1], squares + batch, image, batch, channels, temperature,
            ACC, SIGNED, SUM, CHANNEL, KEPT, BLOCK,
        )  # fmt: skip


@triton.jit
def _mask(
    pooled, out, differences, squares, image, batch, n, temperature,
    ACC: tl.constexpr, SIGNED: tl.constexpr, SUM: tl.constexpr, USED: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
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
        if KEPT:
            tl.store(differences + image * n + index, d, index < n)
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
    total = vector(c.pixels, c.acc)
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
def _difference(pooled, at, size, side, MAPS: tl.constexpr, ok):
    """Own minus other attention at offset ``at`` of [MAPS, size]: of both maps, or of student minus teacher."""
    difference = tl.load(pooled + at, ok, other=0.0)
    if MAPS == 2:
        difference -= tl.load(pooled + size + at, ok, other=0.0)
    return tl.where(side == 0, difference, -difference)


@triton.jit
def gradient(
    x, other, out, grad_loss, terms, spatial, channel, spatial_mask, channel_mask, grad_spatial, grad_channel,
    batch, channels, count, blocks, side,
    c: tl.constexpr, MASKED: tl.constexpr, MAPS: tl.constexpr, GIVEN: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """out = sign(x) (spatial + channel terms) + (the same without sign) + weight (x - other).

    MAPS: of the pooled attention that L_AT compares (0: none); GIVEN: kinds of means whose gradients are given, the
    last of which, as what L_AT compares, are those of x where SIGNED.
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
    result = tile(c.channels, c.pixels, c.acc)
    signs = (value > 0).to(c.acc) - (value < 0).to(c.acc)
    if MAPS > 0 or MASKED:
        scale = tl.load(grad_loss).to(c.acc)
    if MAPS > 0:
        by_pixel = _difference(spatial, at_pixel, pixel_size, side, MAPS, inside)
        by_channel = _difference(channel, at_channel, channel_size, side, MAPS, known)
        by_pixel *= scale * tl.load(terms + 3) / channels
        by_channel *= scale * tl.load(terms + 4) / count
        part = by_pixel[None, :] + by_channel[:, None]
        result += part if SIGNED else part * signs
    for kind in tl.static_range(GIVEN):
        by_pixel = tl.load(grad_spatial + kind * pixel_size + at_pixel, inside, other=0.0) / channels
        by_channel = tl.load(grad_channel + kind * channel_size + at_channel, known, other=0.0) / count
        part = by_pixel[None, :] + by_channel[:, None]
        result += part if SIGNED and kind == GIVEN - 1 else part * signs
    if MASKED:
        weight = tl.load(spatial_mask + at_pixel, inside, other=0.0) * scale * tl.load(terms + 5)
        factor = tl.load(channel_mask + at_channel, known, other=0.0)
        result += weight[None, :] * factor[:, None] * (value - _load(other, image, index, pixels, ok, c))
    address = _address(out, image, index, pixels, c)
    tl.store(address, result.to(out.data.dtype.element_ty), ok)
