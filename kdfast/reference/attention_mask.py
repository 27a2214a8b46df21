"""Attention-guided distillation in plain PyTorch: the truth, the fallback and the benchmarks' baseline.

Of a map A [B, C, H, W] with P = H W pixels:

    spatial and channel attention  G^s = mean over channels of |A| [B, 1, H, W],  G^c = mean over pixels of |A| [B, C]
    masks                          M^s = P (softmax(G^s_S / T) + softmax(G^s_T / T)) / 2, per image, or, with
                                   ``softmax_of_sum``, P softmax((G^s_S + G^s_T) / T); M^c alike, with C for P
    L_AT                           |G^s_S - G^s_T| + |G^c_S - G^c_T|, norms over the whole batch; ``signed``: of
                                   means of A
    L_AM                           (sum of M^s M^c (A_S - A_T)²)^½, over the whole batch
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import accumulator


class Settings(NamedTuple):
    """The op's arguments after the maps.

    ``through``: also return what gradients through the masks need; ``pairs``: return pooled attention of student and
    teacher, not only its difference (``through`` needs it).
    """

    temperature: float
    transfer_weight: float
    masked_weight: float
    softmax_of_sum: bool
    channel_mask: bool
    signed: bool
    through: bool
    pairs: bool

    @property
    def kept(self) -> tuple[int, int]:
        """Leading axes of the pooled attention that is returned: means of |A| and of A or what L_AT compares, maps."""
        return 1 + (self.signed and self.through), 1 + self.pairs


def attention_pool(x: Tensor, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Means of |x| over channels and over pixels, with ``signed`` followed by those of x.

    Args:
        x: [B, C, H, W].

    Returns:
        spatial [1 + signed, B, 1, H, W] and channel [1 + signed, B, C], float32 (float64 for float64), differentiable.
    """
    x = x.to(accumulator(x))
    kinds = [x.abs(), x] if signed else [x.abs()]
    return torch.stack([k.mean(1, keepdim=True) for k in kinds]), torch.stack([k.mean((2, 3)) for k in kinds])


def mask(student: Tensor, teacher: Tensor, temperature: float, softmax_of_sum: bool) -> Tensor:
    """Mask of two attention maps [B, ...] of one shape; its mean over every image is 1."""
    maps = [v.flatten(1) / temperature for v in (student, teacher)]
    if softmax_of_sum:
        weights = torch.softmax(maps[0] + maps[1], 1)
    else:
        weights = (torch.softmax(maps[0], 1) + torch.softmax(maps[1], 1)) / 2
    return (weights * weights.shape[1]).view(student.shape)


def masked_distance(x: Tensor, y: Tensor, spatial_mask: Tensor, channel_mask: Tensor) -> Tensor:
    """(sum of spatial_mask * channel_mask * (x - y)²)^½, a scalar; its gradient where it is 0 is 0.

    Args:
        x, y: [B, C, H, W]; spatial_mask: [B, 1, H, W]; channel_mask: [B, C].
    """
    dtype = accumulator(x, y)
    error = (spatial_mask * channel_mask[:, :, None, None] * (x.to(dtype) - y.to(dtype)).square()).sum()
    return torch.where(error > 0, torch.where(error > 0, error, 1).sqrt(), 0)


def attention_mask(
    student: Tensor,
    teacher: Tensor,
    adapted: Tensor | None,
    temperature: float,
    transfer_weight: float,
    masked_weight: float,
    softmax_of_sum: bool = False,
    channel_mask: bool = True,
    signed: bool = False,
    detach_mask: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """transfer_weight * L_AT + masked_weight * L_AM of one level.

    Args:
        student, teacher: maps [B, C, H, W].
        adapted: the student's map for L_AM, after its adaptation layer; None: ``student``.
        channel_mask: weight the channels too, else M^c = 1.
        signed: compare means of A, not of |A|, in L_AT.
        detach_mask: no gradient through the masks.

    Returns:
        loss (scalar); distances [3] = spatial and channel part of L_AT (0 where ``transfer_weight`` is), L_AM, without
        gradients; and what L_AT compares: spatial [2, B, 1, H, W], channel [2, B, C], student first. float32 (float64
        for float64), loss, spatial and channel differentiable, any number of times.
    """
    dtype = accumulator(student, teacher)
    pooled = [[p.to(dtype) for p in attention_pool(v, signed)] for v in (student, teacher)]
    spatial, channel = (torch.stack([pooled[0][i], pooled[1][i]], 1) for i in (0, 1))  # [kinds, 2, B, ...]
    spatial_weight = mask(*spatial[0], temperature, softmax_of_sum)
    channel_weight = mask(*channel[0], temperature, softmax_of_sum)
    if not channel_mask:
        channel_weight = torch.ones_like(channel_weight)
    if detach_mask:
        spatial_weight, channel_weight = spatial_weight.detach(), channel_weight.detach()
    masked = masked_distance(student if adapted is None else adapted, teacher, spatial_weight, channel_weight)
    spatial, channel = spatial[-1], channel[-1]
    loss, transfer = masked_weight * masked, masked.new_zeros(2)
    if transfer_weight:
        transfer = torch.stack([_distance(*spatial), _distance(*channel)])
        loss = loss + transfer_weight * transfer.sum()
    return loss, torch.cat([transfer, masked[None]]).detach(), spatial, channel


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x - y)  # its gradient at 0 is 0
