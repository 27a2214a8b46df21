"""STAND-IN for the branch `affinity`, in plain PyTorch: the merge takes theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dot_product_affinity(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """theta_i . phi_j g_j summed over j, divided by the number of keys: [B, e, H, W]."""
    summary = torch.einsum("bdm,bem->bde", phi.flatten(2), g.flatten(2)) / phi[0, 0].numel()
    return torch.einsum("bdhw,bde->behw", theta, summary)


def softmax_affinity(theta: Tensor, phi: Tensor, g: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax_j(scale * theta_i . phi_j) g_j summed over j: [B, e, H, W]."""
    query, key, value = (v.flatten(2).transpose(1, 2)[:, None].contiguous() for v in (theta, phi, g))
    width = max(query.shape[-1], value.shape[-1])
    query, key, value = (nn.functional.pad(v, (0, width - v.shape[-1])) for v in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0 if scale is None else scale)
    return out[:, 0, :, : g.shape[1]].transpose(1, 2).unflatten(2, theta.shape[2:])


def concatenation_affinity(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """relu(a_i + b_j) g_j summed over j, divided by the number of keys: [B, n, e]."""
    b, order = b.sort(1)
    g = g.gather(1, order[..., None].expand_as(g))
    both = torch.cat([g, b[..., None] * g], 2)
    sums = nn.functional.pad(both.flip(1).cumsum(1).flip(1), (0, 0, 0, 1))  # suffix sums, and none
    first = torch.searchsorted(b.contiguous(), -a.contiguous())[..., None].expand(-1, -1, both.shape[2])
    plain, weighted = sums.gather(1, first).chunk(2, 2)
    return (a[..., None] * plain + weighted) / b.shape[1]
