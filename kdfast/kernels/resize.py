"""Triton kernels between maps [B, C, H, W] and their resized patch matrices [G, N, D], and back.

What :func:`kdfast.reference.patch_gram.view` computes, resize and cut together, written out contiguously: the Gram
kernels then read along one stride. One launch each way does student and teacher.

* Forward: every element of the patches reads the (up to) four pixels that it lies between.
* Adjoint: every pixel gathers, in a fixed order, the few elements that read it: no atomics.

Both read and write every element about once from memory; neighbours share what they read in the cache. Nothing comes
from the host but sizes. Positions are exact integers: resized pixel r has its centre at ((2 r + 1) size - resized) /
(2 resized) among the pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.patch_gram import AVERAGES, Grid, resized_dtype
from ._jit import jit
from ._launch import cdiv, next_power_of_2, on_device
from ._zeros import tile

BATCH, SPATIAL = (tl.constexpr(AVERAGES.index(name)) for name in ("batch", "spatial"))

# Channels and pixels of a tile, warps; for maps that lie along pixels or (channels_last) channels, and patches that lie
# along pixels or (spatial) channels. Along pixels, a thread does the arithmetic of a pixel once for all its channels.
TILES = {
    ("pixels", "pixels"): (8, 256, 4),
    ("pixels", "channels"): (32, 64, 4),
    ("channels", "pixels"): (32, 64, 4),
    ("channels", "channels"): (64, 32, 4),
}
ADJOINT_TILES = {
    ("pixels", "pixels"): (8, 128, 4),
    ("pixels", "channels"): (32, 64, 4),
    ("channels", "pixels"): (32, 64, 4),
    ("channels", "channels"): (64, 32, 4),
}
UNROLLED = 16  # so many resized pixels of one pixel are gathered without a loop


class Config(NamedTuple):
    """Compile-time side of a launch."""

    average: int
    patch_h: int
    patch_w: int
    bilinear: bool  # or else padded with zeros and cropped
    channels: int  # of a tile
    pixels: int
    acc: tl.dtype
    index: tl.dtype  # of positions, and of offsets within an image
    taps_h: int = 1  # most resized rows, and columns, that read one pixel
    taps_w: int = 1
    unrolled: bool = True


class Map(NamedTuple):
    """A map [B, C, H, W] in place; strides count elements."""

    data: Tensor
    batch: int
    channel: int
    row: int
    column: int


@triton.jit
def _block(pid, channels, pixels, c: tl.constexpr):
    """Image, channels and pixels of a program; pixels change first."""
    blocks, rows = tl.cdiv(pixels, c.pixels), tl.cdiv(channels, c.channels)
    channel = pid // blocks % rows * c.channels + tl.arange(0, c.channels)
    return pid // blocks // rows, channel, pid % blocks * c.pixels + tl.arange(0, c.pixels)


@triton.jit
def _patch_strides(batch, channels, count, c: tl.constexpr):
    """Strides of images, channels, patches, and rows and columns of a patch in [G, N, D]; ``count`` is N."""
    area: tl.constexpr = c.patch_h * c.patch_w
    one = tl.full([], 1, c.index)
    if c.average == SPATIAL:
        d = one * batch * channels
        return one * channels, one, d, d * count * c.patch_w, d * count
    if c.average == BATCH:
        d = one * channels * area
        return d * count, one * area, d, one * c.patch_w, one
    d = one * batch * area
    return one * area, d * count, d, one * c.patch_w, one


@triton.jit
def _between(r, size, resized, c: tl.constexpr):
    """The two pixels that resized pixels r lie between, and their distance from the first."""
    at = tl.maximum((2 * r + 1) * size - resized, 0)
    low = at // (2 * resized)
    share = (at - low * (2 * resized)).to(c.acc) / (2 * resized).to(c.acc)
    return low, tl.minimum(low + 1, size - 1), share


@triton.jit
def _resize(pid, x, channels, size_h, size_w, out, batch, height, width, c: tl.constexpr):
    image, channel, p = _block(pid, channels, height * width, c)
    r, s = (p // width).to(c.index), (p % width).to(c.index)
    ok_c, ok_p = channel < channels, p < height * width
    base, at_c = x.data + image.to(tl.int64) * x.batch, (channel.to(c.index) * x.channel)[None, :]
    ok = ok_p[:, None] & ok_c[None, :]
    if c.bilinear:
        top, bottom, down = _between(r, size_h, height, c)
        left, right, across = _between(s, size_w, width, c)
        x00 = tl.load(base + (at_c + (top * x.row + left * x.column)[:, None]), ok, other=0.0).to(c.acc)
        x01 = tl.load(base + (at_c + (top * x.row + right * x.column)[:, None]), ok, other=0.0).to(c.acc)
        x10 = tl.load(base + (at_c + (bottom * x.row + left * x.column)[:, None]), ok, other=0.0).to(c.acc)
        x11 = tl.load(base + (at_c + (bottom * x.row + right * x.column)[:, None]), ok, other=0.0).to(c.acc)
        # In this form a constant map stays exactly that.
        upper, lower = x00 + across[:, None] * (x01 - x00), x10 + across[:, None] * (x11 - x10)
        value = upper + down[:, None] * (lower - upper)
    else:
        inside = ok & ((r < size_h) & (s < size_w))[:, None]
        value = tl.load(base + (at_c + (r * x.row + s * x.column)[:, None]), inside, other=0.0)
    count = height // c.patch_h * (width // c.patch_w)
    images, planes, patches, rows, columns = _patch_strides(batch, channels, count, c)
    to = r // c.patch_h * (width // c.patch_w) * patches + r % c.patch_h * rows
    to += s // c.patch_w * patches + s % c.patch_w * columns
    out += image.to(tl.int64) * images
    value = value.to(out.dtype.element_ty)
    tl.store(out + ((channel.to(c.index) * planes)[None, :] + to[:, None]), value, ok)


SIZES = ["height_x", "width_x", "height_y", "width_y", "programs_x", "batch"]


@jit(do_not_specialize=[*SIZES, "height", "width"])
def resize(
    x, channels_x, height_x, width_x, out_x, y, channels_y, height_y, width_y, out_y,
    programs_x, batch, height, width, c: tl.constexpr
):  # fmt: skip
    """Both maps (data and four strides) as patch matrices of ``height`` x ``width`` resized pixels."""
    pid = tl.program_id(0)
    if pid < programs_x:
        _resize(pid, x, channels_x, height_x, width_x, out_x, batch, height, width, c)
    else:
        _resize(pid - programs_x, y, channels_y, height_y, width_y, out_y, batch, height, width, c)


@triton.jit
def _first_reader(h, size, resized, c: tl.constexpr):
    """The first resized pixel that reads pixels h."""
    if not c.bilinear:
        return h
    beyond = (2 * h - 1) * resized - size
    return tl.where(beyond < 0, 0, tl.maximum(beyond, 0) // (2 * size) + 1)


@triton.jit
def _weight(h, r, size, resized, c: tl.constexpr):
    """With what weight resized pixels r read pixels h: 0 where they do not, or do not exist."""
    if not c.bilinear:
        return tl.where(r < resized, 1.0, 0.0).to(c.acc)
    away = (2 * r + 1) * size - resized - 2 * resized * h
    alone = ((h == 0) & (away < 0)) | ((h == size - 1) & (away > 0))  # beyond the outermost pixels
    away = tl.where(alone, 0, tl.abs(away))
    weight = (2 * resized - away).to(c.acc) / (2 * resized).to(c.acc)
    return tl.where(r < resized, tl.maximum(weight, 0.0), 0.0)


@triton.jit
def _row(h, r, size, resized, patches, pixels, patch: tl.constexpr, c: tl.constexpr):
    """Weights and offsets of resized rows (or columns) r where pixels h gather."""
    return _weight(h, r, size, resized, c), r // patch * patches + r % patch * pixels


@triton.jit
def _add(total, base, at_c, at, weight, ok, c: tl.constexpr):
    read = ok & (weight > 0)[:, None]
    return total + weight[:, None] * tl.load(base + (at_c + at[:, None]), read, other=0.0).to(c.acc)


# The numbers of taps are arguments because Triton 3.6 takes no field of a Config as the end of a static range.
@triton.jit
def _gather(
    base, at_c, ok, h, w, first_row, first_column, size_h, size_w, height, width, patches, rows, columns,
    taps_h: tl.constexpr, taps_w: tl.constexpr, c: tl.constexpr
):  # fmt: skip
    """What pixels (h, w) of the channels at_c gather from the resized ones that read them."""
    total, down_by = tile(c.pixels, c.channels, c.acc), width // c.patch_w * patches
    if c.unrolled:
        for i in tl.static_range(taps_h):
            down, at_r = _row(h, first_row + i, size_h, height, down_by, rows, c.patch_h, c)
            for j in tl.static_range(taps_w):
                across, at_s = _row(w, first_column + j, size_w, width, patches, columns, c.patch_w, c)
                total = _add(total, base, at_c, at_r + at_s, down * across, ok, c)
    else:
        for i in range(taps_h):
            down, at_r = _row(h, first_row + i, size_h, height, down_by, rows, c.patch_h, c)
            for j in range(taps_w):
                across, at_s = _row(w, first_column + j, size_w, width, patches, columns, c.patch_w, c)
                total = _add(total, base, at_c, at_r + at_s, down * across, ok, c)
    return total


@triton.jit
def _adjoint(pid, z, out, channels, size_h, size_w, batch, height, width, c: tl.constexpr):
    image, channel, p = _block(pid, channels, size_h * size_w, c)
    h, w = (p // size_w).to(c.index), (p % size_w).to(c.index)
    ok = (p < size_h * size_w)[:, None] & (channel < channels)[None, :]
    count = height // c.patch_h * (width // c.patch_w)
    images, planes, patches, rows, columns = _patch_strides(batch, channels, count, c)
    base, at_c = z + image.to(tl.int64) * images, (channel.to(c.index) * planes)[None, :]
    first_row, first_column = _first_reader(h, size_h, height, c), _first_reader(w, size_w, width, c)
    total = _gather(
        base, at_c, ok, h, w, first_row, first_column, size_h, size_w, height, width, patches, rows, columns,
        c.taps_h, c.taps_w, c
    )  # fmt: skip
    data = out.data + image.to(tl.int64) * out.batch
    to = (channel.to(c.index) * out.channel)[None, :] + (h * out.row + w * out.column)[:, None]
    tl.store(data + to, total.to(data.dtype.element_ty), ok)


@jit(do_not_specialize=[*SIZES, "height", "width"])
def resize_adjoint(
    z_x, out_x, channels_x, height_x, width_x, z_y, out_y, channels_y, height_y, width_y,
    programs_x, batch, height, width, c: tl.constexpr
):  # fmt: skip
    """Gradients of the patch matrices to those of the maps (data and four strides)."""
    pid = tl.program_id(0)
    if pid < programs_x:
        _adjoint(pid, z_x, out_x, channels_x, height_x, width_x, batch, height, width, c)
    else:
        _adjoint(pid - programs_x, z_y, out_y, channels_y, height_y, width_y, batch, height, width, c)


def patch_matrices(maps: list[Tensor], grid: Grid) -> list[Tensor]:
    """Patch matrices [G, N, D] of one map or two [B, C, H, W]."""
    outs = [v.new_empty(grid.matrices(v), dtype=resized_dtype(v, grid)) for v in maps]
    _launch(resize, maps, outs, grid, TILES, {})
    return outs


def map_gradients(found: list[Tensor], gradients: list[Tensor], grid: Grid) -> None:
    """Writes the gradients of one map or two [B, C, H, W] from those of their patch matrices [G, N, D]."""
    sizes = [(v.shape[2:], grid.size) for v in gradients]
    taps_h, taps_w = (
        max(_taps(size[axis], resized[axis]) if grid.bilinear else 1 for size, resized in sizes)
        for axis in (0, 1)
    )
    taps = {"taps_h": taps_h, "taps_w": taps_w, "unrolled": taps_h * taps_w <= UNROLLED}
    _launch(resize_adjoint, gradients, [v.contiguous() for v in found], grid, ADJOINT_TILES, taps)


def _taps(size: int, resized: int) -> int:
    """How many resized pixels read one pixel: those less than a pixel away, an open interval of 2 resized / size."""
    return 1 if size == resized else min(-(-2 * resized // size), resized)


def _launch(
    kernel, maps: list[Tensor], matrices: list[Tensor], grid: Grid, tiles: dict, taps: dict[str, int]
) -> None:
    if not all(v.numel() for v in (*maps, *matrices)):
        return
    height, width = grid.size
    lies = "channels" if any(v.stride(1) == 1 and v.stride(3) != 1 for v in maps) else "pixels"
    channels, pixels, warps = tiles[lies, "channels" if grid.average == SPATIAL.value else "pixels"]
    adjoint = kernel is resize_adjoint
    channels = min(channels, next_power_of_2(max(v.shape[1] for v in maps)))
    done = [v.shape[2] * v.shape[3] if adjoint else height * width for v in maps]
    pixels = min(pixels, max(16, next_power_of_2(max(done))))
    bilinear = grid.bilinear and not all(grid.fits(v) for v in maps)
    double = any(v.dtype == torch.float64 for v in matrices)
    wide = any(_wide(v, m, height, width) for v, m in zip(maps, matrices, strict=True))
    config = Config(
        grid.average, grid.patch_h, grid.patch_w, bilinear, channels, pixels,
        tl.float64 if double else tl.float32, tl.int64 if wide else tl.int32, **taps,
    )  # fmt: skip
    sides, programs = [], []
    for v, m, count in zip(maps, matrices, done, strict=True):
        b, c, h, w = v.shape
        place = Map(v, *v.stride())
        sides.append((m, place, c, h, w) if adjoint else (place, c, h, w, m))
        programs.append(b * cdiv(c, channels) * cdiv(count, pixels))
    with on_device(maps[0]):
        kernel[(sum(programs),)](
            *sides[0], *sides[-1], programs[0], maps[0].shape[0], height, width, config, num_warps=warps
        )


def _wide(v: Tensor, m: Tensor, height: int, width: int) -> bool:
    """Whether positions or offsets within an image pass 32 bits."""
    _, c, h, w = v.shape
    last = (c - 1) * v.stride(1) + (h - 1) * v.stride(2) + (w - 1) * v.stride(3)
    return max(last, m.numel(), 2 * height * (h + 2), 2 * width * (w + 2)) >= 2**31
