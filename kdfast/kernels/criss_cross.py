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
import triton.language as tl
from torch import Tensor

from .. import backend
from ..reference._common import accumulator
from ._launch import capability, cdiv, next_power_of_2, on_device, options, precision
from .criss_cross_lines import Config, Map, backward_lines, forward_lines, prepare

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
