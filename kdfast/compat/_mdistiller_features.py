"""Feature losses with the names, arguments and values of mdistiller's functions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..losses._common import levels, total
from ..losses.features import attention_transfer, hierarchical_context
from ..losses.gram import SimilarityPreservingLoss


def at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: float) -> Tensor:
    """Attention transfer summed over levels; the maps' signs are kept for odd ``p``, as there."""
    return total([attention_transfer(s, t, p, signed=True) for s, t in levels(g_s, g_t)])


def hcl_loss(fstudent: Sequence[Tensor], fteacher: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss summed over levels."""
    return total([hierarchical_context(s, t) for s, t in levels(fstudent, fteacher)])


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Similarity preserving summed over levels; a scalar, where the published value has shape [1]."""
    return SimilarityPreservingLoss()(g_s, g_t)
