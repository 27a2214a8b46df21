"""Triton backend of the op ``criss_cross``.

A program has a block of positions of one line and walks over the line's cells: image rows first, then columns, which
merge their result with the first by the log-sum-exp. Launches: forward 2, backward 1 + 2 x 3. Operations per position
and pass over lines of n cells: forward 2 n (d + e), backward 2 n (5 d + 3 e), since each of the three gradients
computes the weights again. Maps are read in place whatever their strides; programs that follow one another have
neighbouring lines, so that the cache serves columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference._common import accumulator
from ._launch import on_device, options, precision
from ._zeros import tile, vector


class Map(NamedTuple):
    """A map [B, C, H, W] in place: ``line`` strides over lines, ``position`` along one."""

    data: Tensor
    image: int
    channel: int
    line: int
    position: int


class Config(NamedTuple):
    """Compile-time side of a launch."""

    own: int  # positions of a program
    other: int  # cells of a step
    inner: int  # contracted channels of a step
    channels: int  # of a program's result
    column: bool  # the second pass: leaves the own cell out, adds to the results of the first
    acc: tl.dtype
    precision: str  # input_precision of every product


@triton.jit
def _program(lines, n, c: tl.constexpr):
    """Image, line and positions of this program, and its first channel; the line changes fastest."""
    program, blocks = tl.program_id(0), tl.cdiv(n, c.own)
    line, block, image = program % lines, program // lines % blocks, program // lines // blocks
    first = tl.program_id(1) * c.channels
    return image.to(tl.int64), line.to(tl.int64), block * c.own + tl.arange(0, c.own), first


@triton.jit
def _at(m, image, line, positions, channels):
    start = m.data + image * m.image + line * m.line
    return start + positions.to(tl.int64)[:, None] * m.position + channels.to(tl.int64)[None, :] * m.channel


@triton.jit
def _load(m, image, line, positions, channels, n, count, c: tl.constexpr):
    """A tile [positions, channels], 0 outside."""
    ok = (positions < n)[:, None] & (channels < count)[None, :]
    return tl.load(_at(m, image, line, positions, channels), ok, other=0.0).to(c.acc)


@triton.jit
def _products(own, other, image, line, positions, cells, n, count, c: tl.constexpr):
    """<own, other> [positions, cells] over ``count`` channels."""
    total = tile(c.own, c.other, c.acc)
    for start in range(0, count, c.inner):
        channels = start + tl.arange(0, c.inner)
        a = _load(own, image, line, positions, channels, n, count, c)
        b = _load(other, image, line, cells, channels, n, count, c)
        total = tl.dot(a, tl.trans(b), total, input_precision=c.precision, out_dtype=c.acc)
    return total


@triton.jit
def _statistics(line, positions, image, lines, n, c: tl.constexpr):
    """Where numbers [B, H, W] of positions lie."""
    if c.column:
        return image * lines * n + positions.to(tl.int64) * lines + line
    return image * lines * n + line * n + positions.to(tl.int64)


@triton.jit
def _seen(positions, cells, n, c: tl.constexpr):
    if c.column:
        return (cells < n)[None, :] & (positions[:, None] != cells[None, :])
    return (cells < n)[None, :] & (positions[:, None] >= 0)


@triton.jit
def _add_to(m, image, line, positions, channels, n, count, tile, c: tl.constexpr):
    ok = (positions < n)[:, None] & (channels < count)[None, :]
    at = _at(m, image, line, positions, channels)
    if c.column:
        tile += tl.load(at, ok, other=0.0).to(c.acc)
    tl.store(at, tile.to(m.data.dtype.element_ty), ok)


@triton.jit
def forward_lines(q, k, v, out, row_lse, lse, lines, n, d, e, c: tl.constexpr):
    """out and lse of a block of positions; grid (B * lines * blocks, blocks of channels)."""
    image, line, positions, first = _program(lines, n, c)
    channels = first + tl.arange(0, c.channels)
    most = vector(c.own, c.acc) - float("inf")
    total = vector(c.own, c.acc)
    acc = tile(c.own, c.channels, c.acc)
    for start in range(0, n, c.other):
        cells = start + tl.arange(0, c.other)
        scores = _products(q, k, image, line, positions, cells, n, d, c)
        scores = tl.where(_seen(positions, cells, n, c), scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp(most - new)
        weights = tl.exp(scores - new[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = _load(v, image, line, cells, channels, n, e, c)
        acc = tl.dot(weights, values, acc * shrink[:, None], input_precision=c.precision, out_dtype=c.acc)
        most = new
    ok, at = positions < n, _statistics(line, positions, image, lines, n, c)
    if c.column:
        before = tl.load(row_lse + at, ok, other=0.0)
        new = tl.maximum(most, before)
        kept, own = tl.exp(before - new), tl.exp(most - new)
        total = kept + own * total
        most = new
        acc *= own[:, None]
        inside = ok[:, None] & (channels < e)[None, :]
        old = tl.load(_at(out, image, line, positions, channels), inside, other=0.0).to(c.acc)
        acc += old * kept[:, None]
    acc = acc / total[:, None]
    inside = ok[:, None] & (channels < e)[None, :]
    tl.store(_at(out, image, line, positions, channels), acc.to(out.data.dtype.element_ty), inside)
    if first == 0:
        tl.store(lse + at, most + tl.log(total), ok)


@triton.jit
def deltas(grad, out, delta, lines, n, e, c: tl.constexpr):
    """delta = <out, grad> over the channels of every position; grid (B * lines * blocks, 1)."""
    image, line, positions, first = _program(lines, n, c)
    total = vector(c.own, c.acc)
    for start in range(0, e, c.inner):
        channels = start + tl.arange(0, c.inner)
        a = _load(grad, image, line, positions, channels, n, e, c)
        total += tl.sum(a * _load(out, image, line, positions, channels, n, e, c), 1)
    tl.store(delta + _statistics(line, positions, image, lines, n, c), total, positions < n)


@triton.jit
def value_lines(grad, q, k, lse, to, lines, n, d, e, c: tl.constexpr):
    """The gradient of a block of values; grid (B * lines * blocks, blocks of channels)."""
    image, line, positions, first = _program(lines, n, c)
    channels = first + tl.arange(0, c.channels)
    acc = tile(c.own, c.channels, c.acc)
    for start in range(0, n, c.other):
        cells = start + tl.arange(0, c.other)
        scores = _products(k, q, image, line, positions, cells, n, d, c)
        log_sum = tl.load(lse + _statistics(line, cells, image, lines, n, c), cells < n, other=0.0)
        seen = _seen(positions, cells, n, c) & (positions < n)[:, None]
        weights = tl.where(seen, tl.exp(scores - log_sum[None, :]), 0.0)
        g = _load(grad, image, line, cells, channels, n, e, c)
        acc = tl.dot(weights, g, acc, input_precision=c.precision, out_dtype=c.acc)
    _add_to(to, image, line, positions, channels, n, e, acc, c)


@triton.jit
def score_lines(
    own, other, own_side, other_side, lse, delta, to, lines, n, d, e, KEY: tl.constexpr, c: tl.constexpr
):
    """The gradient of a block of queries, or of keys (KEY); grid (B * lines * blocks, blocks of channels).

    own and other are query and key, own_side and other_side the upstream gradient and value; KEY swaps both pairs.
    """
    image, line, positions, first = _program(lines, n, c)
    channels = first + tl.arange(0, c.channels)
    acc = tile(c.own, c.channels, c.acc)
    own_at, own_ok = _statistics(line, positions, image, lines, n, c), positions < n
    if not KEY:
        log_sum = tl.load(lse + own_at, own_ok, other=0.0)[:, None]
        shift = tl.load(delta + own_at, own_ok, other=0.0)[:, None]
    for start in range(0, n, c.other):
        cells = start + tl.arange(0, c.other)
        if KEY:
            at = _statistics(line, cells, image, lines, n, c)
            log_sum = tl.load(lse + at, cells < n, other=0.0)[None, :]
            shift = tl.load(delta + at, cells < n, other=0.0)[None, :]
        scores = _products(own, other, image, line, positions, cells, n, d, c)
        seen = _seen(positions, cells, n, c) & own_ok[:, None]
        weights = tl.where(seen, tl.exp(scores - log_sum), 0.0)
        slopes = weights * (_products(own_side, other_side, image, line, positions, cells, n, e, c) - shift)
        b = _load(other, image, line, cells, channels, n, d, c)
        acc = tl.dot(slopes, b, acc, input_precision=c.precision, out_dtype=c.acc)
    _add_to(to, image, line, positions, channels, n, d, acc, c)


def _map(x: Tensor, column: bool) -> Map:
    image, channel, row, pixel = x.stride()
    return Map(x, image, channel, pixel, row) if column else Map(x, image, channel, row, pixel)


def _config(x: Tensor, channels: int, column: bool) -> tuple[Config, dict[str, int]]:
    """Tiles whose sums, and one step of whose products, fit the registers; on FMA units (ieee) they are smaller."""
    kind, n = precision(x.dtype), x.shape[2 if column else 3]
    own, other, inner, most = (64, 32, 32, 64) if kind == "tf32" else (32, 32, 16, 32)
    acc = tl.float32
    if x.dtype == torch.float64:
        own, other, inner, most, acc = 16, 16, 16, 16, tl.float64

    def at_most(size: int, needed: int) -> int:
        return max(16, min(size, triton.next_power_of_2(needed)))

    c = Config(at_most(own, n), at_most(other, n), inner, at_most(most, channels), column, acc, kind)
    return c, options(8 if c.own == 64 else 4)


class _Call:
    """Sizes and grids that both directions share."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.batch, _, self.height, self.width = value.shape
        self.dtype = accumulator(value)

    def passes(self):
        """column, lines and cells of the row pass, and of the column pass where a column has other cells."""
        if self.value.numel():
            yield False, self.height, self.width
            if self.height > 1:
                yield True, self.width, self.height

    def statistics(self) -> Tensor:
        return self.value.new_empty((self.batch, self.height, self.width), dtype=self.dtype)

    def launch(self, kernel, column: bool, lines: int, n: int, channels: int, *args, **constants) -> None:
        c, compiled = _config(self.value, channels, column)
        grid = (self.batch * lines * triton.cdiv(n, c.own), triton.cdiv(channels, c.channels))
        maps = [_map(a, column) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args]
        kernel[grid](*maps[:-1], lines, n, *maps[-1], **constants, c=c, **compiled)


def criss_cross(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Implementation of ``kdfast::criss_cross_triton``; the reference says what it computes."""
    call, d, e = _Call(value), query.shape[1], value.shape[1]
    out, lse = torch.empty_like(value), call.statistics()
    row_lse = call.statistics() if call.height > 1 else lse
    with on_device(value):
        for column, lines, n in call.passes():
            to = lse if column else row_lse
            call.launch(forward_lines, column, lines, n, e, query, key, value, out, row_lse, to, (d, e))
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
    call, d, e = _Call(value), query.shape[1], value.shape[1]
    needed = (need_query, need_key, need_value)
    grad_query, grad_key, grad_value = (
        torch.empty_like(v) if need else value.new_empty(0)
        for v, need in zip((query, key, value), needed, strict=True)
    )
    with on_device(value):
        delta = call.statistics() if need_query or need_key else lse
        for column, lines, n in call.passes():
            size = (d, e)
            if need_value:
                call.launch(value_lines, column, lines, n, e, grad_out, query, key, lse, grad_value, size)
            if not column and (need_query or need_key):
                call.launch(deltas, column, lines, n, 1, grad_out, out, delta, (e,))
            if need_query:
                args = (query, key, grad_out, value, lse, delta, grad_query, size)
                call.launch(score_lines, column, lines, n, d, *args, KEY=False)
            if need_key:
                args = (key, query, value, grad_out, lse, delta, grad_key, size)
                call.launch(score_lines, column, lines, n, d, *args, KEY=True)
    return grad_query, grad_key, grad_value
