"""Drop-in for the published code of "Knowledge Distillation from A Stronger Teacher" (DIST)."""

from __future__ import annotations

from torch import Tensor, nn

from ..losses.logits import DISTLoss

__all__ = ["DIST"]


class DIST(nn.Module):
    """``beta`` inter + ``gamma`` intra of logits [B, K], temperature 1."""

    def __init__(self, beta: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        self.loss = DISTLoss(beta, gamma)

    def forward(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        return self.loss(z_s, z_t)
