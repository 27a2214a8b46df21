"""Triton kernels of the op ``feature_augment``; :mod:`kdfast.kernels.feature_augment` launches them.

A program has some channels of one image and a block of its pixels. What depends on the pixel alone (where it reads, with
which weights, whether it is cut) is computed once for all its channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._jit import jit
from .feature_augment_noise import normal, normal_of_fours

# Every draw has other numbers: a kernel for each that is 1 or a multiple of 16 would be compiled during training.
DRAWN = [
    "low",
    "high",
    "first",
    *(f"{side}_{edge}" for side in "ba" for edge in ("top", "left", "bottom", "right")),
]


@triton.jit
def _pair(table, first, channel, known, channels, MOVES: tl.constexpr):
    """The channel of the input that a result's channel reads through MOVES rows of the table, and whether it is shown.

    A row is a permutation, or drops channels where they are: every channel of the input has one of the result.
    """
    source, shown = channel, known
    for k in tl.static_range(MOVES):
        row = table + (first + MOVES - 1 - k) * channels
        read = tl.load(row + source, known, other=0)
        shown = shown & (read >= 0)
        source = tl.where(read >= 0, read, source)
    return source, shown


@triton.jit
def _in_box(i, j, top, left, bottom, right):
    return (i >= top) & (i < bottom) & (j >= left) & (j < right)


@triton.jit
def _noise(
    image, channel, channels, pixel, count, fours, low, high,
    FOURS: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """[CHANNELS, PIXELS]; ``fours`` [PIXELS // 4]: their pixels // 4, where four lie in a row everywhere."""
    plane = (image * channels + channel)[:, None] * count
    if FOURS:
        return normal_of_fours(plane // 4 + fours[None, :], low, high, CHANNELS, PIXELS // 4, ACC)
    else:
        return normal(plane + pixel[None, :], low, high, ACC)


@triton.jit
def _finished(value, noise, cut, NOISE: tl.constexpr, CUT: tl.constexpr, NOISE_LAST: tl.constexpr):
    if NOISE and not NOISE_LAST:
        value += noise
    if CUT:
        value = tl.where(cut, 0.0, value)
    if NOISE and NOISE_LAST:
        value += noise
    return value


@triton.jit
def _number(parts, k: tl.constexpr, ACC: tl.constexpr):
    """Number ``k``: the deviation, then the matrix. Arguments are float32; float64 has their remainders seven on."""
    value = tl.zeros([], ACC) + parts[k]
    if ACC == tl.float64:  # noqa: SIM300
        value += parts[7 + k]
    return value


@jit(do_not_specialize=DRAWN)
def pointwise(
    x, x_b, x_c, x_h, x_w, out, out_b, out_c, out_h, out_w, table, channels, count, width, blocks, groups,
    first, numbers, low, high, a_top, a_left, a_bottom, a_right,
    MOVES: tl.constexpr, SCATTER: tl.constexpr, NOISE: tl.constexpr, CUT: tl.constexpr, NOISE_LAST: tl.constexpr,
    FOURS: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Everything but a warp. SCATTER: the adjoint, from the result's channels to those of the input."""
    program = tl.program_id(0)
    group = program // blocks
    image = (group // groups).to(tl.int64)
    start = program % blocks * PIXELS
    pixel = start + tl.arange(0, PIXELS)
    channel = group % groups * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    source, shown = _pair(table, first, channel, known, channels, MOVES)
    read, write = (channel, source) if SCATTER else (source, channel)
    if CUT or not FLAT:
        i, j = pixel // width, pixel % width
    if FLAT:
        from_, to = pixel.to(tl.int64) * x_w, pixel.to(tl.int64) * out_w
    else:
        from_ = i.to(tl.int64) * x_h + j.to(tl.int64) * x_w
        to = i.to(tl.int64) * out_h + j.to(tl.int64) * out_w
    inside = pixel < count
    address = x + image * x_b + read.to(tl.int64)[:, None] * x_c + from_[None, :]
    value = tl.load(address, shown[:, None] & inside[None, :], other=0.0).to(ACC)
    cut, noise = inside, value
    if CUT:
        cut = _in_box(i, j, a_top, a_left, a_bottom, a_right)
    if NOISE:
        fours = start // 4 + tl.arange(0, PIXELS // 4 if FOURS else PIXELS)
        noise = _noise(
            image, channel, channels, pixel, count, fours, low, high, FOURS, ACC, CHANNELS, PIXELS
        ) * _number(numbers, 0, ACC)
    value = _finished(value, noise, cut[None, :], NOISE, CUT, NOISE_LAST)
    address = out + image * out_b + write.to(tl.int64)[:, None] * out_c + to[None, :]
    tl.store(address, value.to(out.dtype.element_ty), known[:, None] & inside[None, :])


@triton.jit
def _placed(
    columns, tiles, groups, height, width, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program's image, group of channels and tile; the tile's rows and columns, which lie inside, and the map's centre.

    ``columns`` tiles lie side by side, ``tiles`` in a map.
    """
    program = tl.program_id(0)
    group, tile = program // tiles, program % tiles
    image = (group // groups).to(tl.int64)
    place = tl.arange(0, ROWS * COLUMNS)
    i, j = tile // columns * ROWS + place // COLUMNS, tile % columns * COLUMNS + place % COLUMNS
    inside = (i < height) & (j < width)
    cx, cy = (tl.zeros([], ACC) + width - 1) * 0.5, (tl.zeros([], ACC) + height - 1) * 0.5
    return image, group % groups, tile, i, j, inside, cx, cy


@jit(do_not_specialize=DRAWN)
def warp(
    x, x_b, x_c, x_h, x_w, out, out_b, out_c, out_h, out_w, table, channels, height, width, columns, tiles, groups,
    first, numbers, b_top, b_left, b_bottom, b_right, low, high, a_top, a_left, a_bottom, a_right,
    MOVES: tl.constexpr, SCATTER: tl.constexpr, B_CUT: tl.constexpr, NOISE: tl.constexpr, CUT: tl.constexpr,
    NOISE_LAST: tl.constexpr, FOURS: tl.constexpr, ACC: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Every pixel interpolates four of the input's, 0 where they are cut or outside; then what follows the warp.

    SCATTER: channels as in the adjoint, for a translation's, which is the translation back.
    """
    image, group, tile, i, j, inside, cx, cy = _placed(
        columns, tiles, groups, height, width, ACC, ROWS, COLUMNS
    )
    dx, dy = j.to(ACC) - cx, i.to(ACC) - cy
    u = _number(numbers, 1, ACC) * dx + _number(numbers, 2, ACC) * dy + _number(numbers, 3, ACC) + cx
    v = _number(numbers, 4, ACC) * dx + _number(numbers, 5, ACC) * dy + _number(numbers, 6, ACC) + cy
    u, v = tl.minimum(tl.maximum(u, -2.0), cx * 2 + 2), tl.minimum(tl.maximum(v, -2.0), cy * 2 + 2)
    u0, v0 = tl.floor(u), tl.floor(v)
    du, dv = u - u0, v - v0
    x += image * x_b
    out += image * out_b + (i.to(tl.int64) * out_h + j.to(tl.int64) * out_w)[:, None]
    cut = inside
    if CUT:
        cut = _in_box(i, j, a_top, a_left, a_bottom, a_right)
    for step in range(STEPS):
        channel = (group * STEPS + step) * CHANNELS + tl.arange(0, CHANNELS)
        known = channel < channels
        source, shown = _pair(table, first, channel, known, channels, MOVES)
        read, write = (channel, source) if SCATTER else (source, channel)
        plane = x + read.to(tl.int64)[None, :] * x_c
        value = tl.zeros([ROWS * COLUMNS, CHANNELS], ACC)
        for k in tl.static_range(4):
            weight = (du if k % 2 == 1 else 1 - du) * (dv if k // 2 == 1 else 1 - dv)
            col, row = u0.to(tl.int32) + k % 2, v0.to(tl.int32) + k // 2
            read_ = inside & (col >= 0) & (col < width) & (row >= 0) & (row < height)
            if B_CUT:
                read_ = read_ & (_in_box(row, col, b_top, b_left, b_bottom, b_right) == 0)
            offset = row.to(tl.int64) * x_h + col.to(tl.int64) * x_w
            tap = tl.load(plane + offset[:, None], shown[None, :] & read_[:, None], other=0.0).to(ACC)
            value += tap * weight[:, None]
        noise = value
        if NOISE:
            place = tl.arange(0, ROWS * COLUMNS // 4 if FOURS else ROWS * COLUMNS)
            row = tile // columns * ROWS + place // (COLUMNS // 4 if FOURS else COLUMNS)
            fours = row * (width // 4) + tile % columns * (COLUMNS // 4) + place % (COLUMNS // 4)
            noise = _noise(
                image, channel, channels, i * width + j, height * width, fours, low, high,
                FOURS, ACC, CHANNELS, ROWS * COLUMNS,
            )  # fmt: skip
            noise = tl.trans(noise) * _number(numbers, 0, ACC)
        value = _finished(value, noise, cut[:, None], NOISE, CUT, NOISE_LAST)
        address = out + write.to(tl.int64)[None, :] * out_c
        tl.store(address, value.to(out.dtype.element_ty), known[None, :] & inside[:, None])


@jit(do_not_specialize=DRAWN)
def warp_adjoint(
    g, g_b, g_c, g_h, g_w, out, out_b, out_c, out_h, out_w, table, channels, height, width, columns, tiles, groups,
    first, numbers, inverse, b_top, b_left, b_bottom, b_right, a_top, a_left, a_bottom, a_right,
    MOVES: tl.constexpr, B_CUT: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr, HIGH: tl.constexpr,
    ACC: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A pixel gathers from those of the result that read it, in a window [HIGH, WIDE] around where the inverse leads.

    ``inverse``: of the matrix [2, 2], then how far a window starts before that point, along x and y.
    """
    image, group, _, i, j, inside, cx, cy = _placed(columns, tiles, groups, height, width, ACC, ROWS, COLUMNS)
    m0, m1, m2 = _number(numbers, 1, ACC), _number(numbers, 2, ACC), _number(numbers, 3, ACC)
    m3, m4, m5 = _number(numbers, 4, ACC), _number(numbers, 5, ACC), _number(numbers, 6, ACC)
    # In float32, whatever the type: the window has some to spare.
    dx, dy = j - cx.to(tl.float32) - numbers[3], i - cy.to(tl.float32) - numbers[6]
    u = inverse[0] * dx + inverse[1] * dy + cx.to(tl.float32) - inverse[4]
    v = inverse[2] * dx + inverse[3] * dy + cy.to(tl.float32) - inverse[5]
    left = tl.ceil(tl.minimum(tl.maximum(u, -99.0), width + 1.0)).to(tl.int32)
    top = tl.ceil(tl.minimum(tl.maximum(v, -99.0), height + 1.0)).to(tl.int32)
    # Where the window's first pixel reads, from here.
    u = m0 * (left.to(ACC) - cx) + m1 * (top.to(ACC) - cy) + m2 + cx - j.to(ACC)
    v = m3 * (left.to(ACC) - cx) + m4 * (top.to(ACC) - cy) + m5 + cy - i.to(ACC)
    g += image * g_b
    out += image * out_b + (i.to(tl.int64) * out_h + j.to(tl.int64) * out_w)[:, None]
    for step in range(STEPS):
        channel = (group * STEPS + step) * CHANNELS + tl.arange(0, CHANNELS)
        known = channel < channels
        source, shown = _pair(table, first, channel, known, channels, MOVES)
        plane = g + channel.to(tl.int64)[None, :] * g_c
        value = tl.zeros([ROWS * COLUMNS, CHANNELS], ACC)
        for ky in range(HIGH):
            for kx in tl.static_range(WIDE):
                col, row = left + kx, top + ky
                across, down = u + m0 * kx + m1 * ky, v + m3 * kx + m4 * ky
                weight = tl.maximum(1 - tl.abs(across), 0.0) * tl.maximum(1 - tl.abs(down), 0.0)
                read = inside & (weight > 0) & (col >= 0) & (col < width) & (row >= 0) & (row < height)
                if CUT:
                    read = read & (_in_box(row, col, a_top, a_left, a_bottom, a_right) == 0)
                offset = row.to(tl.int64) * g_h + col.to(tl.int64) * g_w
                tap = tl.load(plane + offset[:, None], shown[None, :] & read[:, None], other=0.0).to(ACC)
                value += tap * weight[:, None]
        if B_CUT:
            value = tl.where(_in_box(i, j, b_top, b_left, b_bottom, b_right)[:, None], 0.0, value)
        address = out + source.to(tl.int64)[None, :] * out_c
        tl.store(address, value.to(out.dtype.element_ty), known[None, :] & inside[:, None])
