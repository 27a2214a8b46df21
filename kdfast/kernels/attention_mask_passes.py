"""Triton kernels of the op ``attention_mask``; :mod:`kdfast.kernels.attention_mask` launches them.

A program holds a block of pixels of one image and walks over the channels, so that sums over channels are final and
sums over pixels leave C numbers per block, added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._jit import jit
from ._zeros import tile, vector


class Map(NamedTuple):
    """A map [B, C, H, W] in place; strides of what is not next to each other count :attr:`Config.unit`."""

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
    flat: bool  # pixels lie along one stride
    planar: bool  # pixels are neighbours in memory, else channels
    unit: int  # divides image stride, channel (or pixel) stride and, where planar, pixels; Triton sees 16s alone
    whole: bool  # a tile has all channels and no other rows
    wide: bool  # offsets inside an image need 64 bits
    acc: tl.dtype


@triton.jit
def number(parts, acc: tl.constexpr):
    return tl.full([], 0, acc) + parts[0] + parts[1]


@triton.jit
def pixel_count(units, c: tl.constexpr):
    return units * c.unit if c.planar else units


@triton.jit
def load_tile(m, image, channels, pixels, ok, c: tl.constexpr):
    """A tile [channels, pixels] of the map, 0 where not ``ok``; see :func:`inside_tile`."""
    return tl.load(_address(m, image, channels, pixels, c), ok, other=0.0).to(c.acc)


@triton.jit
def inside_tile(index, channels, inside, c: tl.constexpr):
    """Which elements of a tile there are."""
    return inside[None, :] if c.whole else (index < channels)[:, None] & inside[None, :]


@triton.jit
def _address(m, image, channels, pixels, c: tl.constexpr):
    if c.wide:
        channels, pixels = channels.to(tl.int64), pixels.to(tl.int64)
    start = m.data + image.to(tl.int64) * c.unit * m.image
    if c.planar:
        offsets = pixels * m.pixel
        channels *= c.unit
    elif c.flat:
        offsets = pixels * c.unit * m.pixel
    else:
        offsets = pixels // m.width * m.row + pixels % m.width * m.pixel
    return start + channels[:, None] * m.channel + offsets[None, :]


@triton.jit
def _block(blocks, c: tl.constexpr):
    """Which image and which of its pixels this program has."""
    program = tl.program_id(0)
    return program // blocks, program % blocks, program % blocks * c.pixels + tl.arange(0, c.pixels)


@jit(do_not_specialize=["batch", "blocks"])
def pool(x, spatial, parts, batch, channels, units, blocks, c: tl.constexpr, SIGNED: tl.constexpr):
    """Of |x| and, if SIGNED, of x: spatial [kinds, B, P] and parts [kinds, B, blocks, C]; grid: (B * blocks,)."""
    image, block, pixels = _block(blocks, c)
    image, count = image.to(tl.int64), pixel_count(units, c)
    inside = pixels < count
    absolute, plain = vector(c.pixels, c.acc), vector(c.pixels, c.acc)
    parts += (image * blocks + block) * channels
    size = batch.to(tl.int64) * blocks * channels
    for start in range(0, channels, c.channels):
        index = start + tl.arange(0, c.channels)
        known = index < channels
        v = load_tile(x, image, index, pixels, inside_tile(index, channels, inside, c), c)
        absolute += tl.sum(tl.abs(v), 0)
        tl.store(parts + index, tl.sum(tl.abs(v), 1) / count, known)
        if SIGNED:
            plain += tl.sum(v, 0)
            tl.store(parts + size + index, tl.sum(v, 1) / count, known)
    tl.store(spatial + image * count + pixels, absolute / channels, inside)
    if SIGNED:
        tl.store(spatial + (batch + image) * count + pixels, plain / channels, inside)


@jit(do_not_specialize=["blocks"])
def errors(
    x, y, spatial_mask, channel_mask, sums, spatial_error, parts, channels, units, blocks,
    c: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """sums [B * blocks] of M^s M^c (x - y)²; what each mask multiplies: spatial_error [B, P], parts [B, blocks, C]."""
    image, block, pixels = _block(blocks, c)
    image, count = image.to(tl.int64), pixel_count(units, c)
    inside = pixels < count
    weight = tl.load(spatial_mask + image * count + pixels, inside, other=0.0).to(c.acc)
    total = vector(c.pixels, c.acc)
    for start in range(0, channels, c.channels):
        index = start + tl.arange(0, c.channels)
        ok = inside_tile(index, channels, inside, c)
        d = load_tile(x, image, index, pixels, ok, c) - load_tile(y, image, index, pixels, ok, c)
        factor = tl.load(channel_mask + image * channels + index, index < channels, other=0.0).to(c.acc)
        total += tl.sum(d * d * factor[:, None], 0)
        if THROUGH:
            by_channel = tl.sum(d * d * weight[None, :], 1)
            tl.store(parts + (image * blocks + block) * channels + index, by_channel, index < channels)
    if THROUGH:
        tl.store(spatial_error + image * count + pixels, total, inside)
    tl.store(sums + tl.program_id(0), tl.sum(total * weight, 0))


@triton.jit
def load_past(values, ok):
    """Past L1: programs of the same launch may have written it."""
    return tl.load(values, ok, other=0.0, cache_modifier=".cg")


@triton.jit
def sum_of(values, n, acc: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], acc)
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += load_past(values + index, index < n)
    return tl.sum(total, 0)


@triton.jit
def factor_of(weight, distance):
    return tl.where(distance > 0, weight / tl.where(distance > 0, distance, 1.0), 0.0)


@triton.jit
def store_terms(
    squares, error, loss, terms, batch, transfer_weight, masked_weight,
    ACC: tl.constexpr, TRANSFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Distances, what their gradients are divided by, and the loss, of squares [2, B] and the masked error."""
    transfer_weight, masked_weight = number(transfer_weight, ACC), number(masked_weight, ACC)
    spatial, channel = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    if TRANSFER:
        for start in range(0, batch, BLOCK):
            index = start + tl.arange(0, BLOCK)
            spatial += load_past(squares + index, index < batch)
            channel += load_past(squares + batch + index, index < batch)
    masked, spatial, channel = tl.sqrt(error), tl.sqrt(tl.sum(spatial, 0)), tl.sqrt(tl.sum(channel, 0))
    tl.store(loss, transfer_weight * (spatial + channel) + masked_weight * masked)
    tl.store(terms, spatial)
    tl.store(terms + 1, channel)
    tl.store(terms + 2, masked)
    tl.store(terms + 3, factor_of(transfer_weight, spatial))
    tl.store(terms + 4, factor_of(transfer_weight, channel))
    tl.store(terms + 5, factor_of(masked_weight, masked))


@jit(do_not_specialize=["batch", "programs"])
def finish(
    squares, sums, loss, terms, batch, programs, transfer_weight, masked_weight,
    ACC: tl.constexpr, TRANSFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """:func:`store_terms` of what :func:`errors` left; one program."""
    error = sum_of(sums, programs, ACC, BLOCK)
    store_terms(squares, error, loss, terms, batch, transfer_weight, masked_weight, ACC, TRANSFER, BLOCK)


@triton.jit
def _difference(pooled, at, size, side, MAPS: tl.constexpr, ok):
    """Own minus other attention at offset ``at`` of [MAPS, size]: of both maps, or of student minus teacher."""
    difference = tl.load(pooled + at, ok, other=0.0)
    if MAPS == 2:
        difference -= tl.load(pooled + size + at, ok, other=0.0)
    return tl.where(side == 0, difference, -difference)


@jit(do_not_specialize=["batch", "blocks", "side"])
def gradient(
    x, other, out, grad_loss, terms, spatial, channel, spatial_mask, channel_mask, grad_spatial, grad_channel,
    batch, channels, units, blocks, side,
    c: tl.constexpr, MASKED: tl.constexpr, MAPS: tl.constexpr, GIVEN: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """out = sign(x) (spatial + channel terms) + (the same without sign) + weight (x - other).

    MAPS: of the pooled attention that L_AT compares (0: none); GIVEN: kinds of means whose gradients are given, the
    last of which, as what L_AT compares, are those of x where SIGNED.
    Grid: (B * pixel blocks, channel blocks).
    """
    image, block, pixels = _block(blocks, c)
    image, count = image.to(tl.int64), pixel_count(units, c)
    index = tl.program_id(1) * c.channels + tl.arange(0, c.channels)
    inside, known = pixels < count, index < channels
    ok = inside_tile(index, channels, inside, c)
    at_pixel, at_channel = image * count + pixels, image * channels + index
    pixel_size, channel_size = batch.to(tl.int64) * count, batch.to(tl.int64) * channels
    value = load_tile(x, image, index, pixels, ok, c)
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
        result += weight[None, :] * factor[:, None] * (value - load_tile(other, image, index, pixels, ok, c))
    address = _address(out, image, index, pixels, c)
    tl.store(address, result.to(out.data.dtype.element_ty), ok)
