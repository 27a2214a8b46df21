"""Two-operation sub-policies of SoKD at CIFAR, ImageNet and FPN feature sizes.

Naive: one operation after the other, as published: affine_grid and grid_sample, randn_like, masks, index_select. For noise
it is the better baseline: the reference (eager, compile) computes the counter-based numbers word by word.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.ops.feature_augment import feature_augment
from kdfast.reference.feature_augment import plan

from ..case import Baseline, Case

SIZES = {
    "CIFAR, last stage of resnet32x4, batch 64": (64, 256, 8, 8),
    "CIFAR, first stage of resnet32x4, batch 64": (64, 64, 32, 32),
    "ImageNet, first stage of ResNet-50, batch 16": (16, 256, 56, 56),
    "FPN level P3 of 800 x 1344 images, batch 2": (2, 256, 100, 168),
}
CHAINS = (
    (("rotate", 20.0), ("shear_x", 0.2)),
    (("translate_y", 0.2), ("noise", 0.05)),
    (("cutout", 0.2), ("channel_drop", 0.3)),
    (("noise", 0.05), ("channel_shuffle", 0.0)),
)
OPERATIONS = {"noise": 12, "cutout": 0, "channel_drop": 0, "channel_shuffle": 0}  # per element, forward


def _published(x: Tensor, name: str, value: float) -> Tensor:
    n, c, h, w = x.shape
    if name == "noise":
        return x + value * torch.randn_like(x)
    if name == "channel_shuffle":
        return x[:, torch.randperm(c, device=x.device)]
    if name == "channel_drop":
        return x * (torch.rand(c, 1, 1, device=x.device) >= value)
    if name == "cutout":
        top, left = (int(0.4 * size) for size in (h, w))
        mask = torch.ones(h, w, device=x.device)
        mask[top : top + round(value * h), left : left + round(value * w)] = 0
        return x * mask
    cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
    theta = {
        "rotate": [[cos, -sin, 0], [sin, cos, 0]],
        "shear_x": [[1, -value, 0], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, -2 * value]],
    }[name]
    grid = F.affine_grid(torch.tensor(theta, device=x.device).expand(n, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _case(source: str, shape: tuple[int, ...], chain: tuple[tuple[str, float], ...]) -> Case:
    steps = plan(shape, [(name, value, 7 + i) for i, (name, value) in enumerate(chain)])
    elements = math.prod(shape)

    def make(device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, upstream = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
        return [x.relu(), upstream]

    def loss(x: Tensor, upstream: Tensor) -> Tensor:
        return feature_augment(x, steps)

    def published(x: Tensor, upstream: Tensor) -> Tensor:
        for name, value in chain:
            x = _published(x, name, value)
        return x

    # Other random numbers, and a grid of its own for every operation: what it computes is right, not the same.
    return Case(
        family="feature_augment",
        name=f"{' + '.join(name for name, _ in chain)} [{', '.join(map(str, shape))}]",
        source=source,
        loss=loss,
        make=make,
        bytes=4 * 4 * elements,  # a map read and one written, forward and backward
        flops=elements * (4 + sum(OPERATIONS.get(name, 8) for name, _ in chain)),
        baselines={
            "naive": Baseline(published, tolerance=math.inf, memory=4 * 6 * elements),
            "naive compiled": Baseline(
                torch.compile(published, fullgraph=True, dynamic=False),
                tolerance=math.inf,
                memory=4 * 6 * elements,
            ),
        },
        memory=16 * 4 * elements,
    )


def cases() -> list[Case]:
    return [_case(source, shape, chain) for source, shape in SIZES.items() for chain in CHAINS]
