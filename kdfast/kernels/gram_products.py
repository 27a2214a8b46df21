"""Triton kernels for products with centred matrices in strided views: Grams, and small matrices times a view.

Views are :class:`kdfast.kernels._launch.View`. Every sum has a fixed order. Fixed configurations, with why:

* Two buffers (``num_stages=2``) and about 100 KB of shared memory at most, so that two programs share a
  multiprocessor of an A100 or H100: bandwidth times latency asks for about 26 KB in flight on each, and a
  tile of 80 x 64 floats has 20.
* ieee products run on the FMA units, unrolled over the contracted tile: 16 or 32 of it fit the registers.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..backend import interpreting
from ._jit import jit
from ._zeros import tile, vector

INTERPRETED = tl.constexpr(interpreting())


class Config(NamedTuple):
    """Compile-time side of a launch."""

    rows0: int  # rows of a tile
    rows1: int  # rows of a second tile of the same program, or 0
    columns: int  # columns of a tile
    center: int  # 0: not at all, 1: every column, 2: every row
    flat: bool  # columns of all views lie along one stride
    acc: tl.dtype
    precision: str  # input_precision of a product that is not made of pieces
    pieces: int = 1  # bfloat16 numbers that a float32 is split into for a product
    even: bool = False  # the tiles hold no more rows than there are
    inner: int = 0  # contracted elements of a step, where that is not one of the above
    gram: bool = False  # which terms pair_apply adds
    cross: bool = False


@triton.jit
def _row_offsets(view, rows):
    r1, r2, r3 = rows // view.r3 // view.r2, rows // view.r3 % view.r2, rows % view.r3
    return r1.to(tl.int64) * view.row1 + r2.to(tl.int64) * view.row2 + r3.to(tl.int64) * view.row3


@triton.jit
def _col_offsets(view, cols, c: tl.constexpr):
    if c.flat:
        return cols.to(tl.int64) * view.col3
    c1, c2, c3 = cols // view.c3 // view.c2, cols // view.c3 % view.c2, cols % view.c3
    return c1.to(tl.int64) * view.col1 + c2.to(tl.int64) * view.col2 + c3.to(tl.int64) * view.col3


@triton.jit
def _load(base, row_offsets, col_offsets, row_ok, col_ok):
    ok = row_ok[:, None] & col_ok[None, :]
    return tl.load(base + row_offsets[:, None] + col_offsets[None, :], ok, other=0.0)


@triton.jit
def _store(base, row_offsets, col_offsets, row_ok, col_ok, tile):
    ok = row_ok[:, None] & col_ok[None, :]
    tl.store(base + row_offsets[:, None] + col_offsets[None, :], tile.to(base.dtype.element_ty), ok)


@triton.jit
def _leading(x):
    """The leading 8 bits of float32, as bfloat16, and what they leave."""
    bits = x.to(tl.uint32, bitcast=True)
    leading = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    if INTERPRETED:  # whose products know no bfloat16
        return leading, x - leading
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), x - leading


@triton.jit
def _pieces(x):
    """x = a + b + e in bfloat16, exactly: cutting off is cheaper here than rounding, and loses nothing."""
    a, rest = _leading(x)
    b, rest = _leading(rest)
    e, rest = _leading(rest)
    return a, b, e


@triton.jit
def _dot(a, b, acc, c: tl.constexpr):
    """acc + a b. In pieces, what is small is added first, in an accumulator of its own: see the module."""
    if c.pieces > 1 and a.dtype == tl.float32:
        a0, a1, a2 = _pieces(a)
        b0, b1, b2 = _pieces(b)
        part = tl.dot(a1, b0, out_dtype=tl.float32)
        part = tl.dot(a0, b1, part)
        if c.pieces == 3:
            part = tl.dot(a2, b0, part)
            part = tl.dot(a0, b2, part)
            part = tl.dot(a1, b1, part)
        return acc + tl.dot(a0, b0, part)
    return tl.dot(a, b, acc, input_precision=c.precision, out_dtype=c.acc)


@triton.jit
def _square(x, acc, c: tl.constexpr):
    """acc + M, where x x^T is the mean of M and M^T: in pieces, four products instead of six."""
    if c.pieces > 1 and x.dtype == tl.float32:
        x0, x1, x2 = _pieces(x)
        part = tl.dot(x0, tl.trans(x1 * 2), out_dtype=tl.float32)
        if c.pieces == 3:
            part = tl.dot(x0, tl.trans(x2 * 2), part)
            part = tl.dot(x1, tl.trans(x1), part)
        return acc + tl.dot(x0, tl.trans(x0), part)
    return _dot(x, tl.trans(x), acc, c)


@triton.jit
def _squared(m, c: tl.constexpr):
    """x x^T from what _square accumulated."""
    if c.pieces > 1:
        return 0.5 * (m + tl.trans(m))
    return m


@triton.jit
def _share(count, step, part, parts):
    """Start and end of one of ``parts`` shares of ``count``, in whole steps."""
    share = tl.cdiv(tl.cdiv(count, step), parts) * step
    return part * share, tl.minimum(count, (part + 1) * share)


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
    x0 = _load(base, at0, col_offsets, ok0, col_ok)
    x1 = x0
    if c.rows1 > 0:
        x1 = _load(base, at1, col_offsets, ok1, col_ok)
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
    base, at0, at1 = view.data + g * view.group, _row_offsets(view, rows0), _row_offsets(view, rows1)
    k00 = tile(c.rows0, c.rows0, c.acc)
    k01 = tile(c.rows0, second, c.acc)
    k11 = tl.zeros([second, second], c.acc)
    start, end = _share(d, c.columns, split, splits)
    for column in range(start, end, c.columns):
        cols = column + tl.arange(0, c.columns)
        x0, x1 = _all_rows(base, at0, at1, ok0, ok1, _col_offsets(view, cols, c), cols < d, n, c)
        k00 = _square(x0, k00, c)
        if c.rows1 > 0:
            k01 = _dot(x0, tl.trans(x1), k01, c)
            k11 = _square(x1, k11, c)
    _store(out, rows0 * n, rows0, ok0, ok0, _squared(k00, c))
    if c.rows1 > 0:
        _store(out, rows0 * n, rows1, ok0, ok1, k01)
        _store(out, rows0, rows1 * n, ok0, ok1, k01)
        _store(out, rows1 * n, rows1, ok1, ok1, _squared(k11, c))


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
    base, at0, at1 = view.data + g * view.group, _row_offsets(view, rows0), _row_offsets(view, rows1)
    to, to0, to1 = out.data + g * out.group, _row_offsets(out, rows0), _row_offsets(out, rows1)
    g00 = _load(small, rows0 * n, rows0, ok0, ok0)
    if c.rows1 > 0:
        g01 = _load(small, rows0 * n, rows1, ok0, ok1)
        g10 = _load(small, rows1 * n, rows0, ok1, ok0)
        g11 = _load(small, rows1 * n, rows1, ok1, ok1)
    start, end = _share(d, c.columns, split, splits)
    for column in range(start, end, c.columns):
        cols = column + tl.arange(0, c.columns)
        x0, x1 = _all_rows(base, at0, at1, ok0, ok1, _col_offsets(view, cols, c), cols < d, n, c)
        x0, x1 = x0.to(c.acc), x1.to(c.acc)
        to_col = _col_offsets(out, cols, c)
        z0 = _dot(g00, x0, tile(c.rows0, c.columns, c.acc), c)
        if c.rows1 > 0:
            z0 = _dot(g01, x1, z0, c)
            z1 = _dot(g10, x0, tile(second, c.columns, c.acc), c)
            z1 = _dot(g11, x1, z1, c)
            _store(to, to1, to_col, ok1, cols < d, z1)
        _store(to, to0, to_col, ok0, cols < d, z0)


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


@triton.jit
def _means_of(view, out, g, n, d, block, part, parts, c: tl.constexpr):
    cols = block * c.columns + tl.arange(0, c.columns)
    base, at, ok = view.data + g * view.group, _col_offsets(view, cols, c), cols < d
    first = tl.load(base + at, ok, other=0.0).to(c.acc)[None, :]
    total = vector(c.columns, c.acc)
    start, end = _share(n, c.rows0, part, parts)
    for row in range(start, end, c.rows0):
        rows = row + tl.arange(0, c.rows0)
        x = _load(base, _row_offsets(view, rows), at, rows < n, ok).to(c.acc)
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
    x = _load(base, row_offsets, col_offsets, row_ok, col_ok)
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
    at_a, at_b = _row_offsets(a, rows), _row_offsets(b, cols)
    acc = tile(c.rows0, c.rows0, c.acc)
    start, end = _share(d, c.columns, split, splits)
    for column in range(start, end, c.columns):
        f = column + tl.arange(0, c.columns)
        ta = _tile(base_a, at_a, _col_offsets(a, f, c), rows, f, rows < na, f < d, mean_a, c.center, c)
        tb = _tile(base_b, at_b, _col_offsets(b, f, c), cols, f, cols < nb, f < d, mean_b, c.center, c)
        if ta.dtype != tb.dtype:
            ta, tb = ta.to(c.acc), tb.to(c.acc)
        acc = _dot(ta, tl.trans(tb), acc, c)
    _store(out, rows.to(tl.int64) * nb, cols, rows < na, cols < nb, acc)
    if mirror:
        _store(out, rows, cols.to(tl.int64) * nb, rows < na, cols < nb, acc)


@triton.jit
def _pair_square(a, mean, out, g, n, d, i, split, splits, c: tl.constexpr):
    """Tile (i, i) of A A^T [n, n]."""
    rows, base = i * c.rows0 + tl.arange(0, c.rows0), a.data + g * a.group
    at, ok = _row_offsets(a, rows), rows < n
    acc = tile(c.rows0, c.rows0, c.acc)
    start, end = _share(d, c.columns, split, splits)
    for column in range(start, end, c.columns):
        f = column + tl.arange(0, c.columns)
        acc = _square(_tile(base, at, _col_offsets(a, f, c), rows, f, ok, f < d, mean, c.center, c), acc, c)
    _store(out, rows.to(tl.int64) * n, rows, ok, ok, _squared(acc, c))


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
    base, at = b.data + g * b.group, _col_offsets(b, cols, c)
    for start in range(0, nb, c.inner):
        j = start + tl.arange(0, c.inner)
        s = _load(small, rows.to(tl.int64) * row_stride, j.to(tl.int64) * col_stride, rows < n, j < nb)
        t = _tile(base, _row_offsets(b, j), at, j, cols, j < nb, cols < d, mean, center, c).to(c.acc)
        acc = _dot(s * factor, t, acc, c)
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
        _store(to, _row_offsets(out_x, rows), _col_offsets(out_x, cols, c), rows < nx, cols < dx, acc)
    else:
        if c.gram:
            acc = _add_product(acc, small, ny, 1, 1.0, y, mean_y, g, ny, ny, dy, rows, cols, by_column, c)
        if c.cross:
            f_xy, f_yy = tl.load(factors), tl.load(factors + 2)
            acc = _add_product(acc, yy, ny, 1, f_yy, y, cross_y, g, ny, ny, dy, rows, cols, by_row, c)
            acc = _add_product(acc, xy, 1, ny, f_xy, x, cross_x, g, ny, nx, dy, rows, cols, by_row, c)
        to = out_y.data + g * out_y.group
        _store(to, _row_offsets(out_y, rows), _col_offsets(out_y, cols, c), rows < ny, cols < dy, acc)
