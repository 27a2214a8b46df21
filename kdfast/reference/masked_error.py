"""The masked error of two maps, and the mask of areas, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulator

MULTIPLICITIES = ("sum", "squared", "union")


def masked_error(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Mean over all elements of mask * (x - y)², a scalar; 0 for maps without elements.

    Args:
        x, y: [B, C, H, W]; mask: [B, 1, H, W].
    """
    dtype = accumulator(x, y)
    return (mask.to(dtype) * (x.to(dtype) - y.to(dtype)).square()).sum() / max(x.numel(), 1)


def area_mask(boxes: Tensor, height: int, width: int, multiplicity: str) -> Tensor:
    """How much every pixel counts, [B, 1, height, width]: m, m² or (m > 0) for m boxes over it.

    Args:
        boxes: int64 [B, K, 4], (x1, y1, x2, y2) with both ends inside; empty where x2 < x1 or y2 < y1.
        multiplicity: of :data:`MULTIPLICITIES`.
    """
    x1, y1, x2, y2 = boxes[..., None].unbind(2)  # [B, K, 1] each
    column, row = (torch.arange(v, device=boxes.device) for v in (width, height))
    columns = ((column >= x1) & (column <= x2)).float()  # [B, K, W]
    rows = ((row >= y1) & (row <= y2)).float()
    count = rows.transpose(1, 2) @ columns  # [B, H, W]; sums of zeros and ones are exact in any precision
    if multiplicity == "squared":
        count = count.square()
    elif multiplicity == "union":
        count = (count > 0).float()
    return count[:, None]
