"""Kind ``dist`` of the Triton backend of ``logits``: Pearson correlations of rows and columns of softmax outputs.

Launches: forward 4 (rows, parts of columns, columns joined, mean), backward 1 for each side. The logits are read twice
by rows and twice by columns forward, twice backward; a part of columns keeps five numbers per class. Probabilities are
the same to the last bit in every kernel (no fused multiply-add): differences from a mean may be all rounding.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._jit import jit
from ._launch import cdiv
from .logits import _block, _Call
from .logits_rows import LOWEST, _load, _pair, finish

EPS = tl.constexpr(1e-8)  # the published denominator's
BLOCK, BACKWARD_BLOCK = 1024, 512
TILE_ROWS, TILE_COLUMNS = 8, 64
PART_ROWS, MOST_PARTS = 64, 128  # rows of a part at least; parts at most: fixed by the shape


@triton.jit
def _probability(z, top, scale, inverse):
    return tl.exp((z - top) * scale) * inverse


@triton.jit
def _distance(product, norm_s, norm_t):
    distance = 1 - product / (norm_s * norm_t + EPS)
    return tl.where(distance < 0, 0.0, distance)


@triton.jit
def _pull(by, product, norm_own, norm_other):
    """Factors of the other side's deviation and of the own in by * d correlation / d own."""
    d = norm_own * norm_other + EPS
    own = -(by / d) * (product / d) * (norm_other / tl.where(norm_own > 0, norm_own, 1.0))
    return by / d, tl.where(norm_own > 0, own, 0.0)


@jit
def dist_rows(
    s, t, labels, saved, values, shape_s, shape_t, classes, alpha: tl.float64, inverse_t: tl.float64, ignored,
    has_labels: tl.constexpr, acc: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """saved [rows, 7]: maximum and 1 / sum of both sides, norms of p - 1 / K and q - 1 / K, their product."""
    row = tl.program_id(0)
    saved += row.to(tl.int64) * 7
    limit = classes + 0 * row  # classes to read: none of a row that does not count
    if has_labels:
        limit = tl.where(tl.load(labels + row) != ignored, classes, 0)
    counts = limit > 0
    s += _pair(row, shape_s)
    t += _pair(row, shape_t)
    scale = tl.full([], inverse_t, acc)
    lanes = tl.arange(0, BLOCK)
    max_s, max_t = tl.full([BLOCK], LOWEST, acc), tl.full([BLOCK], LOWEST, acc)
    sum_s, sum_t = tl.zeros([BLOCK], acc), tl.zeros([BLOCK], acc)
    for first in range(0, classes, BLOCK):
        k = first + lanes
        ok = k < limit
        zs, zt = _load(s, k, shape_s, ok, acc), _load(t, k, shape_t, ok, acc)
        new_s, new_t = tl.maximum(max_s, zs), tl.maximum(max_t, zt)
        sum_s = sum_s * tl.exp((max_s - new_s) * scale) + tl.exp((zs - new_s) * scale)
        sum_t = sum_t * tl.exp((max_t - new_t) * scale) + tl.exp((zt - new_t) * scale)
        max_s, max_t = new_s, new_t
    top_s, top_t = tl.max(max_s, 0), tl.max(max_t, 0)
    total_s = tl.sum(sum_s * tl.exp((max_s - top_s) * scale), 0)
    total_t = tl.sum(sum_t * tl.exp((max_t - top_t) * scale), 0)
    # A row that does not count has sums of 0, and probabilities of 0 for the columns.
    inverse_s = tl.where(counts, 1 / tl.where(counts, total_s, 1.0), 0.0)
    inverse_q = tl.where(counts, 1 / tl.where(counts, total_t, 1.0), 0.0)
    mean = 1 / tl.full([], classes, acc)
    st, ss, tt = tl.zeros([BLOCK], acc), tl.zeros([BLOCK], acc), tl.zeros([BLOCK], acc)
    for first in range(0, classes, BLOCK):
        k = first + lanes
        ok = k < limit
        a = _probability(_load(s, k, shape_s, ok, acc), top_s, scale, inverse_s) - mean
        b = _probability(_load(t, k, shape_t, ok, acc), top_t, scale, inverse_q) - mean
        a, b = tl.where(ok, a, 0.0), tl.where(ok, b, 0.0)
        st += a * b
        ss += a * a
        tt += b * b
    product, norm_s, norm_t = tl.sum(st, 0), tl.sqrt(tl.sum(ss, 0)), tl.sqrt(tl.sum(tt, 0))
    tl.store(saved, top_s)
    tl.store(saved + 1, inverse_s)
    tl.store(saved + 2, top_t)
    tl.store(saved + 3, inverse_q)
    tl.store(saved + 4, norm_s)
    tl.store(saved + 5, norm_t)
    tl.store(saved + 6, product)
    value = tl.full([], alpha, acc) * _distance(product, norm_s, norm_t)
    tl.store(values + row, tl.where(counts, value, 0.0))


@triton.jit
def _tile(s, t, labels, saved, row, k, end, shape_s, shape_t, classes, scale, ignored, has_labels: tl.constexpr,
          acc: tl.constexpr):  # fmt: skip
    """Probabilities [BR, BC] of both sides, and which rows count."""
    counts = row < end
    if has_labels:
        counts = counts & (tl.load(labels + row, counts, other=0) != ignored)
    ok = counts[:, None] & (k < classes)[None, :]
    here = saved + row.to(tl.int64) * 7
    top_s, inverse_s = tl.load(here, counts, other=0.0), tl.load(here + 1, counts, other=0.0)
    top_t, inverse_t = tl.load(here + 2, counts, other=0.0), tl.load(here + 3, counts, other=0.0)
    zs = _load(s + _pair(row, shape_s)[:, None], k[None, :], shape_s, ok, acc)
    zt = _load(t + _pair(row, shape_t)[:, None], k[None, :], shape_t, ok, acc)
    p = _probability(zs, top_s[:, None], scale, inverse_s[:, None])
    q = _probability(zt, top_t[:, None], scale, inverse_t[:, None])
    return p, q, counts


@jit
def dist_parts(
    s, t, labels, saved, parts, counted, shape_s, shape_t, rows, classes, inverse_t: tl.float64, ignored, part_rows,
    has_labels: tl.constexpr, acc: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """parts [P, 5, K]: means and moments about them (st, ss, tt) of a part's rows; counted [P]."""
    part = tl.program_id(0)
    k = tl.program_id(1) * BC + tl.arange(0, BC)
    scale = tl.full([], inverse_t, acc)
    start = part * part_rows
    end = tl.minimum(start + part_rows, rows)
    lanes = tl.arange(0, BR)
    # Of the first row, so that equal rows have a mean that is theirs to the last bit.
    p, q, counts = _tile(
        s, t, labels, saved, start + lanes, k, end, shape_s, shape_t, classes, scale, ignored, has_labels, acc
    )
    first_s = tl.sum(tl.where(lanes[:, None] == 0, p, 0.0), 0)
    first_t = tl.sum(tl.where(lanes[:, None] == 0, q, 0.0), 0)
    sum_s, sum_t, count = tl.zeros([BR, BC], acc), tl.zeros([BR, BC], acc), tl.zeros([BR], acc)
    for row in range(start, end, BR):
        p, q, counts = _tile(
            s,
            t,
            labels,
            saved,
            row + lanes,
            k,
            end,
            shape_s,
            shape_t,
            classes,
            scale,
            ignored,
            has_labels,
            acc,
        )
        sum_s += tl.where(counts[:, None], p - first_s[None, :], 0.0)
        sum_t += tl.where(counts[:, None], q - first_t[None, :], 0.0)
        count += tl.where(counts, 1.0, 0.0)
    total = tl.sum(count, 0)
    inverse = 1 / tl.maximum(total, 1.0)
    mean_s, mean_t = first_s + tl.sum(sum_s, 0) * inverse, first_t + tl.sum(sum_t, 0) * inverse
    st, ss, tt = tl.zeros([BR, BC], acc), tl.zeros([BR, BC], acc), tl.zeros([BR, BC], acc)
    for row in range(start, end, BR):
        p, q, counts = _tile(
            s,
            t,
            labels,
            saved,
            row + lanes,
            k,
            end,
            shape_s,
            shape_t,
            classes,
            scale,
            ignored,
            has_labels,
            acc,
        )
        a = tl.where(counts[:, None], p - mean_s[None, :], 0.0)
        b = tl.where(counts[:, None], q - mean_t[None, :], 0.0)
        st += a * b
        ss += a * a
        tt += b * b
    to = parts + part.to(tl.int64) * 5 * classes + k
    inside = k < classes
    tl.store(to, mean_s, inside)
    tl.store(to + classes, mean_t, inside)
    tl.store(to + 2 * classes, tl.sum(st, 0), inside)
    tl.store(to + 3 * classes, tl.sum(ss, 0), inside)
    tl.store(to + 4 * classes, tl.sum(tt, 0), inside)
    tl.store(counted + part, total)


@jit
def dist_columns(
    parts, counted, columns, values, classes, number, beta: tl.float64, acc: tl.constexpr, BC: tl.constexpr
):
    """columns [5, K]: means, norms and product over all rows; values [K]: the columns' terms. Joined as Chan et al."""
    k = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = k < classes
    mean_s, mean_t, st = tl.zeros([BC], acc), tl.zeros([BC], acc), tl.zeros([BC], acc)
    ss, tt, count = tl.zeros([BC], acc), tl.zeros([BC], acc), tl.zeros([], acc)
    here = parts + k
    for part in range(number):
        more = tl.load(counted + part)
        step = more / tl.maximum(count + more, 1.0)
        ds = tl.load(here, inside, other=0.0) - mean_s
        dt = tl.load(here + classes, inside, other=0.0) - mean_t
        mean_s += ds * step
        mean_t += dt * step
        st += tl.load(here + 2 * classes, inside, other=0.0) + ds * dt * (count * step)
        ss += tl.load(here + 3 * classes, inside, other=0.0) + ds * ds * (count * step)
        tt += tl.load(here + 4 * classes, inside, other=0.0) + dt * dt * (count * step)
        count += more
        here += 5 * classes
    norm_s, norm_t = tl.sqrt(ss), tl.sqrt(tt)
    tl.store(columns + k, mean_s, inside)
    tl.store(columns + classes + k, mean_t, inside)
    tl.store(columns + 2 * classes + k, norm_s, inside)
    tl.store(columns + 3 * classes + k, norm_t, inside)
    tl.store(columns + 4 * classes + k, st, inside)
    value = tl.full([], beta, acc) * _distance(st, norm_s, norm_t) / tl.full([], classes, acc)
    tl.store(values + k, tl.where(count > 0, value, 0.0), inside)


@jit
def dist_gradient(
    grad, own, other, labels, saved, columns, share, to, shape_own, shape_other, shape_to, classes,
    alpha: tl.float64, beta: tl.float64, inverse_t: tl.float64, ignored,
    teacher: tl.constexpr, has_labels: tl.constexpr, acc: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    limit = classes + 0 * row  # classes to read: none of a row that does not count
    if has_labels:
        limit = tl.where(tl.load(labels + row) != ignored, classes, 0)
    saved += row.to(tl.int64) * 7
    own += _pair(row, shape_own)
    other += _pair(row, shape_other)
    to += _pair(row, shape_to)
    side: tl.constexpr = 1 if teacher else 0
    top_own, inverse_own = tl.load(saved + 2 * side), tl.load(saved + 2 * side + 1)
    top_other, inverse_other = tl.load(saved + 2 - 2 * side), tl.load(saved + 3 - 2 * side)
    scale = tl.full([], inverse_t, acc)
    upstream = -tl.load(grad).to(acc) * scale
    by_row = upstream * tl.load(share) * tl.full([], alpha, acc)
    by_column = upstream * tl.full([], beta, acc) / tl.full([], classes, acc)
    row_other, row_own = _pull(
        by_row, tl.load(saved + 6), tl.load(saved + 4 + side), tl.load(saved + 5 - side)
    )
    mean = 1 / tl.full([], classes, acc)
    dot = tl.zeros([], acc)
    for again in tl.static_range(2):
        sums = tl.zeros([BLOCK], acc)
        for first in range(0, classes, BLOCK):
            k = first + tl.arange(0, BLOCK)
            inside = k < classes
            ok = k < limit
            a = _probability(_load(own, k, shape_own, ok, acc), top_own, scale, inverse_own)
            b = _probability(_load(other, k, shape_other, ok, acc), top_other, scale, inverse_other)
            here = columns + k
            column_other, column_own = _pull(
                by_column,
                tl.load(here + 4 * classes, ok, other=0.0),
                tl.load(here + (2 + side) * classes, ok, other=0.0),
                tl.load(here + (3 - side) * classes, ok, other=0.0),
            )
            gradient = row_other * (b - mean) + row_own * (a - mean)
            gradient += column_other * (b - tl.load(here + (1 - side) * classes, ok, other=0.0))
            gradient += column_own * (a - tl.load(here + side * classes, ok, other=0.0))
            if again:
                gradient = tl.where(ok, a * (gradient - dot), 0.0)
                tl.store(to + k.to(tl.int64) * shape_to[3], gradient.to(to.dtype.element_ty), inside)
            else:
                sums += tl.where(ok, gradient * a, 0.0)
        dot += tl.sum(sums, 0)


def _options(classes: int, most: int, wide: bool) -> dict[str, Any]:
    return {**_block(classes, most, wide), "enable_fp_fusion": False}


def forward(c: _Call, loss: Tensor, saved: Tensor) -> None:
    """loss and saved [rows, 7], [5, K] and the share, of a call."""
    columns, share = saved[c.rows * 7 : -1], saved[-1:]
    part_rows = max(PART_ROWS, cdiv(c.rows, MOST_PARTS))
    number = cdiv(c.rows, part_rows)
    values = saved.new_empty((c.rows + c.classes,))
    parts, counted = saved.new_empty((number, 5, c.classes)), saved.new_empty((number,))
    common = {"has_labels": c.constants["has_labels"], "acc": c.constants["acc"]}
    blocks = cdiv(c.classes, TILE_COLUMNS)
    if c.rows:
        dist_rows[(c.rows,)](
            c.student, c.teacher, c.labels, saved, values, c.shape_s, c.shape_t, c.classes, c.alpha, c.inverse_t,
            c.ignore_index, **common, **_options(c.classes, BLOCK, c.wide),
        )  # fmt: skip
        dist_parts[(number, blocks)](
            c.student, c.teacher, c.labels, saved, parts, counted, c.shape_s, c.shape_t, c.rows, c.classes,
            c.inverse_t, c.ignore_index, part_rows, **common, BR=TILE_ROWS, BC=TILE_COLUMNS, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    dist_columns[(blocks,)](
        parts, counted, columns, values[c.rows :], c.classes, number, c.beta, acc=common["acc"], BC=TILE_COLUMNS,
        num_warps=2,
    )  # fmt: skip
    finish[(1,)](
        values,
        c.labels,
        loss,
        share,
        c.rows,
        c.ignore_index,
        classes=c.classes,
        **common,
        BLOCK=1024,
        num_warps=4,
    )


def backward(c: _Call, grad: Tensor, saved: Tensor, to: Tensor, shape_to: tuple, is_teacher: bool) -> None:
    """The gradient of one side."""
    sides = [(c.student, c.shape_s), (c.teacher, c.shape_t)]
    (own, shape_own), (other, shape_other) = reversed(sides) if is_teacher else sides
    dist_gradient[(c.rows,)](
        grad, own, other, c.labels, saved, saved[c.rows * 7 : -1], saved[-1:], to, shape_own, shape_other, shape_to,
        c.classes, c.alpha, c.beta, c.inverse_t, c.ignore_index, teacher=is_teacher,
        has_labels=c.constants["has_labels"], acc=c.constants["acc"], **_options(c.classes, BACKWARD_BLOCK, c.wide),
    )  # fmt: skip
