"""Triton backend of the op ``criss_cross``.

Kernels read maps as rows of cells [B, H, W, C], whose channels are neighbours: ``prepare`` copies those that lie otherwise.
A program has a block of positions of one line and walks over the line's cells: columns first, then rows, which merge
their result with the first by the log-sum-exp. Launches: forward 3, backward 3; forward 2 where channels are neighbours
already. Where a line fits one block (``whole``), queries and keys share their products: operations per position and pass
over lines of n cells are then forward 2 n (d + e) and backward 2 n (4 d + 2 e), besides the scores once more for every
block of channels; longer lines take 2 n (5 d + 3 e).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..reference._common import accumulator
from ._jit import jit
from ._launch import capability, cdiv, next_power_of_2, on_device, options, precision
from ._zeros import tile, vector


class Map(NamedTuple):
    """A map [B, C, H, W] wherever it lies."""

    data: Tensor
    image: int
    channel: int
    line: int
    position: int


MAX = 1 << 30


class Tiles(NamedTuple):
    own: int  # positions of a program
    whole: int  # most positions of a program of the backward that has all of its line
    other: int  # cells of a step
    inner: int  # contracted channels of a step
    channels: int  # of a program's result
    warps: int
    stages: int


# Three TF32 products add up to float32's precision.
FLOAT32 = "ieee" if torch.version.hip else "tf32x3"
# By the precision of the products ("half": half types as they are), for lines of at most so many cells.
FORWARD = {
    "ieee": {MAX: Tiles(16, 0, 16, 16, 16, 4, 1)},
    "tf32x3": {MAX: Tiles(64, 0, 64, 32, 64, 4, 2)},
    "tf32": {MAX: Tiles(64, 0, 64, 32, 64, 4, 2)},
    "half": {MAX: Tiles(64, 0, 64, 64, 64, 4, 2)},
}
BACKWARD = {
    "ieee": {MAX: Tiles(16, 0, 16, 16, 16, 4, 1)},
    "tf32x3": {64: Tiles(64, 64, 64, 16, 64, 4, 3), MAX: Tiles(64, 0, 32, 16, 64, 4, 2)},
    "tf32": {64: Tiles(64, 64, 64, 32, 64, 4, 2), MAX: Tiles(64, 0, 32, 32, 64, 4, 2)},
    "half": {64: Tiles(64, 64, 64, 32, 64, 4, 2), MAX: Tiles(64, 0, 64, 32, 64, 4, 2)},
}
# Where products of tiles need all of their operands in registers.
SMALL = Tiles(32, 0, 32, 16, 32, 4, 2)
TERMS = 2  # bfloat16 numbers that a weight is split into: 2 keep 16 bits
WIDE = 64  # most channels of queries and keys whose gradient a program has
PIXELS, CHANNELS = 64, 64  # of a tile of ``prepare``


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
def _copy(m, to, image, pixels, ok, offset, first, count, total, CHANNELS: tl.constexpr):
    """A tile of the map to cells; returns it as [channels, pixels]."""
    channels = (first + tl.arange(0, CHANNELS)).to(tl.int64)
    inside = (channels < count)[:, None] & ok[None, :]
    x = tl.load(m.data + image * m.image + channels[:, None] * m.channel + offset[None, :], inside, other=0.0)
    at = to + (image * total + pixels)[:, None] * count + channels[None, :]
    tl.store(at, tl.trans(x), ok[:, None] & (channels < count)[None, :])


@triton.jit
def _offset(m, pixels, width, FLAT: tl.constexpr):
    if FLAT:
        return pixels * m.position
    return pixels // width * m.line + pixels % width * m.position


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
        at = _offset(q, pixels, width, FLAT)
        _copy(q, cells_q, image, pixels, ok, at, block * CHANNELS, d, total, CHANNELS)
    elif block < q_blocks + k_blocks:
        at = _offset(k, pixels, width, FLAT)
        _copy(k, cells_k, image, pixels, ok, at, (block - q_blocks) * CHANNELS, d, total, CHANNELS)
    elif block < q_blocks + k_blocks + v_blocks:
        at = _offset(v, pixels, width, FLAT)
        _copy(v, cells_v, image, pixels, ok, at, (block - q_blocks - k_blocks) * CHANNELS, e, total, CHANNELS)
    elif DELTA or COPY:
        g_at, out_at = _offset(g, pixels, width, FLAT), _offset(out, pixels, width, FLAT)
        dot = vector(PIXELS, ACC)
        for first in range(0, e, CHANNELS):
            channels = (first + tl.arange(0, CHANNELS)).to(tl.int64)
            inside = (channels < e)[:, None] & ok[None, :]
            a = g.data + image * g.image + channels[:, None] * g.channel + g_at[None, :]
            b = out.data + image * out.image + channels[:, None] * out.channel + out_at[None, :]
            x = tl.load(a, inside, other=0.0)
            if DELTA:
                dot += tl.sum(x.to(ACC) * tl.load(b, inside, other=0.0).to(ACC), 0)
            if COPY:
                at = cells_g + (image * total + pixels)[:, None] * e + channels[None, :]
                tl.store(at, tl.trans(x), ok[:, None] & (channels < e)[None, :])
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
    q,
    k,
    v,
    g,
    lse,
    delta,
    part_q,
    part_k,
    part_v,
    to_q,
    to_k,
    to_v,
    lines,
    n,
    first_kind,
    d: tl.constexpr,
    e: tl.constexpr,
    c: tl.constexpr,
):
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


def _map(x: Tensor) -> Map:
    return Map(x, *x.stride()) if x.dim() == 4 else Map(x, 0, 0, 0, 0)  # the latter: no gradient needed


def _tiles(table: dict[int, Tiles], n: int, v: Tensor) -> Tiles:
    if v.dtype != torch.float64 and capability(v) < 9:
        return SMALL
    return table[min(most for most in table if n <= most)]


def _is_cells(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _cells_of(x: Tensor) -> Tensor:
    """Room for the map as cells; the map's own memory where it lies so."""
    return x if _is_cells(x) else x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]))


class _Call:
    """Sizes and launches that both directions share."""

    def __init__(self, query: Tensor, value: Tensor) -> None:
        self.value = value
        self.batch, self.e, self.height, self.width = value.shape
        self.d = query.shape[1]
        self.dtype = accumulator(value)
        kind = precision(value.dtype)
        if value.dtype == torch.float32 and kind == "ieee":
            kind = FLOAT32
        self.half = value.dtype in (torch.float16, torch.bfloat16)
        self.precision, self.tiles = kind, "half" if self.half else kind

    def statistics(self) -> Tensor:
        return self.value.new_empty((self.batch, self.height, self.width), dtype=self.dtype)

    def passes(self):
        """column, lines and cells of the column pass where a column has other cells, and of the row pass."""
        if self.height > 1:
            yield True, self.width, self.height
        yield False, self.height, self.width

    def prepare(self, maps: list[Tensor], grad: Tensor | None = None, out: Tensor | None = None, delta=None):
        """``maps`` (query, key, value) and the gradient as cells."""
        cells = [_cells_of(m) for m in maps]
        counts = [0 if c is m else cdiv(m.shape[1], CHANNELS) for c, m in zip(cells, maps, strict=True)]
        grad_cells = maps[2] if grad is None else _cells_of(grad)
        grad, out = (maps[2] if v is None else v for v in (grad, out))
        total, wanted = self.height * self.width, delta is not None
        copy = grad_cells is not grad
        rows = sum(counts) + (wanted or copy)
        if rows:
            given = [*maps, grad, out]
            flat = all(v.stride(2) == self.width * v.stride(3) for v in given)
            prepare[(self.batch * cdiv(total, PIXELS), rows)](
                *map(_map, given), *cells, grad_cells, grad_cells if delta is None else delta, total, self.width,
                self.d, self.e, *counts, DELTA=wanted, COPY=copy, FLAT=flat,
                ACC=tl.float64 if self.dtype == torch.float64 else tl.float32,
                PIXELS=PIXELS, CHANNELS=CHANNELS, **options(4, 1),
            )  # fmt: skip
        return *cells, grad_cells

    def config(self, tiles: Tiles, n: int, column: bool, needed: tuple[bool, bool] | None) -> Config:
        def at_most(size: int, needed: int) -> int:
            return max(16, min(size, next_power_of_2(needed)))

        whole = needed is not None and n <= tiles.whole
        own = at_most(tiles.whole if whole else tiles.own, n)
        other = at_most(tiles.other, n)
        native = self.half and not (self.value.dtype == torch.bfloat16 and backend.interpreting())
        acc = tl.float64 if self.dtype == torch.float64 else tl.float32
        terms = TERMS if native and self.value.dtype == torch.bfloat16 else 0
        return Config(
            own, other, tiles.inner, at_most(tiles.channels, self.e), at_most(WIDE, self.d), column,
            not column and self.height > 1, whole, n <= other, *(needed or (False, False)), acc, self.precision, native, terms,
        )  # fmt: skip


def criss_cross(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Implementation of ``kdfast::criss_cross_triton``; the reference says what it computes."""
    call = _Call(query, value)
    out, lse = torch.empty_like(value), call.statistics()
    if not value.numel():
        return out, lse
    with on_device(value):
        q, k, v, _ = call.prepare([query, key, value])
        part = _cells_of(out) if call.height > 1 else out
        part_lse = call.statistics() if call.height > 1 else lse
        for column, lines, n in call.passes():
            tiles = _tiles(FORWARD[call.tiles], n, value)
            c = call.config(tiles, n, column, None)
            grid = (call.batch * lines * cdiv(n, c.own), cdiv(call.e, c.channels))
            forward_lines[grid](
                q, k, v, part, _map(out), part_lse, lse, lines, n, call.d, call.e, c=c,
                **options(tiles.warps, tiles.stages),
            )  # fmt: skip
    return out, lse


def criss_cross_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implementation of ``kdfast::criss_cross_backward_triton``."""
    call = _Call(query, value)
    needed = (need_query, need_key, need_value)
    found = [
        torch.empty_like(v) if need else value.new_empty(0)
        for v, need in zip((query, key, value), needed, strict=True)
    ]
    if not (value.numel() and any(needed)):
        return tuple(found)
    scored = need_query or need_key
    with on_device(value):
        delta = call.statistics() if scored else None
        q, k, v, g = call.prepare([query, key, value], grad_out, out, delta)
        several = call.height > 1
        parts = [_cells_of(x) if several and x.dim() == 4 else x for x in found]
        for column, lines, n in call.passes():
            tiles = _tiles(BACKWARD[call.tiles], n, value)
            c = call.config(tiles, n, column, (need_query, need_key))
            blocks = cdiv(call.d, c.wide) * (1 if c.whole else 2)
            first = 0 if scored else blocks
            kinds = blocks + (cdiv(call.e, c.channels) if need_value else 0) - first
            backward_lines[(call.batch * lines * cdiv(n, c.own), kinds)](
                q, k, v, g, lse, lse if delta is None else delta, *parts, *map(_map, found), lines, n, first,
                call.d, call.e, c=c, **options(tiles.warps, tiles.stages),
            )  # fmt: skip
    return tuple(found)
