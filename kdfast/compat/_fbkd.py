"""Attention part of mmrazor's FBKD (feature-based knowledge distillation): its loss, and what its connectors compute of
attention. The names, arguments, order and values are the published ones.

Kept as published: both masks are means of softmaxes and constants; the channel masks are computed and not used;
what is compared are means of A, not of |A|; norms are not squared and run over the batch. Not kept: where the masked
distance is 0 the published gradient is NaN, here it is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses.attention import attention_parts, masked_feature_distance


class FBKDLoss(nn.Module):
    """Sum of the masked feature distance and the distances of channel and spatial attention and of relations.

    Args:
        mask_l2_weight, channel_weight, spatial_weight, nonloacl_weight: factors on the four (the last as published).
        loss_weight: factor on the sum.

    Shape: ``s_input`` is the student connector's tuple (spatial mask [B, 1, H, W], channel mask [B, C, 1, 1], adapted
    channel attention [B, C], adapted spatial attention [B, 1, H, W], adapted relation [B, C, H, W], adapted map
    [B, C, H, W]); ``t_input`` the teacher connector's (spatial mask, channel mask, spatial attention, relation, map).
    Returns a scalar, differentiable in all of them but the masks.
    """

    def __init__(
        self,
        mask_l2_weight: float = 7e-5,
        channel_weight: float = 4e-3,
        spatial_weight: float = 4e-3,
        nonloacl_weight: float = 7e-5,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.mask_l2_weight, self.channel_weight = mask_l2_weight, channel_weight
        self.spatial_weight, self.nonloacl_weight = spatial_weight, nonloacl_weight
        self.loss_weight = loss_weight

    def forward(self, s_input: tuple[Tensor, ...], t_input: tuple[Tensor, ...]) -> Tensor:
        s_mask, _, s_channel, s_spatial, s_relation, s_map = s_input
        t_mask, _, t_spatial, t_relation, t_map = t_input
        masked = masked_feature_distance(s_map, t_map, (s_mask + t_mask) / 2)
        loss = self.mask_l2_weight * masked
        loss = loss + self.channel_weight * torch.dist(t_map.mean((2, 3)), s_channel)
        loss = loss + self.spatial_weight * torch.dist(t_spatial, s_spatial)
        loss = loss + self.nonloacl_weight * torch.dist(t_relation, s_relation)
        return self.loss_weight * loss


class TeacherAttention(nn.Module):
    """What both connectors compute of a map: masks and attention.

    Args:
        in_channels: of the map; spatial_T, channel_T: temperatures of the masks.
    """

    def __init__(self, in_channels: int, spatial_T: float = 0.5, channel_T: float = 0.5) -> None:
        super().__init__()
        self.in_channels, self.spatial_T, self.channel_T = in_channels, spatial_T, channel_T

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Spatial mask [B, 1, H, W], channel mask [B, C, 1, 1], spatial [B, 1, H, W] and channel attention [B, C]."""
        return attention_parts(x, self.spatial_T, self.channel_T)


class StudentAttention(TeacherAttention):
    """The same with the student's adaptation layers, under their published names."""

    def __init__(self, in_channels: int, spatial_T: float = 0.5, channel_T: float = 0.5) -> None:
        super().__init__(in_channels, spatial_T, channel_T)
        self.channel_wise_adaptation = nn.Linear(in_channels, in_channels)
        self.spatial_wise_adaptation = nn.Conv2d(1, 1, 3, padding=1)
        self.adaptation_layers = nn.Conv2d(in_channels, in_channels, 1)

    def adapted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Spatial mask, channel mask, adapted channel attention, adapted spatial attention, adapted map."""
        spatial_mask, channel_mask, spatial, channel = self.attention(x)
        return (
            spatial_mask,
            channel_mask,
            self.channel_wise_adaptation(channel),
            self.spatial_wise_adaptation(spatial),
            self.adaptation_layers(x),
        )
