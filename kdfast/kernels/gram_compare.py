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
NORM_FLOOR = tl.constexpr(1e-12)  # of a row's norm in row_cosine


@triton.jit
def diagonal(k_ptr, index, n):
    return tl.load(k_ptr + index * (n + 1), index < n, other=0.0)


@triton.jit
def _scale(k_ptr, n, COMPARE: tl.constexpr, BN: tl.constexpr):
    scale = tl.max(diagonal(k_ptr, tl.arange(0, BN), n), 0)
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
        return _weight(diagonal(k_ptr, rows, n) / scale)
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
    value = tl.zeros_like(diagonal(k_ptr, cols, n))
    if COMPARE == CKA_ROW:
        value = _weight(diagonal(k_ptr, cols, n) / scale)
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
def _transformed(k, k_ptr, scale, column_value, total, rows, cols, n, COMPARE: tl.constexpr):
    row_value = _row_values(k, k_ptr, scale, rows, n, COMPARE)
    return _transform(k, row_value, column_value, total, rows, cols, n, COMPARE)


@triton.jit
def inverse(square):
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
        a = _transformed(k, k_ptr, k_scale, k_cols, k_total, rows, cols, n, COMPARE)
        b = _transformed(m, l_ptr, l_scale, l_cols, l_total, rows, cols, n, COMPARE)
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
    inv_a, inv_b = inverse(aa), inverse(bb)
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
            a = _transformed(k, k_ptr, k_scale, k_cols, k_total, rows, cols, n, COMPARE)
            b = _transformed(m, l_ptr, l_scale, l_cols, l_total, rows, cols, n, COMPARE)
            e = a * inv_a - b * inv_b
        square += tl.sum(e * e, 0)
    total = tl.sum(square, 0)
    if (COMPARE == ROW_COSINE) | (COMPARE == DIFFERENCE):
        return total / n / n, k_loss, l_loss
    return tl.where((aa > 0) & (bb > 0), total / 2, 1.0), k_loss, l_loss


@triton.jit
def store_group(products, distance, g, groups, xy, xx, yy, value):
    """Of group g: products [3, groups] and distance [groups]."""
    tl.store(products + g, xy)
    tl.store(products + groups + g, xx)
    tl.store(products + 2 * groups + g, yy)
    tl.store(distance + g, value)


@triton.jit
def load_group(products, distance, g, groups):
    """Of group g: what :func:`store_group` stored."""
    xy, xx = tl.load(products + g), tl.load(products + groups + g)
    return xy, xx, tl.load(products + 2 * groups + g), tl.load(distance + g)


@jit(do_not_specialize=["groups", "n"])
def compare(
    matrices, group_stride, n, products, distance, groups,
    COMPARE: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
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
    store_group(products, distance, g, groups, ab * to_k * to_l, aa * to_k * to_k, bb * to_l * to_l, value)


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
    inv, other_inv = inverse(square), inverse(other_square)
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
    k_ptr, l_ptr, out, n, k_side, l_side, grad, p_xy, p_own, value,
    COMPARE: tl.constexpr, PROJECT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
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
    matrices, group_stride, n, grad_products, grad_distance, out, groups, need_x, need_y,
    COMPARE: tl.constexpr, PROJECT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
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
    p_xy, p_xx, p_yy, grad = load_group(grad_products, grad_distance, g, groups)
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
