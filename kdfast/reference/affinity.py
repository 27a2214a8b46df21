"""Pairwise affinities in plain PyTorch: the truth, the fallback and the benchmarks' baseline.

Concatenation (Zhang & Ma, Table IX; Wang et al. 2018): a weight w of two halves turns ReLU(w·[θ_i; φ_j]) into
ReLU(a_i + b_j) with a = θ w_1 and b = φ w_2, so that y_i = 1/m Σ_j ReLU(a_i + b_j) g_j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulator


def affinity(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """The dense form, which holds a matrix [B, n, m]; differentiable, any number of times.

    Args:
        a: [B, n]; b: [B, m]; g: [B, m, e].

    Returns:
        [B, n, e] in the dtype of ``g``.
    """
    dtype = accumulator(a, b, g)
    pairs = torch.relu(a.to(dtype)[:, :, None] + b.to(dtype)[:, None, :])  # [B, n, m]
    return (pairs @ g.to(dtype) / b.shape[1]).to(g.dtype)


def dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """y_i = 1/m Σ_j (θ_i·φ_j) g_j by the matrix of all pairs.

    Args:
        theta: [B, d, n]; phi: [B, d, m]; g: [B, e, m].

    Returns:
        [B, e, n].
    """
    pairs = theta.mT @ phi / phi.shape[2]  # [B, n, m]
    return g @ pairs.mT


def softmax(theta: Tensor, phi: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    """y_i = Σ_j softmax_j(scale θ_i·φ_j) g_j by the matrix of all pairs; shapes as :func:`dot_product`."""
    pairs = torch.softmax(scale * (theta.mT @ phi), 2)
    return g @ pairs.mT
