"""Triton backend of the op ``affinity``: sums over sorted keys in chunks, and ReLU tiles inside the chunks that matter.

Queries ascending, keys descending: the keys that count for a query are a prefix. ``totals`` sums every chunk of keys, a
cumulative sum over the chunks gives what lies before each, and ``sweep`` takes a tile of neighbouring queries: the chunks
before all of their ranks come from the cumulative sum, those that the ranks fall into are compared pair by pair. Over all
tiles that is n / QUERIES + m / KEYS products of QUERIES x KEYS, besides reading values and writing results once.
Sums over chunks are float64, and over keys less their median: a_i G + H cancels where a_i and the b_j are large.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..ops.affinity import new_result
from ..reference._common import accumulator
from ._jit import jit
from ._launch import cdiv, next_power_of_2, on_device, options, precision

FLOAT32 = "ieee" if torch.version.hip else "tf32x3"  # three TF32 products add up to float32's precision
QUERIES, KEYS = 32, 32
WARPS = 8  # of a sweep
ROWS, SIDE_BY_SIDE = 64, 8  # of a tile of ``prefix``
COLUMNS = 64  # of e at a time, half in float64: the AOT tests see no register spilled


@jit
def totals(
    key_ptr, order_ptr, center_ptr, v_ptr, v_batch, v_row, v_col, to_ptr, keys, columns, chunks,
    KEYS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """to [B, chunks + 1, 2, e] float64, from row 1 on: sums of v_j and of (key_j - center) v_j over every chunk."""
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rank = chunk * KEYS + tl.arange(0, KEYS)
    ok = rank < keys
    j = tl.load(order_ptr + image * keys + rank, ok, other=0).to(tl.int64)
    key = tl.load(key_ptr + image * keys + rank, ok, other=0.0).to(tl.float64)
    key -= tl.load(center_ptr + image)
    to_ptr += (image * (chunks + 1) + chunk + 1) * 2 * columns
    for start in range(0, columns, BC):
        col = (start + tl.arange(0, BC)).to(tl.int64)
        mask = ok[:, None] & (col < columns)[None, :]
        v = tl.load(v_ptr + image * v_batch + j[:, None] * v_row + col[None, :] * v_col, mask, other=0.0)
        v = v.to(tl.float64)
        tl.store(to_ptr + col, tl.sum(v, 0), col < columns)
        tl.store(to_ptr + columns + col, tl.sum(key[:, None] * v, 0), col < columns)


@jit
def prefix(data_ptr, rows, columns, ROWS: tl.constexpr, BC: tl.constexpr):
    """Sums over the rows before and including each, in place; row 0, not yet written, becomes 0."""
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    data_ptr += tl.program_id(1).to(tl.int64) * rows * columns
    before = tl.zeros([BC], tl.float64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < columns)[None, :]
        at = data_ptr + row.to(tl.int64)[:, None] * columns + col[None, :]
        x = tl.load(at, inside & (row > 0)[:, None], other=0.0)
        tl.store(at, tl.cumsum(x, 0) + before[None, :], inside)
        before += tl.sum(x, 0)


@jit
def sweep(
    query_ptr, query_order_ptr, rank_ptr, key_ptr, key_order_ptr, center_ptr, before_ptr,
    v_ptr, v_batch, v_row, v_col, with_ptr, with_batch, with_row, with_col,
    out_ptr, out_batch, out_row, out_col, dots_ptr, queries, keys, columns, chunks, count,
    OUT: tl.constexpr, DOTS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out_i = (query_i G_i + H_i) / count and dots_i = <with_i, G_i> / count, for a tile of queries in ascending order."""
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    ok = place < queries
    query = tl.load(query_ptr + image * queries + place, ok, other=0.0)
    i = tl.load(query_order_ptr + image * queries + place, ok, other=0).to(tl.int64)
    rank = tl.load(rank_ptr + image * queries + place, ok, other=0)
    first = tl.min(tl.where(ok, rank, keys), 0) // KEYS
    last = tl.cdiv(tl.max(rank, 0), KEYS)
    before_ptr += (image * (chunks + 1) + first) * 2 * columns
    wide = query.to(tl.float64) + tl.load(center_ptr + image)
    dots = tl.zeros([QUERIES], tl.float64)
    for start in range(0, columns, BC):
        col = (start + tl.arange(0, BC)).to(tl.int64)
        in_row = col < columns
        # Inside the chunks the differences are taken first: exact, whatever the size of query and key.
        sums, values = tl.zeros([QUERIES, BC], ACC), tl.zeros([QUERIES, BC], ACC)
        for chunk in range(first, last):
            at = chunk * KEYS + tl.arange(0, KEYS)
            real = at < keys
            j = tl.load(key_order_ptr + image * keys + at, real, other=0).to(tl.int64)
            key = tl.load(key_ptr + image * keys + at, real, other=0.0)
            address = v_ptr + image * v_batch + j[:, None] * v_row + col[None, :] * v_col
            v = tl.load(address, real[:, None] & in_row[None, :], other=0.0).to(ACC)
            pair = query[:, None] + key[None, :]
            counts = (at[None, :] < rank[:, None]) & real[None, :]
            if OUT:
                values = tl.dot(
                    tl.where(counts, pair, 0.0).to(ACC), v, values, input_precision=PRECISION, out_dtype=ACC
                )
            if DOTS:
                sums = tl.dot(counts.to(ACC), v, sums, input_precision=PRECISION, out_dtype=ACC)
        g = tl.load(before_ptr + col, in_row, other=0.0)
        mask = ok[:, None] & in_row[None, :]
        if OUT:
            h = tl.load(before_ptr + columns + col, in_row, other=0.0)
            result = (values.to(tl.float64) + wide[:, None] * g[None, :] + h[None, :]) / count
            tl.store(
                out_ptr + image * out_batch + i[:, None] * out_row + col[None, :] * out_col, result, mask
            )
        if DOTS:
            address = with_ptr + image * with_batch + i[:, None] * with_row + col[None, :] * with_col
            other = tl.load(address, mask, other=0.0).to(tl.float64)
            dots += tl.sum(other * (sums.to(tl.float64) + g[None, :]), 1)
    if DOTS:
        tl.store(dots_ptr + image * queries + i, dots / count, ok)


def _sweep(
    query: Tensor, query_order: Tensor, key: Tensor, key_order: Tensor, v: Tensor,
    count: int, out: Tensor | None, other: Tensor | None, dots: Tensor | None,
) -> None:  # fmt: skip
    """Orders are ascending; see the kernel. ``query`` [B, n], ``key`` [B, m], ``v`` [B, m, e]."""
    (batch, queries), (keys, columns) = query.shape, v.shape[1:]
    dtype = accumulator(v)  # the orders are contiguous, and what is gathered by them is
    ascending = query.to(dtype).gather(1, query_order.long())
    key_order = key_order.flip(1)
    descending = key.to(dtype).gather(1, key_order.long())
    center = descending[:, keys // 2].double()  # large offsets cancel before they are summed
    center = torch.where(center.isfinite(), center, 0)
    # Keys above -query: those before its place from the right in the ascending negatives.
    rank = torch.searchsorted(-descending, ascending).to(torch.int32)
    chunks = cdiv(keys, KEYS)
    wide = dtype == torch.float64
    bc = min(COLUMNS // (2 if wide else 1), max(16, next_power_of_2(columns)))
    kind = precision(v.dtype)
    before = v.new_empty((batch, chunks + 1, 2, columns), dtype=torch.float64)
    with on_device(v):
        totals[(chunks, batch)](
            descending,
            key_order,
            center,
            v,
            *v.stride(),
            before,
            keys,
            columns,
            chunks,
            KEYS,
            bc,
            num_warps=4,
        )
        prefix[(cdiv(2 * columns, SIDE_BY_SIDE), batch)](
            before, chunks + 1, 2 * columns, ROWS, SIDE_BY_SIDE, num_warps=4
        )
        to, given = v if out is None else out, v if other is None else other
        sweep[(cdiv(queries, QUERIES), batch)](
            ascending, query_order, rank, descending, key_order, center, before, v, *v.stride(), given, *given.stride(),
            to, *to.stride(), before if dots is None else dots, queries, keys, columns, chunks, count,
            out is not None, dots is not None, tl.float64 if wide else tl.float32,
            FLOAT32 if kind == "ieee" and not wide else kind, QUERIES, KEYS, bc, **options(WARPS, stages=1),
        )  # fmt: skip


def affinity(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Implementation of ``kdfast::affinity_triton``; the reference says what it computes."""
    orders = [
        torch.argsort(v.to(accumulator(v)), dim=1, stable=True).to(torch.int32).contiguous() for v in (a, b)
    ]
    out = new_result(a, g)
    if out.numel():
        _sweep(a, orders[0], b, orders[1], g, b.shape[1], out, None, None)
    return out, *orders


def affinity_backward(
    grad: Tensor, a: Tensor, b: Tensor, g: Tensor, order_a: Tensor, order_b: Tensor,
    need_a: bool, need_b: bool, need_g: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implementation of ``kdfast::affinity_backward_triton``."""
    dots = [
        v.new_zeros(v.shape, dtype=torch.float64) if need else None for v, need in ((a, need_a), (b, need_b))
    ]
    grad_g = torch.empty_like(g) if need_g else g.new_empty(0)
    count = b.shape[1]
    if grad.numel():
        if need_a:
            _sweep(a, order_a, b, order_b, g, count, None, grad, dots[0])
        if need_b or need_g:
            _sweep(b, order_b, a, order_a, grad, count, grad_g if need_g else None, g, dots[1])
    elif need_g:
        grad_g.zero_()
    results = [
        v.new_empty(0) if d is None else torch.empty_like(v).copy_(d)
        for v, d in zip((a, b), dots, strict=True)
    ]
    return *results, grad_g
