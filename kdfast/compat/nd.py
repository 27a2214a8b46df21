"""Drop-ins for the published code of "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"."""

from __future__ import annotations

from torch import Tensor, nn

from ..losses import logits
from ._direct_norm import DirectNormLoss

__all__ = ["DKDLoss", "DirectNormLoss", "KDLoss"]


class KDLoss(nn.Module):
    """``kl_loss_factor`` T² KL(teacher ‖ student) of logits [B, K], mean over the batch."""

    def __init__(self, kl_loss_factor: float = 1.0, T: float = 4.0) -> None:
        super().__init__()
        self.loss = logits.KDLoss(T, weight=kl_loss_factor)

    def forward(self, s_out: Tensor, t_out: Tensor) -> Tensor:
        return self.loss(s_out, t_out)


class DKDLoss(nn.Module):
    """T² (``alpha`` TCKD + ``beta`` NCKD) of logits [B, K]; finite where the published code gives inf."""

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, T: float = 4.0) -> None:
        super().__init__()
        self.loss = logits.DKDLoss(alpha, beta, T)

    def forward(self, s_logits: Tensor, t_logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss(s_logits, t_logits, labels)
