"""Attention-guided distillation on FPN levels: strides 4 to 64 of 800 x 1344 images, 256 channels.

The baseline computes one level the way published code does (community copies of Zhang & Ma 2023): pooling, masks,
masked distance and attention distances, each as tensors of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdfast import AttentionGuidedLoss
from kdfast.losses.attention import PRESETS

from ..case import Baseline, Case, pair

SOURCE = "FPN stride {} of 800 x 1344, 256 channels, batch {} (Zhang & Ma 2023, Sec. IV-A)"
LARGEST_ATTENTION = (
    1.5  # of these inputs; compiled sums of 256 channels are off by 8 eps, in exp(G / T) by G / T as much
)
SIZES = {4: (200, 336), 8: (100, 168), 16: (50, 84), 32: (25, 42), 64: (13, 21)}


def published(student: Tensor, teacher: Tensor, preset: str, layer: nn.Module | None = None) -> Tensor:
    """One level; ``layer``: the adaptation layers of AttentionGuidedLoss, or none."""
    settings = PRESETS[preset]
    b, c, h, w = student.shape
    spatial, channel = [], []
    for x in (student, teacher):
        g = x.abs().mean(1, keepdim=True).view(b, -1)
        spatial.append((torch.softmax(g / settings["temperature"], dim=1) * h * w).view(b, 1, h, w))
        g = x.abs().mean((2, 3)).view(b, -1)
        channel.append((torch.softmax(g / settings["temperature"], dim=1) * c).view(b, c, 1, 1))
    adapted = student if layer is None else layer.feature(student)
    error = (adapted - teacher) ** 2 * (sum(spatial) / 2).detach()
    if settings.get("channel_mask", True):
        error = error * (sum(channel) / 2).detach()
    own, others = (
        [v.mean(1, keepdim=True), v.mean((2, 3))]
        for v in (
            (student, teacher) if settings.get("pooling") == "signed" else (student.abs(), teacher.abs())
        )
    )
    if layer is not None:
        own = [layer.spatial(own[0]), layer.channel(own[1])]
    transfer = sum(torch.dist(a, b) for a, b in zip(own, others, strict=True))
    return settings["transfer_weight"] * transfer + settings["masked_weight"] * error.sum() ** 0.5


def _case(preset: str, batch: int, stride: int, dtype: torch.dtype, channels_last: bool = False) -> Case:
    shape = (batch, 256, *SIZES[stride])
    elements, settings = math.prod(shape), PRESETS[preset]
    return Case(
        family="attention",
        name=f"{preset} [{', '.join(map(str, shape))}]",
        source=SOURCE.format(stride, batch),
        loss=AttentionGuidedLoss.preset(preset),
        make=pair(
            shape,
            shape,
            dtype=dtype,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
            relu=False,
        ),
        # Both maps once for their pooled attention and the sums that the masked error is made of, both again and the
        # gradient written. (By the formula taken step by step, the error reads both maps once more.)
        bytes=5 * elements * dtype.itemsize,
        flops=25 * elements,
        dtype=dtype,
        layout="channels_last" if channels_last else "contiguous",
        op="attention_mask",
        baselines={"naive": Baseline(lambda s, t: published(s, t, preset), memory=8 * 4 * elements)},
        memory=10 * 4 * elements,
        # At T = 0.5 the gate holds without it.
        conditioning=LARGEST_ATTENTION / settings["temperature"] if settings["temperature"] < 0.5 else 1.0,
    )


def cases() -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    found = [_case("two_stage", batch, stride, f32) for batch in (2, 4, 8) for stride in SIZES]
    found += [_case("one_stage", 2, stride, f32) for stride in SIZES]
    found += [_case("two_stage", 2, stride, f32, channels_last=True) for stride in SIZES]
    found += [_case("two_stage", 2, stride, bf16) for stride in SIZES]
    found += [_case(preset, 2, 16, f32) for preset in PRESETS if preset.startswith("paper")]
    found += [_case("one_stage", 2, 16, f32, channels_last=True)]
    found += [
        _case("two_stage", batch, stride, f32, channels_last=True) for batch in (4, 8) for stride in SIZES
    ]
    found += [_case("two_stage", 8, 16, bf16, channels_last=True)]
    return found
