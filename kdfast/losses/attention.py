"""Attention-guided distillation: masks, attention transfer and masked feature distance (Zhang & Ma, TPAMI 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.attention_mask import attention_mask, attention_pool, masked_distance
from ..reference.attention_mask import mask
from ._common import Levels, Loss, check_choice, check_fits, check_pair, describe, levels, total
from ._pointwise import in_its_type, pointwise_layer

Mask = Literal["mean_of_softmax", "softmax_of_sum"]
Pooling = Literal["abs", "signed"]
Channels = int | tuple[int, int]

# Settings of the paper's experiments (Sec. IV-A) and of its published code, which swap the two weights and the two
# temperatures. The code weights no channels in two-stage detectors.
PRESETS: dict[str, dict[str, Any]] = {
    "two_stage": {
        "temperature": 0.5, "transfer_weight": 4e-3, "masked_weight": 7e-5, "channel_mask": False, "pooling": "signed",
    },
    "one_stage": {
        "temperature": 0.1, "transfer_weight": 2.4e-2, "masked_weight": 4.2e-4, "pooling": "signed",
    },
    "paper_two_stage": {"temperature": 0.1, "transfer_weight": 7e-5, "masked_weight": 4e-3},
    "paper_one_stage": {"temperature": 0.5, "transfer_weight": 4e-4, "masked_weight": 2e-2},
}  # fmt: skip


def attention_masks(
    student: Tensor, teacher: Tensor, *, temperature: float, mode: Mask = "mean_of_softmax"
) -> tuple[Tensor, Tensor]:
    """Where student and teacher attend: spatial and channel mask of every image (Eqs. 1 and 2).

    With the attention maps G^s = mean of |A| over channels and G^c = mean of |A| over pixels of a feature map A, the
    spatial mask is H W softmax(G^s / T) over the pixels of an image, averaged over student and teacher, and the channel
    mask C softmax(G^c / T) over its channels.

    Args:
        student, teacher: feature maps [B, C, H, W] of one shape.
        temperature: T; the smaller, the more uneven the masks.
        mode: ``"mean_of_softmax"`` averages the two softmaxes (published code, and the paper's Sec. III-A);
            ``"softmax_of_sum"`` is Eq. 2 as printed, the softmax of both maps' sum.

    Returns:
        spatial [B, 1, H, W], whose sum over an image is H W, and channel [B, C, 1, 1], whose sum is C; float32 (float64
        for float64 maps), differentiable in both inputs.

    Raises:
        ValueError, TypeError: maps that are not float tensors of one shape on one device; T not above 0.
    """
    _check_settings(temperature, "mode", mode)
    check_map_pair(student, teacher, one_width=True)
    pooled = [attention_pool(v) for v in (student, teacher)]
    dtype = torch.promote_types(*(p[0].dtype for p in pooled))
    spatial, channel = (
        mask(*(p[i][0].to(dtype) for p in pooled), temperature, mode == "softmax_of_sum") for i in (0, 1)
    )
    return spatial, channel[:, :, None, None]


def attention_parts(
    x: Tensor, spatial_temperature: float, channel_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One map's share of published code: its own masks, and means of A, in one read.

    Returns: spatial mask [B, 1, H, W], channel mask [B, C, 1, 1], means over channels [B, 1, H, W] and pixels [B, C].
    """
    spatial, channel = attention_pool(x, signed=True)
    spatial_mask = mask(spatial[0], spatial[0], spatial_temperature, False)
    channel_mask = mask(channel[0], channel[0], channel_temperature, False)
    return spatial_mask, channel_mask[:, :, None, None], spatial[1], channel[1]


def masked_feature_distance(student: Tensor, teacher: Tensor, spatial_mask: Tensor) -> Tensor:
    """(sum of M^s (A_S - A_T)²)^½ of maps [B, C, H, W] under a mask [B, 1, H, W], which is a constant."""
    check_map_pair(student, teacher, one_width=True)
    ones = torch.ones(student.shape[:2], dtype=torch.float32, device=student.device)
    return masked_distance(student, teacher, spatial_mask, ones)


class AttentionGuidedLoss(Loss):
    """L_AT + L_AM: attention transfer and attention-masked feature distance (Eqs. 1 to 4).

    L_AT = |G^s_S - G^s_T| + |G^c_S - G^c_T| on the attention maps, L_AM = (sum of M^s M^c (A_S - A_T)²)^½ under the
    masks of :func:`attention_masks`. All norms run over the whole batch and are not squared, so they grow with the
    batch and the map; where one is 0 its gradient is 0. Levels are summed.

    Args:
        channels: of the maps, for the adaptation layers: an int, or (student, teacher), for one level; a list of such,
            one per level, for several. Two ints in a tuple are (student, teacher). None: no adaptation layers are made.
        temperature: T of the masks.
        transfer_weight, masked_weight: factors on L_AT and L_AM.
        mask: how the masks of student and teacher are joined; see :func:`attention_masks`.
        channel_mask: weight channels as well as pixels in L_AM (published two-stage code does not).
        pooling: what L_AT compares, means of |A| (``"abs"``, the paper) or of A (``"signed"``, all published code).
        adapt: where ``channels`` are given, adapt the student before it is compared, with layers that are trained with
            it (Sec. IV-G): a 1x1 convolution of the map for L_AM, a 3x3 convolution of G^s and a linear layer on G^c
            for L_AT. The masks see the student's own map. Student and teacher of different widths need them; the
            student's masks are then those of the adapted map.
        detach_mask: no gradient flows through the masks (published code; the paper does not say).
        weight: factor on the value.

    Shape: student [B, C, H, W], teacher [B, C', H, W], or sequences of such levels. Differentiable in both, and in the
    adaptation layers. Kept for the backward beside the maps: two maps of one channel per level (without adaptation
    layers, masks detached); on the CPU, where the student alone learns, its gradient instead.

    Raises:
        ValueError, TypeError: maps of different sizes; different widths without adaptation layers; levels or widths
            that are not those of ``channels``.

    Source: Zhang & Ma, Structured Knowledge Distillation for Accurate and Efficient Object Detection, TPAMI 2023. Its
    settings: :meth:`preset`.
    """

    def __init__(
        self,
        channels: Channels | Sequence[Channels] | None = None,
        *,
        temperature: float = 0.5,
        transfer_weight: float = 1.0,
        masked_weight: float = 1.0,
        mask: Mask = "mean_of_softmax",
        channel_mask: bool = True,
        pooling: Pooling = "abs",
        adapt: bool = True,
        detach_mask: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        _check_settings(temperature, "mask", mask)
        check_choice("pooling", pooling, ("abs", "signed"))
        self.temperature = temperature
        self.transfer_weight, self.masked_weight = transfer_weight, masked_weight
        self.mask, self.channel_mask, self.pooling, self.detach_mask = (
            mask,
            channel_mask,
            pooling,
            detach_mask,
        )
        widths = channel_pairs(channels) if channels is not None and adapt else []
        self.adaptation = nn.ModuleList(_Adaptation(s, t) for s, t in widths)

    @classmethod
    def preset(
        cls,
        name: Literal["two_stage", "one_stage", "paper_two_stage", "paper_one_stage"],
        channels: Channels | Sequence[Channels] | None = None,
        **changes: Any,
    ) -> AttentionGuidedLoss:
        """Settings of the published code (``"two_stage"``, ``"one_stage"``) or of the paper's text (``"paper_..."``).

        ``changes`` override single arguments.
        """
        check_choice("name", name, tuple(PRESETS))
        return cls(channels, **(PRESETS[name] | changes))

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        loss = total([found[0] for found in self._levels(student, teacher, False)]).float()
        return loss if self.weight == 1 else self.weight * loss

    def terms(self, student: Levels, teacher: Levels) -> tuple[Tensor, Tensor, Tensor]:
        """transfer_weight * L_AT + masked_weight * L_AM, and both terms of this sum by themselves, detached."""
        found = self._levels(student, teacher, True)
        transfer = total([self.transfer_weight * (d[0] + d[1]) for _, d in found])
        return (
            total([loss for loss, _ in found]),
            transfer,
            total([self.masked_weight * d[2] for _, d in found]),
        )

    def _levels(self, student: Levels, teacher: Levels, distances: bool) -> list[tuple]:
        """Of every level the loss, and distances of spatial and channel attention and of the masked maps, detached."""
        pairs, layers = levels(student, teacher), self.adaptation
        if not len(layers):
            return [self._plain(s, t, distances) for s, t in pairs]
        if len(layers) != len(pairs):
            raise ValueError(
                f"channels: adaptation layers were made for {len(layers)} levels, got {len(pairs)}; give "
                f"channels as a list with one entry per level"
            )
        return [self._adapted(s, t, layer) for (s, t), layer in zip(pairs, layers, strict=True)]

    def _settings(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "masked_weight": self.masked_weight,
            "softmax_of_sum": self.mask == "softmax_of_sum",
            "channel_mask": self.channel_mask,
            "detach_mask": self.detach_mask,
            "signed": self.pooling == "signed",
        }

    def _plain(self, student: Tensor, teacher: Tensor, distances: bool) -> tuple:
        check_map_pair(student, teacher, one_width=True)
        return attention_mask(
            student,
            teacher,
            transfer_weight=self.transfer_weight,
            pooled=False,
            distances=distances,
            **self._settings(),
        )

    def _adapted(self, student: Tensor, teacher: Tensor, layer: _Adaptation) -> tuple:
        check_map_pair(student, teacher, one_width=False)
        layer.check(student, teacher)
        adapted, settings = pointwise_layer(layer.feature, student), self._settings()
        if student.shape == teacher.shape:
            masked, distances, spatial, channel = attention_mask(
                student, teacher, adapted, transfer_weight=0.0, **settings
            )
        else:
            masked, distances = attention_mask(
                adapted, teacher, transfer_weight=0.0, pooled=False, **settings
            )
            pooled = [attention_pool(v, signed=settings["signed"]) for v in (student, teacher)]
            spatial, channel = ([p[i][-1] for p in pooled] for i in (0, 1))
        transfers = [
            torch.dist(in_its_type(layer.spatial, spatial[0]), spatial[1]),
            torch.dist(in_its_type(layer.channel, channel[0]), channel[1]),
        ]
        loss = masked + self.transfer_weight * (transfers[0] + transfers[1])
        return loss, [*(v.detach() for v in transfers), distances[2]]


class _Adaptation(nn.Module):
    """Adaptation layers of one level (Sec. IV-G)."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.feature = nn.Conv2d(student, teacher, 1)
        self.spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.channel = nn.Linear(student, teacher)

    def check(self, student: Tensor, teacher: Tensor) -> None:
        check_fits("student", student, self.feature.weight)
        made = self.channel.in_features, self.channel.out_features
        if made != (student.shape[1], teacher.shape[1]):
            raise ValueError(
                f"channels: adaptation layers were made for student {made[0]} and teacher {made[1]} channels, got "
                f"student {describe(student)}, teacher {describe(teacher)}"
            )


def channel_pairs(channels: Channels | Sequence[Channels]) -> list[tuple[int, int]]:
    """(student, teacher) channels of every level."""
    pair = isinstance(channels, tuple) and len(channels) == 2 and all(isinstance(c, int) for c in channels)
    entries = list(channels) if isinstance(channels, (list, tuple)) and not pair else [channels]
    widths = [(c, c) if isinstance(c, int) else c for c in entries]
    for width in widths:
        valid = isinstance(width, (list, tuple)) and len(width) == 2
        if not valid or not all(isinstance(c, int) and c > 0 for c in width):
            raise ValueError(
                f"channels: need an int, (student, teacher), or a list of such, one per level; got {channels!r}"
            )
    return widths


def _check_settings(temperature: float, name: str, mode: str) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature: need a number above 0, got {temperature!r}")
    check_choice(name, mode, ("mean_of_softmax", "softmax_of_sum"))


def check_map_pair(student: Tensor, teacher: Tensor, one_width: bool) -> None:
    check_pair(student, teacher)
    one, other = student.shape, teacher.shape
    if len(one) != 4 or len(other) != 4 or one[2:] != other[2:]:
        problem = "need maps [B, C, H, W] of one size H x W"
    elif 0 in one[1:] or 0 in other[1:]:
        problem = "need at least one channel and one pixel"
    elif one_width and one[1] != other[1]:
        problem = "need equally many channels unless channels= gives adaptation layers"
    else:
        return
    raise ValueError(
        f"student and teacher {problem}, got student {describe(student)}, teacher {describe(teacher)}"
    )
