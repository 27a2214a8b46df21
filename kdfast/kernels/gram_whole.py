"""Triton kernels for Grams, and small matrices times a view, where one program holds all rows."""

import triton
import triton.language as tl

from ._jit import jit
from ._zeros import tile
from .gram_products import col_offsets, dot, load, row_offsets, share_of, square, squared, store


@triton.jit
def _kept(x, row_ok, c: tl.constexpr):
    """Zero where a tile goes beyond the rows."""
    if c.even:
        return x
    return tl.where(row_ok[:, None], x, 0.0)


@triton.jit
def _all_rows(base, at0, at1, ok0, ok1, col_offsets, col_ok, n, c: tl.constexpr):
    """All rows of some columns, in two tiles, centred: minus the first row, then minus the mean of what is
    left."""
    x0 = load(base, at0, col_offsets, ok0, col_ok)
    x1 = x0
    if c.rows1 > 0:
        x1 = load(base, at1, col_offsets, ok1, col_ok)
    if c.center > 0:
        first = tl.load(base + col_offsets, col_ok, other=0.0).to(c.acc)[None, :]
        x0 = _kept(x0.to(c.acc) - first, ok0, c)
        total = tl.sum(x0, 0)
        if c.rows1 > 0:
            x1 = _kept(x1.to(c.acc) - first, ok1, c)
            total += tl.sum(x1, 0)
        mean = (total / n)[None, :]
        x0 = _kept(x0 - mean, ok0, c)
        if c.rows1 > 0:
            x1 = _kept(x1 - mean, ok1, c)
    return x0, x1


@triton.jit
def _whole_gram(view, out, g, n, d, split, splits, c: tl.constexpr):
    second: tl.constexpr = c.rows1 if c.rows1 > 0 else 16
    rows0, rows1 = tl.arange(0, c.rows0), c.rows0 + tl.arange(0, second)
    ok0, ok1 = rows0 < n, rows1 < n
    base, at0, at1 = view.data + g * view.group, row_offsets(view, rows0), row_offsets(view, rows1)
    k00 = tile(c.rows0, c.rows0, c.acc)
    k01 = tile(c.rows0, second, c.acc)
    k11 = tl.zeros([second, second], c.acc)
    start, end = share_of(d, c.columns, split, splits)
    for column in range(start, end, c.columns):
        cols = column + tl.arange(0, c.columns)
        x0, x1 = _all_rows(base, at0, at1, ok0, ok1, col_offsets(view, cols, c), cols < d, n, c)
        k00 = square(x0, k00, c)
        if c.rows1 > 0:
            k01 = dot(x0, tl.trans(x1), k01, c)
            k11 = square(x1, k11, c)
    store(out, rows0 * n, rows0, ok0, ok0, squared(k00, c))
    if c.rows1 > 0:
        store(out, rows0 * n, rows1, ok0, ok1, k01)
        store(out, rows0, rows1 * n, ok0, ok1, k01)
        store(out, rows1 * n, rows1, ok1, ok1, squared(k11, c))


@jit(do_not_specialize=["n", "splits", "groups"])
def whole_grams(x, y, out, group_stride, n, dx, dy, splits, groups, c: tl.constexpr):
    """K and L where one program holds all rows (n <= rows0 + rows1): out [splits, groups, 2, n, n].

    Per group reads n (dx + dy) elements, each once, and does n^2 (dx + dy) multiply-adds, less the corner
    that symmetry saves. At n = 77 that is 70 per element: bound by memory with TF32, by the FMA units with
    ieee.
    """
    pid = tl.program_id(0)
    split, side, g = pid % splits, pid // splits % 2, (pid // splits // 2).to(tl.int64)
    out += (split.to(tl.int64) * groups + g) * group_stride + side * n * n
    if side == 0:
        _whole_gram(x, out, g, n, dx, split, splits, c)
    else:
        _whole_gram(y, out, g, n, dy, split, splits, c)


@triton.jit
def _apply_whole(view, out, small, g, n, d, split, splits, c: tl.constexpr):
    second: tl.constexpr = c.rows1 if c.rows1 > 0 else 16
    rows0, rows1 = tl.arange(0, c.rows0), c.rows0 + tl.arange(0, second)
    ok0, ok1 = rows0 < n, rows1 < n
    base, at0, at1 = view.data + g * view.group, row_offsets(view, rows0), row_offsets(view, rows1)
    to, to0, to1 = out.data + g * out.group, row_offsets(out, rows0), row_offsets(out, rows1)
    g00 = load(small, rows0 * n, rows0, ok0, ok0)
    if c.rows1 > 0:
        g01 = load(small, rows0 * n, rows1, ok0, ok1)
        g10 = load(small, rows1 * n, rows0, ok1, ok0)
        g11 = load(small, rows1 * n, rows1, ok1, ok1)
    start, end = share_of(d, c.columns, split, splits)
    for column in range(start, end, c.columns):
        cols = column + tl.arange(0, c.columns)
        x0, x1 = _all_rows(base, at0, at1, ok0, ok1, col_offsets(view, cols, c), cols < d, n, c)
        x0, x1 = x0.to(c.acc), x1.to(c.acc)
        to_col = col_offsets(out, cols, c)
        z0 = dot(g00, x0, tile(c.rows0, c.columns, c.acc), c)
        if c.rows1 > 0:
            z0 = dot(g01, x1, z0, c)
            z1 = dot(g10, x0, tile(second, c.columns, c.acc), c)
            z1 = dot(g11, x1, z1, c)
            store(to, to1, to_col, ok1, cols < d, z1)
        store(to, to0, to_col, ok0, cols < d, z0)


@jit(do_not_specialize=["n", "splits", "first", "sides"])
def whole_apply(x, y, out_x, out_y, small, n, dx, dy, splits, first, sides, c: tl.constexpr):
    """Gx Xc and Gy Yc, small [groups, 2, n, n] times a view, where one program holds all rows.

    ``sides`` sides from ``first`` on. Each element is read once and written once; n multiply-adds for each.
    """
    pid = tl.program_id(0)
    split, side, g = pid % splits, first + pid // splits % sides, (pid // splits // sides).to(tl.int64)
    small += (g * 2 + side) * n * n
    if side == 0:
        _apply_whole(x, out_x, small, g, n, dx, split, splits, c)
    else:
        _apply_whole(y, out_y, small, g, n, dy, split, splits, c)
