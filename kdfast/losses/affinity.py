"""Non-local relations of positions without the n x m matrix: dot product, softmax, concatenation (METHODS: Table IX)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.affinity import affinity
from ..ops.dot_product import dot_product
from ..ops.softmax_affinity import softmax_affinity as softmax
from ._common import check_float, describe


def dot_product_affinity(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """y_i = 1/(h w) Σ_j (θ_i·φ_j) g_j, as linear attention: (g φᵀ / m) θ wherever that takes fewer operations.

    Args:
        theta: queries [B, d, H, W].
        phi, g: keys [B, d, h, w] and values [B, e, h, w]; h x w may be smaller than H x W.

    Returns:
        [B, e, H, W] in the inputs' dtype and the memory format of ``theta``. Differentiable in all three, any number of
        times. Memory beside the result: e x d per image.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Zhang & Ma, TPAMI 2023, Table IX; Wang et al., Non-local Neural Networks, CVPR 2018.
    """
    _check_maps(theta, phi, g)
    q, k, v = (x.flatten(2) for x in (theta, phi, g))  # [B, d, n], [B, d, m], [B, e, m]
    d, e, n, m = q.shape[1], v.shape[1], q.shape[2], k.shape[2]
    if (n + m) * d * e <= n * m * (d + e):
        y = dot_product(q, k, v)
    else:
        # alpha scales before the product is rounded to half precision.
        y = v @ torch.baddbmm(q.new_empty(1, 1, 1), k.mT, q, beta=0, alpha=1 / m)
    return y.unflatten(2, theta.shape[2:])


def softmax_affinity(theta: Tensor, phi: Tensor, g: Tensor, *, scale: float | None = None) -> Tensor:
    """y_i = Σ_j softmax_j(scale θ_i·φ_j) g_j, as flash attention, which holds no n x m matrix.

    Args:
        theta, phi, g: as in :func:`dot_product_affinity`.
        scale: None means 1, as in the published blocks (mmcv's default divides by sqrt(d)).

    Returns:
        [B, e, H, W] in the inputs' dtype. Differentiable in all three. On the CPU by kernels of this library, in the
        memory format of ``theta``; a second derivative takes the n x m matrix. On a GPU, under autocast and on the
        ``reference`` backend by PyTorch's scaled dot-product attention, differentiable once.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Zhang & Ma, TPAMI 2023, Table IX; Wang et al., Non-local Neural Networks, CVPR 2018 (embedded Gaussian).
    """
    _check_maps(theta, phi, g)
    q, k, v = (x.flatten(2) for x in (theta, phi, g))
    return softmax(q, k, v, 1.0 if scale is None else float(scale)).unflatten(2, theta.shape[2:])


def concatenation_affinity(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """y_i = 1/m Σ_j ReLU(a_i + b_j) g_j, exactly, by sorting instead of comparing all pairs.

    Args:
        a: the queries' share w_1·θ_i, [B, n].
        b: the keys' share w_2·φ_j, [B, m], m >= 1.
        g: values [B, m, e], any strides; a transposed [B, e, m] is read in place.

    Returns:
        [B, n, e] in the inputs' dtype, laid out as ``g`` is. Differentiable in all three, any number of times. Time
        O((n + m) (log m + e)), memory beside the result a few numbers per position. The gradient of ReLU at 0 is 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Zhang & Ma, TPAMI 2023, Table IX; Wang et al., Non-local Neural Networks, CVPR 2018.
    """
    for name, x in (("a", a), ("b", b), ("g", g)):
        check_float(name, x)
    same = a.dtype == b.dtype == g.dtype and a.device == b.device == g.device
    shapes = (a.dim(), b.dim(), g.dim()) == (2, 2, 3) and a.shape[0] == b.shape[0] == g.shape[0]
    if not same or not shapes or b.shape[1] != g.shape[1] or not b.shape[1]:
        raise ValueError(
            f"a, b, g: need [B, n], [B, m] and [B, m, e] with m >= 1, one dtype and one device, "
            f"got {describe(a)}, {describe(b)}, {describe(g)}"
        )
    return affinity(a, b, g)


def _check_maps(theta: Tensor, phi: Tensor, g: Tensor) -> None:
    for name, x in (("theta", theta), ("phi", phi), ("g", g)):
        check_float(name, x)
    same = theta.dtype == phi.dtype == g.dtype and theta.device == phi.device == g.device
    if not same or not (theta.dim() == phi.dim() == g.dim() == 4) or 0 in phi.shape[2:]:
        fits = False
    else:
        fits = theta.shape[:2] == phi.shape[:2] and (phi.shape[0], *phi.shape[2:]) == (
            g.shape[0],
            *g.shape[2:],
        )
    if not fits:
        raise ValueError(
            f"theta, phi, g: need [B, d, H, W], [B, d, h, w] and [B, e, h, w], h and w at least 1, one dtype and one "
            f"device, got {describe(theta)}, {describe(phi)}, {describe(g)}"
        )
