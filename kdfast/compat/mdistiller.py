"""Drop-ins for the loss functions of mdistiller: same names, arguments and values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ..losses.gram import SimilarityPreservingLoss
from ..losses.logits import DKDLoss, KDLoss


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


def at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: int) -> Tensor:
    """Attention transfer: mean squared difference of unit maps mean_c x^p, summed over stages [B, C, H, W].

    The map of more rows is pooled (adaptive average) to the height of the other, as a square.
    """
    return sum(_attention_distance(s, t, p) for s, t in zip(g_s, g_t, strict=False))


def _attention_distance(s: Tensor, t: Tensor, p: int) -> Tensor:
    height_s, height_t = s.shape[2], t.shape[2]
    if height_s > height_t:
        s = F.adaptive_avg_pool2d(s, height_t)
    elif height_s < height_t:
        t = F.adaptive_avg_pool2d(t, height_s)
    s, t = (F.normalize(v.pow(p).mean(1).flatten(1)) for v in (s, t))  # [B, HW]
    return (s - t).square().mean()


def hcl_loss(fstudent: Sequence[Tensor], fteacher: Sequence[Tensor]) -> Tensor:
    """ReviewKD's hierarchical context loss, summed over levels [B, C, H, W].

    Per level: the MSE, plus that of the maps pooled to 4 x 4, 2 x 2 and 1 x 1 (where smaller than the map) with
    weights 1/2, 1/4, 1/8 by position, over the sum of the weights.
    """
    loss = 0.0
    for s, t in zip(fstudent, fteacher, strict=False):
        level, weight, total = F.mse_loss(s, t), 1.0, 1.0
        for size in (4, 2, 1):
            if size >= s.shape[2]:
                continue
            weight /= 2
            pooled = F.mse_loss(
                F.adaptive_avg_pool2d(s, (size, size)), F.adaptive_avg_pool2d(t, (size, size))
            )
            level, total = level + weight * pooled, total + weight
        loss = loss + level / total
    return loss


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Similarity preserving, summed over stages [B, ...]."""
    return SimilarityPreservingLoss()(g_s, g_t)
