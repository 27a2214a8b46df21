"""What Triton kernels for products with centred matrices in strided views share: reading, writing, multiplying.

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
def row_offsets(view, rows):
    r1, r2, r3 = rows // view.r3 // view.r2, rows // view.r3 % view.r2, rows % view.r3
    return r1.to(tl.int64) * view.row1 + r2.to(tl.int64) * view.row2 + r3.to(tl.int64) * view.row3


@triton.jit
def col_offsets(view, cols, c: tl.constexpr):
    if c.flat:
        return cols.to(tl.int64) * view.col3
    c1, c2, c3 = cols // view.c3 // view.c2, cols // view.c3 % view.c2, cols % view.c3
    return c1.to(tl.int64) * view.col1 + c2.to(tl.int64) * view.col2 + c3.to(tl.int64) * view.col3


@triton.jit
def load(base, row_offsets, col_offsets, row_ok, col_ok):
    ok = row_ok[:, None] & col_ok[None, :]
    return tl.load(base + row_offsets[:, None] + col_offsets[None, :], ok, other=0.0)


@triton.jit
def store(base, row_offsets, col_offsets, row_ok, col_ok, tile):
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
def dot(a, b, acc, c: tl.constexpr):
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
def square(x, acc, c: tl.constexpr):
    """acc + M, where x x^T is the mean of M and M^T: in pieces, four products instead of six."""
    if c.pieces > 1 and x.dtype == tl.float32:
        x0, x1, x2 = _pieces(x)
        part = tl.dot(x0, tl.trans(x1 * 2), out_dtype=tl.float32)
        if c.pieces == 3:
            part = tl.dot(x0, tl.trans(x2 * 2), part)
            part = tl.dot(x1, tl.trans(x1), part)
        return acc + tl.dot(x0, tl.trans(x0), part)
    return dot(x, tl.trans(x), acc, c)


@triton.jit
def squared(m, c: tl.constexpr):
    """x x^T from what _square accumulated."""
    if c.pieces > 1:
        return 0.5 * (m + tl.trans(m))
    return m


@triton.jit
def share_of(count, step, part, parts):
    """Start and end of one of ``parts`` shares of ``count``, in whole steps."""
    share = tl.cdiv(tl.cdiv(count, step), parts) * step
    return part * share, tl.minimum(count, (part + 1) * share)
