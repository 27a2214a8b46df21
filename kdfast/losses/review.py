"""ReviewKD: every teacher level reviewed by a fusion of the student levels above it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._common import Loss, check_fits, check_pair, describe, levels, total
from .features import hierarchical_context


class AttentionFusion(nn.Module):
    """Attention-based fusion of a student level with what comes from above.

    Args:
        in_channels: of the student level; mid_channels: of the fused map; out_channels: of the teacher level.
        fuse: whether there is a level above.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels)
        )
        self.project = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.attention = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        for conv in (self.reduce[0], self.project[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, above: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Output of the teacher's shape, and the fused map that goes down; ``size``: H, W of the teacher level."""
        x = self.reduce(x)
        if self.attention is not None:
            above = F.interpolate(above, x.shape[2:], mode="nearest")
            share = self.attention(torch.cat([x, above], 1))  # [B, 2, H, W]
            x = x * share[:, :1] + above * share[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.project(x), x


class ReviewKDLoss(Loss):
    """ReviewKD (Chen et al., CVPR 2021): fusion top-down, hierarchical context loss with every teacher level.

    Args:
        student_channels, teacher_channels: of the levels, shallow to deep; the last is usually the pooled embedding.
        mid_channels: of the fused maps; min(512, deepest student level) by default.
        weight: factor on the value; published weights are 1 to 8, with a warm-up of 20 epochs (CIFAR) or 1 (ImageNet).

    Shape: sequences of maps [B, C, H, W]; an embedding [B, C] counts as a map of 1 x 1. The published code takes the
    teacher's levels before their last ReLU. Differentiable in all levels and in the fusion modules.

    Raises:
        ValueError, TypeError: unequal numbers of levels; levels that are no maps or embeddings, or of other channels.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        mid_channels: int | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if len(student_channels) != len(teacher_channels) or not len(student_channels):
            raise ValueError(
                f"student_channels and teacher_channels need equally many levels, at least one: "
                f"got {list(student_channels)} and {list(teacher_channels)}"
            )
        mid = mid_channels or min(512, student_channels[-1])
        last = len(student_channels) - 1
        self.fusions = nn.ModuleList(
            AttentionFusion(c, mid, out, fuse=level < last)
            for level, (c, out) in enumerate(zip(student_channels, teacher_channels, strict=True))
        )

    def check(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of levels; raises before a batch norm counts levels that do not fit."""
        if isinstance(student, Tensor) or isinstance(teacher, Tensor):
            raise TypeError("student and teacher: need sequences of levels, got a tensor")
        pairs = levels(student, teacher)
        if len(pairs) != len(self.fusions):
            raise ValueError(f"student: need {len(self.fusions)} levels, one per fusion, got {len(pairs)}")
        for fusion, pair in zip(self.fusions, pairs, strict=True):
            check_pair(*pair)
            channels = fusion.reduce[0].in_channels, fusion.project[0].out_channels
            for name, v, need in zip(("student", "teacher"), pair, channels, strict=True):
                if v.dim() not in (2, 4) or v.shape[1] != need:
                    raise ValueError(f"{name}: need [B, {need}, H, W] or [B, {need}], got {describe(v)}")
            check_fits("student", pair[0], fusion.reduce[0].weight)
        return pairs

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        pairs = self.check(student, teacher)
        terms, above = [], None
        for fusion, (s, t) in reversed(list(zip(self.fusions, pairs, strict=True))):
            s, t = (v[:, :, None, None] if v.dim() == 2 else v for v in (s, t))
            out, above = fusion(s, above, t.shape[2:])
            terms.append(hierarchical_context(out, t))
        return self.weight * total(terms).float()
