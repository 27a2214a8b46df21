"""STAND-IN for the branch `crisscross`, in plain PyTorch: the merge takes theirs."""

from __future__ import annotations

import torch
from torch import Tensor


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of every pixel over the H + W - 1 pixels of its row and column: [B, e, H, W]."""
    h, w = query.shape[2:]
    column = torch.einsum("bdhw,bdiw->bhwi", query, key)
    diagonal = torch.eye(h, dtype=torch.bool, device=query.device)[None, :, None]
    column = column.masked_fill(diagonal, float("-inf"))
    row = torch.einsum("bdhw,bdhj->bhwj", query, key)
    weights = torch.cat([column, row], 3).softmax(3)
    columns = torch.einsum("bhwi,beiw->behw", weights[..., :h], value)
    return columns + torch.einsum("bhwj,behj->behw", weights[..., h:], value)
