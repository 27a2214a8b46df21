"""Kernels of the op ``logits`` for kl, dkd and nkd; :mod:`kdfast.kernels.logits` launches them."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ._jit import jit

KL, DKD, NKD = (tl.constexpr(i) for i in range(3))
LOWEST = tl.constexpr(-1e30)
LN2, LOG2E = tl.constexpr(math.log(2)), tl.constexpr(1 / math.log(2))


@triton.jit
def _pair(offset, shape):
    """Offset of a row among two row axes: shape (inner size, outer stride, inner stride, class stride)."""
    return (offset // shape[0]).to(tl.int64) * shape[1] + (offset % shape[0]).to(tl.int64) * shape[2]


@triton.jit
def _load(base, k, shape, ok, acc: tl.constexpr):
    return tl.load(base + k.to(tl.int64) * shape[3], ok, other=float("-inf")).to(acc)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _joined(
    max_s, sum_s, max_t, sum_t, cross, plain_s, plain_t, scale, kind: tl.constexpr, plain: tl.constexpr
):
    """Sums [N, L] that lanes made on their own maxima, over the lanes, on the largest; scale counts powers of two."""
    top_s, top_t = tl.max(max_s, 1), tl.max(max_t, 1)
    step_s, step_t = (max_s - top_s[:, None]) * scale, (max_t - top_t[:, None]) * scale
    shrink = tl.exp2(step_t)
    # A lane without a logit has the lowest maximum and sums of 0: its cross is 0 times a large number.
    moved = cross + tl.where(sum_t == 0, 0.0, sum_t * ((-step_s) if kind == NKD else (step_t - step_s)))
    total_s, total_t = tl.sum(sum_s * tl.exp2(step_s), 1), tl.sum(sum_t * shrink, 1)
    if plain:
        plain_s = tl.sum(plain_s * tl.exp(max_s - top_s[:, None]), 1)
        plain_t = tl.sum(plain_t * tl.exp(max_t - top_t[:, None]), 1)
    else:
        plain_s, plain_t = total_s, total_t
    return top_s, total_s, top_t, total_t, tl.sum(moved * shrink, 1), plain_s, plain_t


@triton.jit
def _row_values(
    row, ok, sums, s, t, labels, saved, shape_s, shape_t, classes, alpha, beta, scale, ignored,
    kind: tl.constexpr, has_labels: tl.constexpr, plain: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Terms of the loss of rows [N], 0 where ignored, from the sums of :func:`_joined`; writes what they save."""
    top_s, total_s, top_t, total_t, cross, plain_s, plain_t = sums
    log_s, log_t = tl.log(total_s), tl.log(total_t)
    value = cross / total_t * LN2 + log_s
    if kind != NKD:
        value -= log_t
    value = tl.where(value < 0, 0.0, value)
    label = tl.load(labels + row, ok, other=0) if has_labels else row * 0
    counts = (ok & (label != ignored)) if has_labels else ok
    saved += row.to(tl.int64) * width
    tl.store(saved, tl.where(counts, top_s, 0.0), ok)
    tl.store(saved + 1, tl.where(counts, log_s, 0.0), ok)
    tl.store(saved + 2, tl.where(counts, top_t, 0.0), ok)
    tl.store(saved + 3, tl.where(counts, log_t, 0.0), ok)
    tl.store(saved + 4, tl.where(counts, value, 0.0), ok)
    result = beta * value
    if kind != KL:
        inside = (label >= 0) & (label < classes)
        at = tl.where(inside, label, 0)
        ys = tl.load(s + _pair(row, shape_s) + at * shape_s[3], ok, other=0.0).to(top_s.dtype) - top_s
        yt = tl.load(t + _pair(row, shape_t) + at * shape_t[3], ok, other=0.0).to(top_s.dtype) - top_t
        if kind == DKD:
            odds_s, odds_t = ys * scale - log_s, yt * scale - log_t
            target = _sigmoid(odds_t) * (_softplus(-odds_s) - _softplus(-odds_t))
            target += _sigmoid(-odds_t) * (_softplus(odds_s) - _softplus(odds_t))
            target = tl.where(target < 0, 0.0, target)
        else:
            if plain:
                log_s, log_t = tl.log(plain_s), tl.log(plain_t)
            weight = _sigmoid(yt - log_t)
            tl.store(saved + 5, tl.where(counts, log_s, 0.0), ok)
            tl.store(saved + 6, tl.where(counts, weight, 0.0), ok)
            target = weight * _softplus(log_s - ys)
        result += alpha * target
        result = tl.where(inside, result, float("nan"))
    return tl.where(counts, result, 0.0)


@jit
def forward_rows(
    s, t, labels, saved, values, shape_s, shape_t, classes, chunk, alpha: tl.float64, beta: tl.float64,
    inverse_t: tl.float64, ignored,
    kind: tl.constexpr, has_labels: tl.constexpr, plain: tl.constexpr, width: tl.constexpr, acc: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Classes [split chunk, split chunk + chunk) of a row, in tiles [STEPS, LANES].

    One split: saved [rows, width] has maxima and log-sums, over the classes but the target, values [rows] the terms of
    the loss. More: values [5 or 7, rows, SPLITS] are the sums, which :func:`finish_rows` joins.
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    label = tl.load(labels + row) if has_labels else 0
    end = tl.minimum((split + 1) * chunk, classes)
    if has_labels:
        end = tl.where(label == ignored, 0, end)
    here_s, here_t = s + _pair(row, shape_s), t + _pair(row, shape_t)
    scale = tl.full([], inverse_t, acc)
    scale2 = tl.full([], inverse_t * LOG2E, acc)
    lanes = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    max_s, max_t = tl.full([LANES], LOWEST, acc), tl.full([LANES], LOWEST, acc)
    sum_s, sum_t, cross = tl.zeros([LANES], acc), tl.zeros([LANES], acc), tl.zeros([LANES], acc)
    plain_s, plain_t = tl.zeros([LANES], acc), tl.zeros([LANES], acc)
    for first in range(split * chunk, end, STEPS * LANES):
        k = first + lanes
        zs, zt = _load(here_s, k, shape_s, k < end, acc), _load(here_t, k, shape_t, k < end, acc)
        if kind != KL:  # not in the loads' mask, which would make them narrow
            zs, zt = tl.where(k == label, float("-inf"), zs), tl.where(k == label, float("-inf"), zt)
        # Every lane runs on its own maximum: an exponential more per STEPS logits, no exchange between threads.
        new_s, new_t = tl.maximum(max_s, tl.max(zs, 0)), tl.maximum(max_t, tl.max(zt, 0))
        step_s, step_t = (max_s - new_s) * scale2, (max_t - new_t) * scale2
        shrink = tl.exp2(step_t)
        cross = shrink * (cross + sum_t * ((-step_s) if kind == NKD else (step_t - step_s)))
        a, b = (zt - new_t[None, :]) * scale2, (zs - new_s[None, :]) * scale2
        e = tl.exp2(a)
        cross += tl.sum(tl.where(e == 0, 0.0, e * ((-b) if kind == NKD else (a - b))), 0)
        sum_s = sum_s * tl.exp2(step_s) + tl.sum(tl.exp2(b), 0)
        sum_t = sum_t * shrink + tl.sum(e, 0)
        if plain:
            plain_s = plain_s * tl.exp(max_s - new_s) + tl.sum(tl.exp(zs - new_s[None, :]), 0)
            plain_t = plain_t * tl.exp(max_t - new_t) + tl.sum(tl.exp(zt - new_t[None, :]), 0)
        max_s, max_t = new_s, new_t
    sums = _joined(
        max_s[None, :], sum_s[None, :], max_t[None, :], sum_t[None, :], cross[None, :], plain_s[None, :],
        plain_t[None, :], scale2, kind, plain,
    )  # fmt: skip
    one = tl.arange(0, 1)
    if SPLITS == 1:
        result = _row_values(
            row + one, one == 0, sums, s, t, labels, saved, shape_s, shape_t, classes, tl.full([], alpha, acc),
            tl.full([], beta, acc), scale, ignored, kind, has_labels, plain, width,
        )  # fmt: skip
        tl.store(values + row + one, result)
    else:
        part = values + row.to(tl.int64) * SPLITS + split + one
        size = tl.num_programs(0).to(tl.int64) * SPLITS
        for i in tl.static_range(7 if plain else 5):
            tl.store(part + i * size, sums[i])


@triton.jit
def _part(values, index, at, ok):
    return tl.load(values + index + at, ok, other=0.0)


@jit
def finish_rows(
    s, t, labels, saved, values, loss, share, shape_s, shape_t, rows, classes, alpha: tl.float64, beta: tl.float64,
    inverse_t: tl.float64, ignored,
    kind: tl.constexpr, has_labels: tl.constexpr, plain: tl.constexpr, width: tl.constexpr, acc: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Joins the splits of all rows; loss and share as :func:`finish`."""
    scale = tl.full([], inverse_t, acc)
    scale2 = tl.full([], inverse_t * LOG2E, acc)
    size = rows.to(tl.int64) * SPLITS
    total, counted = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.int64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        ok = row < rows
        at = row[:, None].to(tl.int64) * SPLITS + tl.arange(0, SPLITS)[None, :]
        there = ok[:, None] & (at >= 0)
        sum_s, sum_t = _part(values, size, at, there), _part(values, 3 * size, at, there)
        plain_s, plain_t = sum_s, sum_t
        if plain:
            plain_s, plain_t = _part(values, 5 * size, at, there), _part(values, 6 * size, at, there)
        sums = _joined(
            _part(values, 0, at, there), sum_s, _part(values, 2 * size, at, there), sum_t,
            _part(values, 4 * size, at, there), plain_s, plain_t, scale2, kind, plain,
        )  # fmt: skip
        result = _row_values(
            row, ok, sums, s, t, labels, saved, shape_s, shape_t, classes, tl.full([], alpha, acc),
            tl.full([], beta, acc), scale, ignored, kind, has_labels, plain, width,
        )  # fmt: skip
        total += result.to(tl.float64)
        counts = (ok & (tl.load(labels + row, ok, other=0) != ignored)) if has_labels else ok
        counted += tl.where(counts, 1, 0)
    count = tl.sum(counted, 0)
    inverse = tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(tl.float64), 0.0)
    tl.store(loss, (tl.sum(total, 0) * inverse).to(acc))
    tl.store(share, inverse.to(acc))


@jit
def backward_rows(
    grad, s, t, labels, saved, share, to, shape_s, shape_t, shape_to, classes, alpha: tl.float64,
    beta: tl.float64, inverse_t: tl.float64, ignored,
    kind: tl.constexpr, teacher: tl.constexpr, has_labels: tl.constexpr, plain: tl.constexpr, width: tl.constexpr,
    acc: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one side, see RowFactors in csrc/cpu/logits.simd.cpp; share: 1 over the rows that count."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    saved += row.to(tl.int64) * width
    s += _pair(row, shape_s)
    t += _pair(row, shape_t)
    to += _pair(row, shape_to)
    k = block * BLOCK + tl.arange(0, BLOCK)
    inside = k < classes
    target_of = to + k.to(tl.int64) * shape_to[3]
    label = tl.load(labels + row) if has_labels else 0
    if has_labels and label == ignored:
        tl.store(target_of, tl.zeros([BLOCK], acc).to(to.dtype.element_ty), inside)
    else:
        scale = tl.full([], inverse_t, acc)
        upstream = tl.load(grad).to(acc) * tl.load(share).to(acc)
        top_s, log_s = tl.load(saved), tl.load(saved + 1)
        top_t, log_t = tl.load(saved + 2), tl.load(saved + 3)
        both = upstream * tl.full([], beta, acc) * scale
        own, plain_factor, at_target = both * 0, both * 0, both * 0
        if kind != KL:
            known = (label >= 0) & (label < classes)
            at = tl.where(known, label, 0)
            ys = tl.load(s + at * shape_s[3]).to(acc) - top_s
            yt = tl.load(t + at * shape_t[3]).to(acc) - top_t
            both = tl.where(known, both, float("nan"))
            if kind == DKD:
                odds_s, odds_t = ys * scale - log_s, yt * scale - log_t
                by = upstream * tl.full([], alpha, acc) * scale
                if teacher:
                    at_target = by * _sigmoid(odds_t) * _sigmoid(-odds_t) * (odds_t - odds_s)
                else:
                    high = (odds_s > 0) & (odds_t > 0)
                    sign = tl.where(high, -1.0, 1.0)
                    at_target = by * sign * (_sigmoid(sign * odds_s) - _sigmoid(sign * odds_t))
                own = -at_target
            if kind == NKD and not teacher:
                at_target = (
                    -upstream
                    * tl.full([], alpha, acc)
                    * tl.load(saved + 6)
                    * _sigmoid(tl.load(saved + 5) - ys)
                )
                if plain:
                    plain_factor = -at_target
                else:
                    own = -at_target
        # The target is loaded too: without it the loads would be narrow.
        zs = _load(s, k, shape_s, inside, acc) - top_s
        log_p = zs * scale - log_s
        log_q = (_load(t, k, shape_t, inside, acc) - top_t) * scale - log_t
        q = tl.exp(log_q)
        if teacher:
            difference = -log_p if kind == NKD else log_q - log_p
            gradient = tl.where(q == 0, 0.0, q * (both * (difference - tl.load(saved + 4)) + own))
        else:
            p = tl.exp(log_p)
            gradient = both * (p - q) + own * p
            if plain:
                gradient += plain_factor * tl.exp(zs - tl.load(saved + 5))
        if kind != KL:
            gradient = tl.where(k == label, at_target, gradient)
        tl.store(target_of, gradient.to(to.dtype.element_ty), inside)


@jit
def finish(
    values,
    labels,
    loss,
    share,
    rows,
    ignored,
    classes,
    has_labels: tl.constexpr,
    acc: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss: the mean of values over the rows that count, plus the sum of `classes` values after them.

    share: 1 over the number of rows that count, or 0.
    """
    columns = tl.zeros([BLOCK], tl.float64)
    for first in range(0, classes, BLOCK):
        k = first + tl.arange(0, BLOCK)
        columns += tl.load(values + rows + k, k < classes, other=0.0).to(tl.float64)
    total, counted = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int64)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        ok = row < rows
        total += tl.load(values + row, ok, other=0.0).to(tl.float64)
        if has_labels:
            counted += tl.where(ok & (tl.load(labels + row, ok, other=0) != ignored), 1, 0)
        else:
            counted += tl.where(ok, 1, 0)
    count = tl.sum(counted, 0)
    inverse = tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(tl.float64), 0.0)
    tl.store(loss, (tl.sum(total, 0) * inverse + tl.sum(columns, 0)).to(acc))
    tl.store(share, inverse.to(acc))
