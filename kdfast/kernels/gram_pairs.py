"""Triton kernels for products of views, and small matrices times a view, in tiles of rows."""

import triton
import triton.language as tl

from ._jit import jit
from ._zeros import tile, vector
from .gram_products import col_offsets, dot, load, row_offsets, share_of, square, squared, store


@triton.jit
def _means_of(view, out, g, n, d, block, part, parts, c: tl.constexpr):
    cols = block * c.columns + tl.arange(0, c.columns)
    base, at, ok = view.data + g * view.group, col_offsets(view, cols, c), cols < d
    first = tl.load(base + at, ok, other=0.0).to(c.acc)[None, :]
    total = vector(c.columns, c.acc)
    start, end = share_of(n, c.rows0, part, parts)
    for row in range(start, end, c.rows0):
        rows = row + tl.arange(0, c.rows0)
        x = load(base, row_offsets(view, rows), at, rows < n, ok).to(c.acc)
        total += tl.sum(tl.where((rows < n)[:, None], x - first, 0.0), 0)
    tl.store(out + g * d + cols, total / n, ok)


@jit(do_not_specialize=["parts", "blocks", "groups"])
def means(x, y, out_x, out_y, nx, ny, dx, dy, parts, blocks, groups, c: tl.constexpr):
    """Mean over rows of (row - first row) for each column: out [parts, groups, d], to be summed over
    parts."""
    pid = tl.program_id(0)
    block, part = pid % blocks, pid // blocks % parts
    side, g = pid // blocks // parts % 2, (pid // blocks // parts // 2).to(tl.int64)
    if side == 0:
        _means_of(x, out_x + part.to(tl.int64) * groups * dx, g, nx, dx, block, part, parts, c)
    else:
        _means_of(y, out_y + part.to(tl.int64) * groups * dy, g, ny, dy, block, part, parts, c)


@triton.jit
def _tile(
    base, row_offsets, col_offsets, rows, cols, row_ok, col_ok, mean, center: tl.constexpr, c: tl.constexpr
):
    """A tile of a view; with its columns (center 1) or rows (2) minus their first element, minus ``mean``."""
    x = load(base, row_offsets, col_offsets, row_ok, col_ok)
    if center == 1:
        first = tl.load(base + col_offsets, col_ok, other=0.0).to(c.acc)
        x = (x.to(c.acc) - first[None, :]) - tl.load(mean + cols, col_ok, other=0.0)[None, :]
    if center == 2:
        first = tl.load(base + row_offsets, row_ok, other=0.0).to(c.acc)
        x = (x.to(c.acc) - first[:, None]) - tl.load(mean + rows, row_ok, other=0.0)[:, None]
    if center > 0:
        x = tl.where(row_ok[:, None] & col_ok[None, :], x, 0.0)
    return x


@triton.jit
def _pair_product(a, b, mean_a, mean_b, out, g, na, nb, d, i, j, split, splits, mirror, c: tl.constexpr):
    """Tile (i, j) of A B^T [na, nb]; also stored transposed if ``mirror``."""
    rows, cols = i * c.rows0 + tl.arange(0, c.rows0), j * c.rows0 + tl.arange(0, c.rows0)
    base_a, base_b = a.data + g * a.group, b.data + g * b.group
    at_a, at_b = row_offsets(a, rows), row_offsets(b, cols)
    acc = tile(c.rows0, c.rows0, c.acc)
    start, end = share_of(d, c.columns, split, splits)
    for column in range(start, end, c.columns):
        f = column + tl.arange(0, c.columns)
        ta = _tile(base_a, at_a, col_offsets(a, f, c), rows, f, rows < na, f < d, mean_a, c.center, c)
        tb = _tile(base_b, at_b, col_offsets(b, f, c), cols, f, cols < nb, f < d, mean_b, c.center, c)
        if ta.dtype != tb.dtype:
            ta, tb = ta.to(c.acc), tb.to(c.acc)
        acc = dot(ta, tl.trans(tb), acc, c)
    store(out, rows.to(tl.int64) * nb, cols, rows < na, cols < nb, acc)
    if mirror:
        store(out, rows, cols.to(tl.int64) * nb, rows < na, cols < nb, acc)


@triton.jit
def _pair_square(a, mean, out, g, n, d, i, split, splits, c: tl.constexpr):
    """Tile (i, i) of A A^T [n, n]."""
    rows, base = i * c.rows0 + tl.arange(0, c.rows0), a.data + g * a.group
    at, ok = row_offsets(a, rows), rows < n
    acc = tile(c.rows0, c.rows0, c.acc)
    start, end = share_of(d, c.columns, split, splits)
    for column in range(start, end, c.columns):
        f = column + tl.arange(0, c.columns)
        acc = square(_tile(base, at, col_offsets(a, f, c), rows, f, ok, f < d, mean, c.center, c), acc, c)
    store(out, rows.to(tl.int64) * n, rows, ok, ok, squared(acc, c))


@jit(do_not_specialize=["splits", "groups", "tiles"])
def pair_products(
    x, y, mean_x, mean_y, out, group_stride, nx, ny, dx, dy, splits, groups, tiles, c: tl.constexpr
):
    """X X^T, Y Y^T and (c.cross) X Y^T: out [splits, groups, nx nx + ny ny (+ nx ny)].

    One program per tile and split of the columns; programs of one split are neighbours, so that L2 serves the
    rereads: ceil(n / rows0) + 1 of every element. Symmetric products are computed on and above the diagonal.
    """
    pid = tl.program_id(0)
    i, j, rest = pid % tiles, pid // tiles % tiles, pid // tiles // tiles
    products: tl.constexpr = 3 if c.cross else 2
    product, g, split = rest % products, (rest // products % groups).to(tl.int64), rest // products // groups
    out += (split.to(tl.int64) * groups + g) * group_stride
    size_x, size_y = nx.to(tl.int64) * nx, ny.to(tl.int64) * ny
    mean_x += g * (dx if c.center == 1 else nx)
    mean_y += g * (dy if c.center == 1 else ny)
    if product == 0:
        if j * c.rows0 < nx:
            if i == j:
                _pair_square(x, mean_x, out, g, nx, dx, i, split, splits, c)
            elif i < j:
                _pair_product(x, x, mean_x, mean_x, out, g, nx, nx, dx, i, j, split, splits, True, c)
    elif product == 1:
        if j * c.rows0 < ny:
            out += size_x
            if i == j:
                _pair_square(y, mean_y, out, g, ny, dy, i, split, splits, c)
            elif i < j:
                _pair_product(y, y, mean_y, mean_y, out, g, ny, ny, dy, i, j, split, splits, True, c)
    else:
        if (i * c.rows0 < nx) & (j * c.rows0 < ny):
            to = out + size_x + size_y
            _pair_product(x, y, mean_x, mean_y, to, g, nx, ny, dx, i, j, split, splits, False, c)


@triton.jit
def _add_product(
    acc,
    small,
    row_stride,
    col_stride,
    factor,
    b,
    mean,
    g,
    n,
    nb,
    d,
    rows,
    cols,
    center: tl.constexpr,
    c: tl.constexpr,
):
    """acc + factor * small[rows, :] @ b[:, cols], with b centred."""
    base, at = b.data + g * b.group, col_offsets(b, cols, c)
    for start in range(0, nb, c.inner):
        j = start + tl.arange(0, c.inner)
        s = load(small, rows.to(tl.int64) * row_stride, j.to(tl.int64) * col_stride, rows < n, j < nb)
        t = _tile(base, row_offsets(b, j), at, j, cols, j < nb, cols < d, mean, center, c).to(c.acc)
        acc = dot(s * factor, t, acc, c)
    return acc


@jit(do_not_specialize=["first", "sides", "tiles", "blocks"])
def pair_apply(
    x, y, out_x, out_y, small, mean_x, mean_y, matrices, group_stride, factors, cross_mean_x, cross_mean_y,
    nx, ny, dx, dy, first, sides, tiles, blocks, c: tl.constexpr
):  # fmt: skip
    """Gx Xc (c.gram) + f_xx (X X^T) X + f_xy (X Y^T) Y (c.cross), and the same for y; every element is
    written once.

    small [groups, 2, n, n]: Gx, Gy; matrices: what pair_products wrote; factors [groups, 3]: f_xy, f_xx,
    f_yy. Xc has its columns centred, the X and Y of the cross terms their rows.
    """
    pid = tl.program_id(0)
    i, j, rest = pid % tiles, pid // tiles % blocks, pid // tiles // blocks
    side, g = first + rest % sides, (rest // sides).to(tl.int64)
    size_x, size_y = nx.to(tl.int64) * nx, ny.to(tl.int64) * ny
    rows, cols = i * c.rows0 + tl.arange(0, c.rows0), j * c.columns + tl.arange(0, c.columns)
    xx = matrices + g * group_stride
    yy, xy = xx + size_x, xx + size_x + size_y
    factors += g * 3
    mean_x, mean_y, cross_x, cross_y = (
        mean_x + g * dx,
        mean_y + g * dy,
        cross_mean_x + g * nx,
        cross_mean_y + g * ny,
    )
    small += (g * 2 + side) * size_x
    by_column: tl.constexpr = 1 if c.center > 0 else 0
    by_row: tl.constexpr = 2 if c.center > 0 else 0
    acc = tile(c.rows0, c.columns, c.acc)
    if side == 0:
        if c.gram:
            acc = _add_product(acc, small, nx, 1, 1.0, x, mean_x, g, nx, nx, dx, rows, cols, by_column, c)
        if c.cross:
            f_xy, f_xx = tl.load(factors), tl.load(factors + 1)
            acc = _add_product(acc, xx, nx, 1, f_xx, x, cross_x, g, nx, nx, dx, rows, cols, by_row, c)
            acc = _add_product(acc, xy, ny, 1, f_xy, y, cross_y, g, nx, ny, dx, rows, cols, by_row, c)
        to = out_x.data + g * out_x.group
        store(to, row_offsets(out_x, rows), col_offsets(out_x, cols, c), rows < nx, cols < dx, acc)
    else:
        if c.gram:
            acc = _add_product(acc, small, ny, 1, 1.0, y, mean_y, g, ny, ny, dy, rows, cols, by_column, c)
        if c.cross:
            f_xy, f_yy = tl.load(factors), tl.load(factors + 2)
            acc = _add_product(acc, yy, ny, 1, f_yy, y, cross_y, g, ny, ny, dy, rows, cols, by_row, c)
            acc = _add_product(acc, xy, 1, ny, f_xy, x, cross_x, g, ny, nx, dy, rows, cols, by_row, c)
        to = out_y.data + g * out_y.group
        store(to, row_offsets(out_y, rows), col_offsets(out_y, cols, c), rows < ny, cols < dy, acc)
