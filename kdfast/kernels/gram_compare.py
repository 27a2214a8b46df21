"""Triton kernels that compare finished Grams, and that turn a comparison's gradient into small matrices.

One program per group reads K and L in blocks of whole rows, a few times over (after the first, from L1 or
L2). K and L are divided by their largest diagonal element, which bounds a Gram, so that squares stay in
range. ``a`` and ``b`` are the comparison's transforms of the scaled K and L. Both Grams are symmetric: what
belongs to a row is also had along the columns, without a transpose.
"""

import triton
import triton.language as tl

from ._jit import jit

# Indices into kdfast.reference.gram.COMPARISONS
CKA = tl.constexpr(0)
CKA_ROW = tl.constexpr(1)
UNBIASED = tl.constexpr(2)
ROW_COSINE = tl.constexpr(3)
MEAN = tl.constexpr(4)
DIFFERENCE = tl.constexpr(5)
MAX_BLOCKS = tl.constexpr(64)  # of square_norms in a group
NORM_FLOOR = tl.constexpr(1e-12)  # of a row's norm in row_cosine


@triton.jit
def _diagonal(k_ptr, index, n):
    return tl.load(k_ptr + index * (n + 1), index < n, other=0.0)


@triton.jit
def _scale(k_ptr, n, COMPARE: tl.constexpr, BN: tl.constexpr):
    scale = tl.max(_diagonal(k_ptr, tl.arange(0, BN), n), 0)
    one = tl.zeros_like(scale) + 1
    if COMPARE == DIFFERENCE:
        return one
    return tl.where(scale > 0, scale, one)


@triton.jit
def _block(k_ptr, scale, rows, cols, n, COMPARE: tl.constexpr):
    """Rows of K / scale [BR, BN]; without the diagonal for the unbiased comparison."""
    ok = (rows < n)[:, None] & (cols < n)[None, :]
    if COMPARE == UNBIASED:
        ok = ok & (rows[:, None] != cols[None, :])
    return tl.load(k_ptr + rows[:, None] * n + cols[None, :], ok, other=0.0) / scale


@triton.jit
def _weight(diagonal):
    """1 / sqrt(K_ii), and 0 where K_ii is 0."""
    positive = diagonal > 0
    return tl.where(positive, 1 / tl.sqrt(tl.where(positive, diagonal, 1.0)), 0.0)


@triton.jit
def _row_values(k, k_ptr, scale, rows, n, COMPARE: tl.constexpr):
    """What the transform needs of each row of the block ``k`` [BR]; see _column_values."""
    if COMPARE == CKA_ROW:
        return _weight(_diagonal(k_ptr, rows, n) / scale)
    if COMPARE == UNBIASED:
        return tl.sum(k, 1) / tl.maximum(n - 2, 1)
    if COMPARE == ROW_COSINE:
        return 1 / tl.maximum(tl.sqrt(tl.sum(k * k, 1)), NORM_FLOOR / scale)
    return tl.zeros_like(tl.sum(k, 1))


@triton.jit
def _column_values(k_ptr, scale, n, COMPARE: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """For all rows, along the columns [BN]: 1/sqrt(K_ii), U-centring's row mean, or 1/|K_i|; and U-centring's
    total."""
    cols = tl.arange(0, BN)
    value = tl.zeros_like(_diagonal(k_ptr, cols, n))
    if COMPARE == CKA_ROW:
        value = _weight(_diagonal(k_ptr, cols, n) / scale)
    if (COMPARE == UNBIASED) | (COMPARE == ROW_COSINE):
        for start in range(0, n, BR):
            k = _block(k_ptr, scale, start + tl.arange(0, BR), cols, n, COMPARE)
            value += tl.sum(k if COMPARE == UNBIASED else k * k, 0)
        if COMPARE == UNBIASED:
            value = value / tl.maximum(n - 2, 1)
        else:
            value = 1 / tl.maximum(tl.sqrt(value), NORM_FLOOR / scale)
    return value, tl.sum(value, 0) / tl.maximum(n - 1, 1)


@triton.jit
def _transform(k, row_value, column_value, total, rows, cols, n, COMPARE: tl.constexpr):
    if COMPARE == CKA_ROW:
        return k * row_value[:, None]
    if COMPARE == UNBIASED:
        ok = (rows < n)[:, None] & (cols < n)[None, :] & (rows[:, None] != cols[None, :]) & (n >= 4)
        return tl.where(ok, k - row_value[:, None] - column_value[None, :] + total, 0.0)
    return k


@triton.jit
def _inverse(square):
    positive = square > 0
    return tl.where(positive, tl.rsqrt(tl.where(positive, square, 1.0)), 0.0)


@triton.jit
def _statistics(k_ptr, l_ptr, n, COMPARE: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """Scales, column values and totals of K and L, and of a and b: <a,a>, <b,b>, <a,b>, sum a, sum b."""
    cols = tl.arange(0, BN)
    k_scale, l_scale = _scale(k_ptr, n, COMPARE, BN), _scale(l_ptr, n, COMPARE, BN)
    k_cols, k_total = _column_values(k_ptr, k_scale, n, COMPARE, BN, BR)
    l_cols, l_total = _column_values(l_ptr, l_scale, n, COMPARE, BN, BR)
    aa, bb, ab, sum_a, sum_b = k_cols * 0, k_cols * 0, k_cols * 0, k_cols * 0, k_cols * 0
    for start in range(0, n, BR):
        rows = start + tl.arange(0, BR)
        k, m = _block(k_ptr, k_scale, rows, cols, n, COMPARE), _block(l_ptr, l_scale, rows, cols, n, COMPARE)
        k_rows, l_rows = (
            _row_values(k, k_ptr, k_scale, rows, n, COMPARE),
            _row_values(m, l_ptr, l_scale, rows, n, COMPARE),
        )
        a = _transform(k, k_rows, k_cols, k_total, rows, cols, n, COMPARE)
        b = _transform(m, l_rows, l_cols, l_total, rows, cols, n, COMPARE)
        aa += tl.sum(a * a, 0)
        bb += tl.sum(b * b, 0)
        ab += tl.sum(a * b, 0)
        if COMPARE == MEAN:
            sum_a += tl.sum(a, 0)
            sum_b += tl.sum(b, 0)
    aa, bb, ab, sum_a, sum_b = tl.sum(aa, 0), tl.sum(bb, 0), tl.sum(ab, 0), tl.sum(sum_a, 0), tl.sum(sum_b, 0)
    return k_scale, l_scale, k_cols, l_cols, k_total, l_total, aa, bb, ab, sum_a, sum_b


@triton.jit
def _true_scale(scale, COMPARE: tl.constexpr):
    """What a is to be multiplied by."""
    return tl.sqrt(scale) if COMPARE == CKA_ROW else scale


@triton.jit
def _distance(k_ptr, l_ptr, n, stats, COMPARE: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The group's distance; for row_cosine also, along the columns, r.(r - s) and s.(s - r) of unit rows r
    and s."""
    k_scale, l_scale, k_cols, l_cols, k_total, l_total, aa, bb, ab, sum_a, sum_b = stats
    cols = tl.arange(0, BN)
    inv_a, inv_b = _inverse(aa), _inverse(bb)
    square, k_loss, l_loss = k_cols * 0, k_cols * 0, k_cols * 0
    if COMPARE == MEAN:
        difference = (sum_a * inv_a - sum_b * inv_b) / n
        return difference * difference / 2, k_loss, l_loss
    for start in range(0, n, BR):
        rows = start + tl.arange(0, BR)
        k, m = _block(k_ptr, k_scale, rows, cols, n, COMPARE), _block(l_ptr, l_scale, rows, cols, n, COMPARE)
        if COMPARE == ROW_COSINE:
            r, s = k * k_cols[None, :], m * l_cols[None, :]
            k_loss += tl.sum(r * (r - s), 0)
            l_loss += tl.sum(s * (s - r), 0)
            e = r - s
        elif COMPARE == DIFFERENCE:
            e = k - m
        else:
            k_rows = _row_values(k, k_ptr, k_scale, rows, n, COMPARE)
            l_rows = _row_values(m, l_ptr, l_scale, rows, n, COMPARE)
            a = _transform(k, k_rows, k_cols, k_total, rows, cols, n, COMPARE)
            b = _transform(m, l_rows, l_cols, l_total, rows, cols, n, COMPARE)
            e = a * inv_a - b * inv_b
        square += tl.sum(e * e, 0)
    total = tl.sum(square, 0)
    if (COMPARE == ROW_COSINE) | (COMPARE == DIFFERENCE):
        return total / n / n, k_loss, l_loss
    return tl.where((aa > 0) & (bb > 0), total / 2, 1.0), k_loss, l_loss


@jit(do_not_specialize=["groups", "n"])
def compare(
    matrices,
    group_stride,
    n,
    products,
    distance,
    groups,
    COMPARE: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """matrices: per group K then L, [n, n] each; products [3, groups]; distance [groups].

    Two passes over 2 n^2 elements (three for the unbiased and the row comparisons), about 10 operations each.
    """
    g = tl.program_id(0).to(tl.int64)
    k_ptr = matrices + g * group_stride
    l_ptr = k_ptr + n * n
    stats = _statistics(k_ptr, l_ptr, n, COMPARE, BN, BR)
    k_scale, l_scale, k_cols, l_cols, k_total, l_total, aa, bb, ab, sum_a, sum_b = stats
    value, k_loss, l_loss = _distance(k_ptr, l_ptr, n, stats, COMPARE, BN, BR)
    to_k, to_l = _true_scale(k_scale, COMPARE), _true_scale(l_scale, COMPARE)
    tl.store(products + g, ab * to_k * to_l)
    tl.store(products + groups + g, aa * to_k * to_k)
    tl.store(products + 2 * groups + g, bb * to_l * to_l)
    tl.store(distance + g, value)


@triton.jit
def _gradient_block(k, m, own, other, n, grad, p_xy, p_own, value, rows, cols, COMPARE: tl.constexpr):
    """dK + dK^T [BR, BN] of the side ``own``, whose block is k."""
    scale, row_value, column_value, total, square, sums, row_loss, column_loss = own
    other_scale, other_row_value, other_column_value, other_total, other_square, other_sums, _, _ = other
    sigma, other_sigma = _true_scale(scale, COMPARE), _true_scale(other_scale, COMPARE)
    own_factor, other_factor = 2 * p_own * sigma, p_xy * other_sigma  # of a and b, from the products
    if COMPARE == ROW_COSINE:
        factor = 2 * grad / n / n / scale
        r, s = k * row_value[:, None], m * other_row_value[:, None]
        q, t = k * column_value[None, :], m * other_column_value[None, :]
        by_row = (r - s - row_loss[:, None] * r) * (factor * row_value)[:, None]
        by_column = (q - t - column_loss[None, :] * q) * (factor * column_value)[None, :]
        return by_row + by_column + 2 * (own_factor * k + other_factor * m)
    a = _transform(k, row_value, column_value, total, rows, cols, n, COMPARE)
    b = _transform(m, other_row_value, other_column_value, other_total, rows, cols, n, COMPARE)
    if COMPARE == DIFFERENCE:
        return 2 * (2 * grad / n / n * (a - b) + own_factor * a + other_factor * b)
    inv, other_inv = _inverse(square), _inverse(other_square)
    if COMPARE == MEAN:
        mine = sums * inv / n
        step = grad * (mine - other_sums * other_inv / n) * inv / sigma
        return 2 * (step / n - step * mine * inv * a + own_factor * a + other_factor * b)
    # The unit matrices' difference carries the gradient near agreement: it is formed element by element.
    step = tl.where((square > 0) & (other_square > 0), grad, 0.0) * inv / sigma
    da = step * (a * inv - b * other_inv) + (own_factor - step * value * inv) * a + other_factor * b
    if COMPARE == CKA_ROW:
        at, bt = k * column_value[None, :], m * other_column_value[None, :]
        da_t = step * (at * inv - bt * other_inv) + (own_factor - step * value * inv) * at + other_factor * bt
        through = row_value * row_value * row_value * tl.sum(da * k, 1)
        both = da * row_value[:, None] + da_t * column_value[None, :]
        return (both - tl.where(rows[:, None] == cols[None, :], through[:, None], 0.0)) / sigma
    return 2 * da


@triton.jit
def _write_gradient(
    k_ptr,
    l_ptr,
    out,
    n,
    k_side,
    l_side,
    grad,
    p_xy,
    p_own,
    value,
    COMPARE: tl.constexpr,
    PROJECT: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    k_scale, k_cols, k_total, aa, sum_a, k_loss = k_side
    l_scale, l_cols, l_total, bb, sum_b, l_loss = l_side
    cols = tl.arange(0, BN)
    mean = k_cols * 0
    for step in tl.static_range(2):
        # The first round finds the columns' means, where the comparison leaves some; the second writes.
        if step == 1 or PROJECT:
            for start in range(0, n, BR):
                rows = start + tl.arange(0, BR)
                ok = (rows < n)[:, None] & (cols < n)[None, :]
                k, m = (
                    _block(k_ptr, k_scale, rows, cols, n, COMPARE),
                    _block(l_ptr, l_scale, rows, cols, n, COMPARE),
                )
                k_rows = _row_values(k, k_ptr, k_scale, rows, n, COMPARE)
                l_rows = _row_values(m, l_ptr, l_scale, rows, n, COMPARE)
                k_row_loss, l_row_loss = k_rows * 0, l_rows * 0
                if COMPARE == ROW_COSINE:
                    r, s = k * k_rows[:, None], m * l_rows[:, None]
                    k_row_loss = tl.where(
                        k_rows * (NORM_FLOOR / k_scale) < 0.9999, tl.sum(r * (r - s), 1), 0.0
                    )
                own = (k_scale, k_rows, k_cols, k_total, aa, sum_a, k_row_loss, k_loss)
                other = (l_scale, l_rows, l_cols, l_total, bb, sum_b, l_row_loss, l_loss)
                tile = _gradient_block(k, m, own, other, n, grad, p_xy, p_own, value, rows, cols, COMPARE)
                if step == 0:
                    mean += tl.sum(tl.where(ok, tile, 0.0), 0) / n
                else:
                    tl.store(out + rows[:, None] * n + cols[None, :], tile - mean[None, :], ok)


@jit(do_not_specialize=["groups", "n", "need_x", "need_y"])
def compare_backward(
    matrices,
    group_stride,
    n,
    grad_products,
    grad_distance,
    out,
    groups,
    need_x,
    need_y,
    COMPARE: tl.constexpr,
    PROJECT: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """out [groups, 2, n, n]: Gx and Gy of dX = Gx Xc, dY = Gy Yc; with PROJECT minus their columns' means."""
    g = tl.program_id(0).to(tl.int64)
    k_ptr = matrices + g * group_stride
    l_ptr = k_ptr + n * n
    out += g * 2 * n * n
    stats = _statistics(k_ptr, l_ptr, n, COMPARE, BN, BR)
    k_scale, l_scale, k_cols, l_cols, k_total, l_total, aa, bb, ab, sum_a, sum_b = stats
    value, k_loss, l_loss = _distance(k_ptr, l_ptr, n, stats, COMPARE, BN, BR)
    k_loss = tl.where(
        k_cols * (NORM_FLOOR / k_scale) < 0.9999, k_loss, 0.0
    )  # a row below the floor has a constant norm
    l_loss = tl.where(l_cols * (NORM_FLOOR / l_scale) < 0.9999, l_loss, 0.0)
    grad = tl.load(grad_distance + g)
    p_xy, p_xx = tl.load(grad_products + g), tl.load(grad_products + groups + g)
    p_yy = tl.load(grad_products + 2 * groups + g)
    k_side, l_side = (
        (k_scale, k_cols, k_total, aa, sum_a, k_loss),
        (l_scale, l_cols, l_total, bb, sum_b, l_loss),
    )
    if need_x:
        _write_gradient(
            k_ptr, l_ptr, out, n, k_side, l_side, grad, p_xy, p_xx, value, COMPARE, PROJECT, BN, BR
        )
    if need_y:
        _write_gradient(
            l_ptr, k_ptr, out + n * n, n, l_side, k_side, grad, p_xy, p_yy, value, COMPARE, PROJECT, BN, BR
        )


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
        largest = tl.maximum(largest, _diagonal(p, (start + tl.arange(0, BLOCK)).to(tl.int64), n))
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
    product_xy, product_xx, product_yy = (
        xy * scale_x * scale_y,
        xx * scale_x * scale_x,
        yy * scale_y * scale_y,
    )
    if COMPARE == DIFFERENCE:
        value = (product_xx + product_yy - 2 * product_xy) / samples / samples
    else:
        value = tl.where((xx > 0) & (yy > 0), 1 - xy * _inverse(xx) * _inverse(yy), 1.0)
    tl.store(products + g, product_xy)
    tl.store(products + groups + g, product_xx)
    tl.store(products + 2 * groups + g, product_yy)
    tl.store(distance + g, tl.maximum(value, 0.0))


@jit(do_not_specialize=["groups", "samples", "blocks"])
def norm_factors(
    norms, grad_products, grad_distance, factors, groups, samples, blocks, COMPARE: tl.constexpr
):
    """Factors [groups, 3] of (X Y^T) Y, (X X^T) X and (Y Y^T) Y in the gradients, for pair_apply."""
    g = tl.program_id(0).to(tl.int64)
    xy, xx, yy, scale_x, scale_y = _finished_norms(norms, g, blocks)
    grad = tl.load(grad_distance + g)
    p_xy, p_xx = tl.load(grad_products + g), tl.load(grad_products + groups + g)
    p_yy = tl.load(grad_products + 2 * groups + g)
    if COMPARE == DIFFERENCE:
        step = grad / samples / samples
        f_xy, f_xx, f_yy = -4 * step, 4 * step, 4 * step
    else:
        inverse = _inverse(xx) * _inverse(yy)
        f_xy = -2 * grad * inverse / scale_x / scale_y
        f_xx = 2 * grad * inverse * xy * _inverse(xx) * _inverse(xx) / scale_x / scale_x
        f_yy = 2 * grad * inverse * xy * _inverse(yy) * _inverse(yy) / scale_y / scale_y
    tl.store(factors + g * 3, f_xy + 2 * p_xy)
    tl.store(factors + g * 3 + 1, f_xx + 4 * p_xx)
    tl.store(factors + g * 3 + 2, f_yy + 4 * p_yy)
