"""What every reference shares."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """The type that sums run in: float64 if a tensor is float64, else float32."""
    return (
        torch.float64 if any(v is not None and v.dtype == torch.float64 for v in tensors) else torch.float32
    )


def autocast_device(x: Tensor) -> str:
    """Whose autocast rules the ops on x; PyTorch has none for meta tensors, and raises."""
    return "cpu" if x.is_meta else x.device.type
