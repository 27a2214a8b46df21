"""Triton kernels of the transposed comparison, which needs no more than norms: |X Y^T|^2 / (|X X^T| |Y Y^T|)."""

import triton
import triton.language as tl
from torch import Tensor

from ._jit import jit
from .gram_compare import DIFFERENCE, diagonal, inverse, load_group, store_group

MAX_BLOCKS = tl.constexpr(64)  # of square_norms in a group


@triton.jit
def _sum_squares(p, count, scale, block, blocks, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], p.dtype.element_ty)
    share = tl.cdiv(tl.cdiv(count, BLOCK), blocks) * BLOCK
    for start in range(block * share, tl.minimum(count, (block + 1) * share), BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(p + at, at < count, other=0.0) / scale
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def _largest_diagonal(p, n, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], p.dtype.element_ty)
    for start in range(0, n, BLOCK):
        largest = tl.maximum(largest, diagonal(p, (start + tl.arange(0, BLOCK)).to(tl.int64), n))
    scale = tl.max(largest, 0)
    return tl.where(scale > 0, scale, 1.0)


@jit(do_not_specialize=["blocks", "nx", "ny"])
def square_norms(matrices, group_stride, out, nx, ny, blocks, BLOCK: tl.constexpr):
    """Parts of |X Y^T|^2, |X X^T|^2, |Y Y^T|^2 of scaled matrices, and two scales: out [groups, blocks,
    5]."""
    block, g = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    size_x, size_y, size_xy = nx.to(tl.int64) * nx, ny.to(tl.int64) * ny, nx.to(tl.int64) * ny
    xx = matrices + g * group_stride
    yy, xy = xx + size_x, xx + size_x + size_y
    scale_x, scale_y = _largest_diagonal(xx, nx, BLOCK), _largest_diagonal(yy, ny, BLOCK)
    scale_xy = tl.sqrt(scale_x) * tl.sqrt(scale_y)
    out += (g * blocks + block) * 5
    tl.store(out, _sum_squares(xy, size_xy, scale_xy, block, blocks, BLOCK))
    tl.store(out + 1, _sum_squares(xx, size_x, scale_x, block, blocks, BLOCK))
    tl.store(out + 2, _sum_squares(yy, size_y, scale_y, block, blocks, BLOCK))
    tl.store(out + 3, scale_x)
    tl.store(out + 4, scale_y)


@triton.jit
def _finished_norms(norms, g, blocks):
    at = tl.arange(0, MAX_BLOCKS)
    part, ok = norms + (g * blocks + at) * 5, at < blocks
    xy, xx = tl.sum(tl.load(part, ok, other=0.0), 0), tl.sum(tl.load(part + 1, ok, other=0.0), 0)
    yy = tl.sum(tl.load(part + 2, ok, other=0.0), 0)
    return xy, xx, yy, tl.load(norms + g * blocks * 5 + 3), tl.load(norms + g * blocks * 5 + 4)


@jit(do_not_specialize=["groups", "samples", "blocks"])
def compare_norms(norms, products, distance, groups, samples, blocks, COMPARE: tl.constexpr):
    """Per group 1 - |X Y^T|^2 / (|X X^T| |Y Y^T|), or the difference; norms: what square_norms wrote."""
    g = tl.program_id(0).to(tl.int64)
    xy, xx, yy, scale_x, scale_y = _finished_norms(norms, g, blocks)
    product_xy = xy * scale_x * scale_y
    product_xx, product_yy = xx * scale_x * scale_x, yy * scale_y * scale_y
    if COMPARE == DIFFERENCE:
        value = (product_xx + product_yy - 2 * product_xy) / samples / samples
    else:
        value = tl.where((xx > 0) & (yy > 0), 1 - xy * inverse(xx) * inverse(yy), 1.0)
    store_group(products, distance, g, groups, product_xy, product_xx, product_yy, tl.maximum(value, 0.0))


@jit(do_not_specialize=["groups", "samples", "blocks"])
def norm_factors(
    norms, grad_products, grad_distance, factors, groups, samples, blocks, COMPARE: tl.constexpr
):
    """Factors [groups, 3] of (X Y^T) Y, (X X^T) X and (Y Y^T) Y in the gradients, for pair_apply."""
    g = tl.program_id(0).to(tl.int64)
    xy, xx, yy, scale_x, scale_y = _finished_norms(norms, g, blocks)
    p_xy, p_xx, p_yy, grad = load_group(grad_products, grad_distance, g, groups)
    if COMPARE == DIFFERENCE:
        step = grad / samples / samples
        f_xy, f_xx, f_yy = -4 * step, 4 * step, 4 * step
    else:
        both = inverse(xx) * inverse(yy)
        f_xy = -2 * grad * both / scale_x / scale_y
        f_xx = 2 * grad * both * xy * inverse(xx) * inverse(xx) / scale_x / scale_x
        f_yy = 2 * grad * both * xy * inverse(yy) * inverse(yy) / scale_y / scale_y
    tl.store(factors + g * 3, f_xy + 2 * p_xy)
    tl.store(factors + g * 3 + 1, f_xx + 4 * p_xx)
    tl.store(factors + g * 3 + 2, f_yy + 4 * p_yy)


def _norms(matrices: Tensor, rows_x: int, rows_y: int) -> Tensor:
    """Parts of the three squared norms [G, blocks, 5]."""
    groups = matrices.shape[0]
    blocks = max(1, min(MAX_BLOCKS.value, max(rows_x, rows_y) ** 2 // 8192))
    norms = matrices.new_empty((groups, blocks, 5))
    square_norms[(groups * blocks,)](
        matrices, matrices.stride(0), norms, rows_x, rows_y, blocks, BLOCK=2048, num_warps=8
    )
    return norms


def compared(
    matrices: Tensor, rows_x: int, rows_y: int, samples: int, compare: int, products: Tensor, distance: Tensor
) -> None:
    """Fills products [3, G] and distance [G] from what pair_products wrote."""
    norms = _norms(matrices, rows_x, rows_y)
    groups, blocks = norms.shape[:2]
    compare_norms[(groups,)](norms, products, distance, groups, samples, blocks, COMPARE=compare, num_warps=1)


def factors(
    matrices: Tensor, rows_x: int, rows_y: int, samples: int, compare: int, grad_products: Tensor, grad_distance: Tensor
) -> Tensor:  # fmt: skip
    """Factors [G, 3] of (P Q^T) Q, (P P^T) P and (Q Q^T) Q."""
    norms = _norms(matrices, rows_x, rows_y)
    groups, blocks = norms.shape[:2]
    found = norms.new_empty((groups, 3))
    norm_factors[(groups,)](
        norms, grad_products, grad_distance, found, groups, samples, blocks, COMPARE=compare, num_warps=1
    )
    return found
