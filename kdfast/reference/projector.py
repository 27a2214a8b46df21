"""The projector of student embeddings in plain PyTorch: batch norm over the batch, dropout, linear layer.

    z = noise * (gamma (x - mean) / sqrt(var + eps) + beta),    y = z Wᵀ + b

with mean and (biased) variance of every column, and noise 0 or 1 / (1 - p) where there is dropout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def projector(
    x: Tensor, noise: Tensor | None, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """[B, D] to [B, D']. Differentiable in all but noise, any number of times."""
    z = F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)
    return F.linear(z if noise is None else z * noise, weight, bias)
