"""mmrazor's ``DISTLoss``, for :mod:`kdfast.compat.mmrazor`."""

from __future__ import annotations

from torch import Tensor, nn

from ..losses import logits


class DISTLoss(nn.Module):
    """``loss_weight`` τ² (``inter_loss_weight`` inter + ``intra_loss_weight`` intra) of logits [N, K] or [B, K, H, W].

    ``teacher_detach``: no gradient to ``logits_T``.
    """

    def __init__(
        self,
        inter_loss_weight: float = 1.0,
        intra_loss_weight: float = 1.0,
        tau: float = 1.0,
        loss_weight: float = 1.0,
        teacher_detach: bool = True,
    ) -> None:
        super().__init__()
        self.loss = logits.DISTLoss(inter_loss_weight, intra_loss_weight, tau, weight=loss_weight)
        self.teacher_detach = teacher_detach

    def forward(self, logits_S: Tensor, logits_T: Tensor) -> Tensor:
        if self.teacher_detach:
            logits_T = logits_T.detach()
        if logits_S.dim() == 4:  # every pixel is a sample
            logits_S, logits_T = logits_S.movedim(1, -1), logits_T.movedim(1, -1)
        return self.loss(logits_S, logits_T)
