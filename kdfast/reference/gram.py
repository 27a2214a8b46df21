"""Comparisons of (centred) Gram matrices in plain PyTorch: the truth, the fallback and the benchmarks' baseline.

A view is a 6-D tensor [G, R1, R2, F1, F2, F3]: groups, up to two row axes, up to three feature axes; it is read
as G matrices of N = R1*R2 rows and D = F1*F2*F3 features. With K and L the N x N Grams of student and teacher, a
comparison is

    cka         1 - <K, L> / (|K| |L|)                                       (Kornblith et al. 2019)
    cka_row     the same with K_ij / sqrt(K_ii), rows only                    (PCKA's published code)
    unbiased    the same with U-centred Grams: 1 - debiased CKA               (Nguyen et al. 2021, Song et al. 2012)
    row_cosine  sum_i |K_i/|K_i| - L_i/|L_i||^2 / N^2                         (similarity preserving)
    mean        (mean K/|K| - mean L/|L|)^2 N^2 / 2                           (the MMD bound of RCKA)
    difference  |K - L|^2 / N^2                                               (pairwise affinity)

``inter`` adds a second term: the same comparison of the transposed matrices (rows are features). Whatever is a squared
norm of features (N features compared over D samples) is computed on the smaller side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import autocast_device

COMPARISONS = ("cka", "cka_row", "unbiased", "row_cosine", "mean", "difference")


def gram(
    x: Tensor,
    y: Tensor,
    compare: int = 0,
    centered: bool = True,
    cosine: bool = False,
    inter: bool = False,
    feature_side: bool = False,
) -> tuple[Tensor, Tensor]:
    """Products and distances of the Grams of two views.

    Args:
        x: student view [G, R1, R2, F1, F2, F3]; y: teacher view with the same G and N; D may differ unless ``inter``.
        compare: index into :data:`COMPARISONS`.
        centered: subtract each feature's mean over the rows (for ``inter``: each row's mean over the features).
        cosine: scale every row to unit length first, before centring.
        inter: add the comparison of the transposes.
        feature_side: form D x D products instead of N x N Grams; for cka, cka_row and difference only.

    Returns:
        products [T, 3, G] = (<K, L>, <K, K>, <L, L>) and distance [T, G], T = 1 (or 2 with ``inter``), float32
        (float64 for float64 inputs). Differentiable in x and y, any number of times.
    """
    with torch.autocast(autocast_device(x), enabled=False):  # matrix products stay in the accumulation type
        return _terms(x, y, COMPARISONS[compare], centered, cosine, inter, feature_side)


def _terms(
    x: Tensor, y: Tensor, compare: str, centered: bool, cosine: bool, inter: bool, feature_side: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    x, y = (v.flatten(3).flatten(1, 2).to(dtype) for v in (x, y))  # [G, N, D], [G, N, D']
    if cosine:
        x, y = _unit_rows(x), _unit_rows(y)
    terms = [_compare(x, y, compare, centered, feature_side)]
    if inter:
        xt, yt = x.mT, y.mT  # rows are features
        terms.append(_compare(xt, yt, compare, centered, feature_side=x.shape[1] < x.shape[2]))
    products, distances = zip(*terms, strict=True)
    return torch.stack(products), torch.stack(distances)


def center(x: Tensor) -> Tensor:
    """Subtract the mean over the rows of [G, N, D]; a reference row goes first, so that constants become exactly 0."""
    if x.shape[1] == 0:
        return x
    x = x - x[:, :1].detach()
    return x - x.mean(1, keepdim=True)


def _compare(x: Tensor, y: Tensor, compare: str, centered: bool, feature_side: bool) -> tuple[Tensor, Tensor]:
    n = x.shape[1]
    if centered:
        x, y = center(x), center(y)
        if n <= 2:  # one row: Grams are 0; two rows: all Grams are parallel; a constant, with gradient 0
            x, y = x.detach() + 0 * x, y.detach() + 0 * y
    if feature_side:
        products, distance = _feature_side(x, y, compare)
    else:
        products, distance = _gram_side(x @ x.mT, y @ y.mT, compare)
    return products, distance


def _gram_side(k: Tensor, m: Tensor, compare: str) -> tuple[Tensor, Tensor]:
    """k, m: Grams of student and teacher [G, N, N]."""
    n = k.shape[1]
    if compare == "cka_row":
        k, m = _scale_rows(k), _scale_rows(m)
    elif compare == "unbiased":
        k, m = _u_center(k), _u_center(m)
    products = torch.stack([(k * m).sum((1, 2)), (k * k).sum((1, 2)), (m * m).sum((1, 2))])
    if compare == "row_cosine":
        unit = torch.nn.functional.normalize
        return products, (unit(k, dim=2) - unit(m, dim=2)).square().sum((1, 2)) / n**2
    if compare == "difference":
        return products, (k - m).square().mean((1, 2))
    k_unit, m_unit = _unit(k), _unit(m)  # [G, N, N], Frobenius norm 1 (or 0)
    if compare == "mean":
        return products, ((k_unit - m_unit).sum((1, 2)) / n).square() / 2
    # Half the squared distance of the unit Grams is 1 - <K, L>/(|K| |L|) without its cancellation near 1.
    empty = (_scale(k) == 0) | (_scale(m) == 0)
    return products, torch.where(empty[:, 0, 0], 1.0, (k_unit - m_unit).square().sum((1, 2)) / 2)


def _feature_side(x: Tensor, y: Tensor, compare: str) -> tuple[Tensor, Tensor]:
    if compare == "cka_row":
        u, v = _inverse_norm(x), _inverse_norm(y)  # [G, N, 1]
        pairs = [
            ((x * u).mT @ (y * v), x.mT @ y),
            ((x * u * u).mT @ x, x.mT @ x),
            ((y * v * v).mT @ y, y.mT @ y),
        ]
    else:
        pairs = [(p, p) for p in (x.mT @ y, x.mT @ x, y.mT @ y)]
    xy, xx, yy = (_scaled_dot(p, q) for p, q in pairs)  # each: (value / (s t), s t)
    products = torch.stack([value * scale for value, scale in (xy, xx, yy)])
    if compare == "difference":
        distance = (products[1] + products[2] - 2 * products[0]) / x.shape[1] ** 2
    else:
        empty = (xx[0] == 0) | (yy[0] == 0)
        b, c = (torch.where(empty, 1.0, p[0]) for p in (xx, yy))
        scale = (
            xy[1]
            * xx[1].clamp_min(torch.finfo(x.dtype).tiny).rsqrt()
            * yy[1].clamp_min(torch.finfo(x.dtype).tiny).rsqrt()
        )
        distance = torch.where(empty, 1.0, 1 - xy[0] * scale * b.rsqrt() * c.rsqrt())
    # Rounding may leave a distance just below zero; its gradient stays.
    return products, distance + (distance.clamp_min(0) - distance).detach()


def _scaled_dot(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    s, t = _scale(p), _scale(q)
    one = torch.ones_like(s)
    dot = (p / torch.where(s == 0, one, s) * (q / torch.where(t == 0, one, t))).sum((1, 2))
    return dot, (s * t)[:, 0, 0]


def _scale(k: Tensor) -> Tensor:
    """Largest magnitude of each matrix, detached: [G, 1, 1]. Dividing by it keeps squares in range."""
    if k.numel() == 0:
        return k.new_zeros(k.shape[0], 1, 1)
    return k.detach().abs().amax((1, 2), keepdim=True)


def _unit(k: Tensor) -> Tensor:
    """k / |k|_F per group, and 0 where k is 0."""
    scale = _scale(k)
    k = k / torch.where(scale == 0, 1.0, scale)
    norm_sq = k.square().sum((1, 2), keepdim=True)
    return k * torch.where(scale == 0, 1.0, norm_sq).rsqrt()


def _row_scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """A constant of each row's size and its inverse norm when divided by it, each [G, N, 1]; 0 for a zero row."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    safe = torch.where(scale == 0, 1.0, scale)
    norm_sq = (x / safe).square().sum(-1, keepdim=True)
    return safe, torch.where(scale == 0, 0.0, torch.where(scale == 0, 1.0, norm_sq).rsqrt())


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x_i| of each row [G, N, 1]; 0 for a zero row."""
    if x.shape[-1] == 0:
        return x.new_zeros(*x.shape[:-1], 1)
    safe, inverse = _row_scales(x)
    return inverse / safe


def _unit_rows(x: Tensor) -> Tensor:
    """x_i / |x_i|, of one feature exactly 1 or -1; a zero row stays zero."""
    if x.shape[-1] == 0:
        return x
    safe, inverse = _row_scales(x)
    return x / safe * inverse


def _scale_rows(k: Tensor) -> Tensor:
    """K_ij / sqrt(K_ii); a zero row stays zero."""
    eye = torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
    diagonal = (k * eye).sum(
        2, keepdim=True
    )  # not k.diagonal(): inductor (torch 2.13) miscompiles its backward here
    return k * torch.where(diagonal > 0, torch.where(diagonal > 0, diagonal, 1.0).rsqrt(), 0.0)


def _u_center(k: Tensor) -> Tensor:
    """U-centring: the Gram without its diagonal, projected on zero row sums; needs N >= 4, else zero."""
    n = k.shape[1]
    if n < 4:
        return 0 * k
    off = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    k = k * off
    rows = k.sum(2, keepdim=True) / (n - 2)  # [G, N, 1]
    total = k.sum((1, 2), keepdim=True) / ((n - 1) * (n - 2))
    return (k - rows - rows.mT + total) * off
