"""dino-loss of KD++: CIFAR, ImageNet and detection heads. Naive: one Python iteration per sample, as published."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.losses.direction import direction_norm_loss

from ..case import Baseline, Case


def per_sample(student: Tensor, teacher: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    """The published loop: labels and norms are read back, and every mean is built from a list of Python floats."""
    lists = _lists(means)
    loss = student.new_zeros(())
    for s, t, label in zip(student, teacher, labels, strict=True):
        center = torch.tensor(lists[label.item()], device=s.device, dtype=s.dtype)
        longest = max(s.norm(p=2), t.norm(p=2))
        loss = loss + 1 - torch.dot(s, center / center.norm(p=2)) / longest
    return loss / len(student)


_parsed: dict[int, tuple[Tensor, list[list[float]]]] = {}


def _lists(means: Tensor) -> list[list[float]]:
    """The class means as the published code holds them: JSON parsed before training, not timed."""
    if id(means) not in _parsed:
        _parsed.clear()
        _parsed[id(means)] = (means, means.tolist())
    return _parsed[id(means)][1]


def _case(rows: int, columns: int, classes: int, source: str, reduction: str = "mean") -> Case:
    def make(device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        labels = torch.randint(classes, (rows,), device=device, generator=generator)
        means = torch.randn(classes, columns, device=device, generator=generator)
        noise = [torch.randn(rows, columns, device=device, generator=generator) for _ in range(2)]
        # Embeddings around their class mean, the student's of lengths below and above the teacher's.
        length = 0.6 + 0.8 * torch.rand(rows, 1, device=device, generator=generator)
        return [length * (means[labels] + noise[0]), means[labels] + noise[1], means, labels]

    def loss(student: Tensor, teacher: Tensor, means: Tensor, labels: Tensor) -> Tensor:
        return direction_norm_loss(student, teacher, means, labels, reduction=reduction)

    balanced = reduction == "class_balanced"
    return Case(
        family="direction",
        name=f"dino{' class-balanced' if balanced else ''} [{rows}, {columns}], {classes} classes",
        source=source,
        loss=loss,
        make=make,
        # Student, teacher and means once, the student's gradient written: forward and backward are one pass.
        bytes=4 * (3 * rows + classes) * columns,
        flops=(8 + 3) * rows * columns,
        baselines={} if balanced else {"naive": Baseline(per_sample)},
        memory=4 * 8 * rows * columns,
    )


def cases() -> list[Case]:
    return [
        _case(128, 64, 100, "CIFAR-100, batch 128: resnet20"),
        _case(512, 256, 100, "CIFAR-100 width 256, batch 512"),
        _case(1024, 1024, 81, "Faster R-CNN box head, 2 images of 512 proposals, background class (KD++)"),
        _case(4096, 1024, 1000, "ImageNet, 1024-d embedding, large batch"),
        _case(1024, 1024, 81, "Faster R-CNN box head, Eq. 7", "class_balanced"),
    ]
