"""Drop-ins for the loss functions of mdistiller: same names, arguments and values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..losses._common import levels, total
from ..losses.features import attention_transfer, hierarchical_context
from ..losses.gram import SimilarityPreservingLoss
from ..losses.logits import DKDLoss, KDLoss

__all__ = ["at_loss", "dkd_loss", "hcl_loss", "kd_loss", "sp_loss"]


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) of logits [B, K], mean over the batch."""
    return KDLoss(temperature)(logits_student, logits_teacher)


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """T² (alpha TCKD + beta NCKD); finite where the published code gives inf (a saturated softmax)."""
    return DKDLoss(alpha, beta, temperature)(logits_student, logits_teacher, target)


def at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: float) -> Tensor:
    """Attention transfer summed over levels; the maps' signs are kept for odd ``p``, as there."""
    return total([attention_transfer(s, t, p, signed=True) for s, t in levels(g_s, g_t)])


def hcl_loss(fstudent: Sequence[Tensor], fteacher: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss summed over levels."""
    return total([hierarchical_context(s, t) for s, t in levels(fstudent, fteacher)])


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Similarity preserving summed over levels; a scalar, where the published value has shape [1]."""
    return SimilarityPreservingLoss()(g_s, g_t)
