"""STAND-IN for the branch `affinity`, in plain PyTorch: the merge takes theirs."""

from __future__ import annotations

import torch
from torch import Tensor


def dot_product_affinity(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """theta_i . phi_j g_j summed over j, divided by the number of keys: [B, e, H, W]."""
    summary = torch.einsum("bdm,bem->bde", phi.flatten(2), g.flatten(2)) / phi[0, 0].numel()
    return torch.einsum("bdhw,bde->behw", theta, summary)


def softmax_affinity(theta: Tensor, phi: Tensor, g: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax_j(scale * theta_i . phi_j) g_j summed over j: [B, e, H, W]."""
    query, key, value = (v.flatten(2).transpose(1, 2) for v in (theta, phi, g))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=1.0 if scale is None else scale
    )
    return out.transpose(1, 2).unflatten(2, theta.shape[2:])


def concatenation_affinity(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """relu(a_i + b_j) g_j summed over j, divided by the number of keys: [B, n, e]."""
    return torch.relu(a[:, :, None] + b[:, None]) @ g / b.shape[1]
