"""mmrazor's FBKD (feature-based knowledge distillation): its loss and its connectors. The names, arguments, order, state
keys and values are the published ones.

Kept as published: both masks are means of softmaxes and constants; the channel masks are computed and not used;
what is compared are means of A, not of |A|; norms are not squared and run over the batch. Not kept: where the masked
distance is 0 the published gradient is NaN, here it is 0. ``sub_sample`` pools keys and values by 2 and then by
``maxpool_stride``, as published; the Gaussian mode, which fails there because its keys miss the first pooling, pools
both alike here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..losses._common import wide
from ..losses._pointwise import in_its_type
from ..losses.attention import attention_parts, masked_feature_distance
from ..losses.non_local import relation_distance
from .mmcv import NonLocal2d


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
        loss = loss + self.channel_weight * torch.dist(wide(t_map.mean((2, 3))), wide(s_channel))
        loss = loss + self.spatial_weight * torch.dist(wide(t_spatial), wide(s_spatial))
        loss = loss + self.nonloacl_weight * relation_distance(s_relation, t_relation)
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
            in_its_type(self.channel_wise_adaptation, channel),
            in_its_type(self.spatial_wise_adaptation, spatial),
            self.adaptation_layers(x),
        )


class NonLocal2dMaxpoolNstride(NonLocal2d):
    """mmcv's block; ``sub_sample`` pools keys and values by 2 and then by ``maxpool_stride`` (quirk kept)."""

    def __init__(
        self,
        in_channels: int,
        reduction: int = 2,
        conv_cfg: dict | None = {"type": "Conv2d"},  # noqa: B006 (published defaults; never changed)
        norm_cfg: dict | None = {"type": "BN"},  # noqa: B006
        mode: str = "embedded_gaussian",
        sub_sample: bool = False,
        maxpool_stride: int = 2,
        zeros_init: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_channels,
            sub_sample,
            conv_cfg,
            reduction,
            norm_cfg=norm_cfg,
            mode=mode,
            zeros_init=zeros_init,
            **kwargs,
        )
        if sub_sample:
            self._pool(maxpool_stride)


class FBKDStudentConnector(StudentAttention):
    """The student's share of FBKD.

    Args:
        in_channels: C of student and teacher.
        reduction, conv_cfg, norm_cfg, mode, sub_sample, maxpool_stride, zeros_init: of the non-local block; see
            :class:`kdfast.compat.mmcv.NonLocal2d`. ``maxpool_stride`` counts with ``sub_sample`` only, and then pools
            by twice its value (quirk kept).
        spatial_T, channel_T: temperatures of the masks.
        init_cfg: kept for mmengine, not applied here.
        kwargs: further arguments of the non-local block (``use_scale``, ``std``).

    Shape: x [B, C, H, W]. Returns spatial mask [B, 1, H, W], channel mask [B, C, 1, 1], adapted channel attention
    [B, C], adapted spatial attention [B, 1, H, W], adapted relation [B, C, H, W], adapted map [B, C, H, W].
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int = 2,
        conv_cfg: dict | None = {"type": "Conv2d"},  # noqa: B006
        norm_cfg: dict | None = {"type": "BN"},  # noqa: B006
        mode: str = "dot_product",
        sub_sample: bool = False,
        maxpool_stride: int = 2,
        zeros_init: bool = True,
        spatial_T: float = 0.5,
        channel_T: float = 0.5,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, spatial_T, channel_T)
        self.init_cfg = init_cfg
        self.student_non_local = NonLocal2dMaxpoolNstride(
            in_channels, reduction, conv_cfg, norm_cfg, mode, sub_sample, maxpool_stride, zeros_init, **kwargs
        )
        self.non_local_adaptation = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.forward_train(x)

    def forward_train(self, x: Tensor) -> tuple[Tensor, ...]:
        *attention, adapted = self.adapted(x)
        return *attention, self.non_local_adaptation(self.student_non_local(x)), adapted


class FBKDTeacherConnector(TeacherAttention):
    """The teacher's share of FBKD; its non-local block is trained.

    Args: as :class:`FBKDStudentConnector`.

    Shape: x [B, C, H, W]. Returns spatial mask [B, 1, H, W], channel mask [B, C, 1, 1], spatial attention
    [B, 1, H, W], relation [B, C, H, W] and x.
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int = 2,
        conv_cfg: dict | None = {"type": "Conv2d"},  # noqa: B006
        norm_cfg: dict | None = {"type": "BN"},  # noqa: B006
        mode: str = "dot_product",
        sub_sample: bool = False,
        maxpool_stride: int = 2,
        zeros_init: bool = True,
        spatial_T: float = 0.5,
        channel_T: float = 0.5,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, spatial_T, channel_T)
        self.init_cfg = init_cfg
        self.teacher_non_local = NonLocal2dMaxpoolNstride(
            in_channels, reduction, conv_cfg, norm_cfg, mode, sub_sample, maxpool_stride, zeros_init, **kwargs
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.forward_train(x)

    def forward_train(self, x: Tensor) -> tuple[Tensor, ...]:
        spatial_mask, channel_mask, spatial, _ = self.attention(x)
        return spatial_mask, channel_mask, spatial, self.teacher_non_local(x), x
