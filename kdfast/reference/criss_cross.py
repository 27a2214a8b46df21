"""Criss-cross attention in plain PyTorch (Huang et al., CCNet): the truth, the fallback and the baseline.

For a position p = (h, w), its row and its column, N(p), hold H + W - 1 cells, its own once:

    out_p = sum over q in N(p) of softmax_q(<query_p, key_q>) value_q
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulator


def criss_cross(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every position over its own row and column.

    Args:
        query, key: [B, d, H, W]; value: [B, e, H, W].

    Returns:
        out [B, e, H, W] of the type of ``value``, computed in float32 (float64 where an input is), and the
        log-sum-exp of the scores [B, H, W] in that type. Differentiable in the three inputs, any number of times.
    """
    dtype = accumulator(query, key, value)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    h, w = q.shape[2:]
    own = torch.eye(h, dtype=torch.bool, device=q.device)[:, None, :]  # [H, 1, H]
    column = torch.einsum("bchw,bcgw->bhwg", q, k).masked_fill(own, float("-inf"))  # [B, H, W, H]
    row = torch.einsum("bchw,bchg->bhwg", q, k)  # [B, H, W, W]
    scores = torch.cat([column, row], 3)  # [B, H, W, H + W]
    weights = scores.softmax(3)
    out = torch.einsum("bhwg,bcgw->bchw", weights[..., :h], v)
    out = out + torch.einsum("bhwg,bchg->bchw", weights[..., h:], v)
    return out.to(value.dtype), scores.logsumexp(3)
