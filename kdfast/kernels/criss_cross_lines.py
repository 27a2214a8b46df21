"""Kernels of the op ``criss_cross`` in Triton; what is launched when: :mod:`kdfast.kernels.criss_cross`."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._jit import jit
from ._zeros import tile, vector


class Map(NamedTuple):
    """A map [B, C, H, W] wherever it lies."""

    data: Tensor
    image: int
    channel: int
    line: int
    position: int


class Config(NamedTuple):
    """Compile-time side of a launch over lines."""

    own: int
    other: int
    inner: int
    channels: int
    wide: int  # channels of queries and keys in a block of their gradients
    column: bool  # the first pass: leaves the own cell out
    merge: bool  # adds to the results of the first pass
    whole: bool
    single: bool  # one step reaches every cell of the line
    query: bool  # which gradients are needed
    key: bool
    acc: tl.dtype
    precision: str  # input_precision of products of float32
    native: bool  # half types are multiplied as they are
    terms: int  # 0: weights are multiplied in float32


@triton.jit
def _offset(m, pixels, width, FLAT: tl.constexpr):
    if FLAT:
        return pixels * m.position
    return pixels // width * m.line + pixels % width * m.position


@triton.jit
def _load_map(m, image, offset, ok, channels, count):
    """A tile [channels, pixels] of a map, 0 outside."""
    at = m.data + image * m.image + channels[:, None] * m.channel + offset[None, :]
    return tl.load(at, (channels < count)[:, None] & ok[None, :], other=0.0)


@triton.jit
def _store_cells(x, to, image, pixels, ok, channels, count, total):
    at = to + (image * total + pixels)[:, None] * count + channels[None, :]
    tl.store(at, tl.trans(x), ok[:, None] & (channels < count)[None, :])


@triton.jit
def _copy(
    m, to, image, pixels, ok, block, count, total, width, FLAT: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A block of channels of a map to cells."""
    channels = (block * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    x = _load_map(m, image, _offset(m, pixels, width, FLAT), ok, channels, count)
    _store_cells(x, to, image, pixels, ok, channels, count, total)


@jit
def prepare(
    q, k, v, g, out, cells_q, cells_k, cells_v, cells_g, delta, total, width, d, e, q_blocks, k_blocks, v_blocks,
    DELTA: tl.constexpr, COPY: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Copies of query, key and value as cells; grid (B * blocks of pixels, blocks of channels of each).

    DELTA: delta = <out, g> over the channels of every position, and with COPY g as cells, by the last row of programs.
    """
    blocks = tl.cdiv(total, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixels = (tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    ok, block = pixels < total, tl.program_id(1)
    if block < q_blocks:
        _copy(q, cells_q, image, pixels, ok, block, d, total, width, FLAT, CHANNELS)
    elif block < q_blocks + k_blocks:
        _copy(k, cells_k, image, pixels, ok, block - q_blocks, d, total, width, FLAT, CHANNELS)
    elif block < q_blocks + k_blocks + v_blocks:
        _copy(v, cells_v, image, pixels, ok, block - q_blocks - k_blocks, e, total, width, FLAT, CHANNELS)
    elif DELTA or COPY:
        g_at, out_at = _offset(g, pixels, width, FLAT), _offset(out, pixels, width, FLAT)
        dot = vector(PIXELS, ACC)
        for first in range(0, e, CHANNELS):
            channels = (first + tl.arange(0, CHANNELS)).to(tl.int64)
            x = _load_map(g, image, g_at, ok, channels, e)
            if DELTA:
                dot += tl.sum(x.to(ACC) * _load_map(out, image, out_at, ok, channels, e).to(ACC), 0)
            if COPY:
                _store_cells(x, cells_g, image, pixels, ok, channels, e, total)
        if DELTA:
            tl.store(delta + image * total + pixels, dot, ok)


@triton.jit
def _program(lines, n, c: tl.constexpr):
    """Image, line and first position of this program; the line changes fastest."""
    program, blocks = tl.program_id(0), tl.cdiv(n, c.own)
    line, block, image = program % lines, program // lines % blocks, program // lines // blocks
    return image.to(tl.int64), line.to(tl.int64), block * c.own


@triton.jit
def _cells(image, line, positions, lines, n, c: tl.constexpr):
    """Numbers of positions of a line among all cells [B, H, W]."""
    if c.column:
        return (image * n + positions) * lines + line
    return (image * lines + line) * n + positions


@triton.jit
def _end(n, c: tl.constexpr):
    """Where the walk over a line ends; a constant where that is after one step, which then is no loop."""
    if c.single:
        return c.other
    return n


@triton.jit
def _load(data, cells, ok, channels, count: tl.constexpr, c: tl.constexpr):
    """A tile [cells, channels], 0 outside."""
    x = tl.load(
        data + cells[:, None] * count + channels[None, :],
        ok[:, None] & (channels < count)[None, :],
        other=0.0,
    )
    if not c.native:
        x = x.to(c.acc)
    return x


@triton.jit
def _products(own, other, own_cells, own_ok, cells, ok, count: tl.constexpr, c: tl.constexpr):
    """<own, other> [positions, cells] over ``count`` channels."""
    total = tile(c.own, c.other, c.acc)
    for start in range(0, count, c.inner):
        channels = start + tl.arange(0, c.inner)
        a = _load(own, own_cells, own_ok, channels, count, c)
        b = _load(other, cells, ok, channels, count, c)
        total = tl.dot(a, tl.trans(b), total, input_precision=c.precision, out_dtype=c.acc)
    return total


@triton.jit
def _weighed(weights, values, total, c: tl.constexpr):
    """total + weights values, where values came from ``_load``."""
    if c.terms == 0:
        return tl.dot(weights, values.to(c.acc), total, input_precision=c.precision, out_dtype=c.acc)
    high = weights.to(values.dtype)
    total = tl.dot(high, values, total, out_dtype=c.acc)
    if c.terms == 2:
        total = tl.dot((weights - high.to(c.acc)).to(values.dtype), values, total, out_dtype=c.acc)
    return total


@triton.jit
def _seen(positions, own_ok, cells, ok, c: tl.constexpr):
    seen = own_ok[:, None] & ok[None, :]
    if c.column:
        seen = seen & (positions[:, None] != cells[None, :])
    return seen


@triton.jit
def _store(part, to, image, line, positions, cells, ok, channels, count, x, c: tl.constexpr):
    """Columns leave their part as cells; rows leave the result where it belongs."""
    inside = ok[:, None] & (channels < count)[None, :]
    if c.column:
        tl.store(part + cells[:, None] * count + channels[None, :], x.to(part.dtype.element_ty), inside)
    else:
        start = to.data + image * to.image + line * to.line
        at = (
            start
            + positions.to(tl.int64)[:, None] * to.position
            + channels.to(tl.int64)[None, :] * to.channel
        )
        tl.store(at, x.to(to.data.dtype.element_ty), inside)


@triton.jit
def _add(part, to, image, line, positions, cells, ok, channels, count, x, c: tl.constexpr):
    if c.merge:
        inside = ok[:, None] & (channels < count)[None, :]
        x += tl.load(part + cells[:, None] * count + channels[None, :], inside, other=0.0).to(c.acc)
    _store(part, to, image, line, positions, cells, ok, channels, count, x, c)


@jit
def forward_lines(
    q, k, v, part, out, part_lse, lse, lines, n, d: tl.constexpr, e: tl.constexpr, c: tl.constexpr
):
    """out and lse of a block of positions; grid (B * lines * blocks, blocks of channels)."""
    image, line, first = _program(lines, n, c)
    positions = first + tl.arange(0, c.own)
    ok, at = positions < n, _cells(image, line, positions, lines, n, c)
    channels = tl.program_id(1) * c.channels + tl.arange(0, c.channels)
    most = vector(c.own, c.acc) - float("inf")
    total = vector(c.own, c.acc)
    acc = tile(c.own, c.channels, c.acc)
    for start in range(0, _end(n, c), c.other):
        others = start + tl.arange(0, c.other)
        cells = _cells(image, line, others, lines, n, c)
        scores = _products(q, k, at, ok, cells, others < n, d, c)
        # Positions beyond the line see its cells too: their sums are finite, and not stored.
        scores = tl.where(_seen(positions, positions >= 0, others, others < n, c), scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp(most - new)
        weights = tl.exp(scores - new[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = _load(v, cells, others < n, channels, e, c)
        acc = _weighed(weights, values, acc * shrink[:, None], c)
        most = new
    if c.merge:
        before = tl.load(part_lse + at, ok, other=0.0)
        new = tl.maximum(most, before)
        kept, own = tl.exp(before - new), tl.exp(most - new)
        total = kept + own * total
        most = new
        inside = ok[:, None] & (channels < e)[None, :]
        old = tl.load(part + at[:, None] * e + channels[None, :], inside, other=0.0).to(c.acc)
        acc = acc * own[:, None] + old * kept[:, None]
    _store(part, out, image, line, positions, at, ok, channels, e, acc / total[:, None], c)
    if tl.program_id(1) == 0:
        tl.store((part_lse if c.column else lse) + at, most + tl.log(total), ok)


@triton.jit
def _value_gradient(
    q, k, g, lse, part, to, image, line, positions, block, lines, n, d: tl.constexpr, e: tl.constexpr, c: tl.constexpr
):  # fmt: skip
    """The gradient of values at ``positions``, one block of channels."""
    ok, at = positions < n, _cells(image, line, positions, lines, n, c)
    channels = block * c.channels + tl.arange(0, c.channels)
    acc = tile(c.own, c.channels, c.acc)
    for start in range(0, _end(n, c), c.other):
        others = start + tl.arange(0, c.other)
        cells = _cells(image, line, others, lines, n, c)
        scores = _products(k, q, at, ok, cells, others < n, d, c)
        log_sum = tl.load(lse + cells, others < n, other=0.0)
        weights = tl.where(
            _seen(positions, ok, others, others < n, c), tl.exp(scores - log_sum[None, :]), 0.0
        )
        acc = _weighed(weights, _load(g, cells, others < n, channels, e, c), acc, c)
    _add(part, to, image, line, positions, at, ok, channels, e, acc, c)


@triton.jit
def _score_gradient(
    own, other, own_side, other_side, lse, delta, part, to, other_part, other_to,
    image, line, positions, block, lines, n,
    d: tl.constexpr, e: tl.constexpr, KEY: tl.constexpr, c: tl.constexpr,
):  # fmt: skip
    """The gradient of queries at ``positions``, one block of channels; and of all keys of the line, if it is whole.

    own and other are query and key, own_side and other_side the upstream gradient and value; KEY swaps both pairs.
    """
    ok, at = positions < n, _cells(image, line, positions, lines, n, c)
    channels = block * c.wide + tl.arange(0, c.wide)
    acc = tile(c.own, c.wide, c.acc)
    if not KEY:
        log_sum = tl.load(lse + at, ok, other=0.0)[:, None]
        shift = tl.load(delta + at, ok, other=0.0)[:, None]
    for start in range(0, _end(n, c), c.other):
        others = start + tl.arange(0, c.other)
        inside, cells = others < n, _cells(image, line, others, lines, n, c)
        if KEY:
            log_sum = tl.load(lse + cells, inside, other=0.0)[None, :]
            shift = tl.load(delta + cells, inside, other=0.0)[None, :]
        scores = _products(own, other, at, ok, cells, inside, d, c)
        weights = tl.where(_seen(positions, ok, others, inside, c), tl.exp(scores - log_sum), 0.0)
        slopes = weights * (_products(own_side, other_side, at, ok, cells, inside, e, c) - shift)
        if KEY or c.query:
            acc = _weighed(slopes, _load(other, cells, inside, channels, d, c), acc, c)
        if c.whole and c.key:
            found = _weighed(
                tl.trans(slopes), _load(own, at, ok, channels, d, c), tile(c.other, c.wide, c.acc), c
            )
            _add(other_part, other_to, image, line, others, cells, inside, channels, d, found, c)
    if KEY or c.query:
        _add(part, to, image, line, positions, at, ok, channels, d, acc, c)


@jit
def backward_lines(
    q, k, v, g, lse, delta, part_q, part_k, part_v, to_q, to_k, to_v, lines, n, first_kind,
    d: tl.constexpr, e: tl.constexpr, c: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of positions; grid (B * lines * blocks, kinds).

    Kinds: blocks of channels of the query, of the key (with the query's where lines are whole), of the value.
    """
    image, line, first = _program(lines, n, c)
    positions = first + tl.arange(0, c.own)
    blocks, kind = tl.cdiv(d, c.wide), tl.program_id(1) + first_kind
    scored = blocks if c.whole else 2 * blocks
    if kind >= scored:
        _value_gradient(
            q, k, g, lse, part_v, to_v, image, line, positions, kind - scored, lines, n, d, e, c
        )  # fmt: skip
    elif kind < blocks:
        if c.query or (c.whole and c.key):
            _score_gradient(
                q, k, g, v, lse, delta, part_q, to_q, part_k, to_k,
                image, line, positions, kind, lines, n, d, e, False, c,
            )  # fmt: skip
    elif c.key and not c.whole:
        _score_gradient(
            k, q, v, g, lse, delta, part_k, to_k, part_q, to_q,
            image, line, positions, kind - blocks, lines, n, d, e, True, c,
        )  # fmt: skip
