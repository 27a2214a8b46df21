"""KL, DKD, NKD and DIST on logits: sizes of the papers that use them, and of language models' vocabularies.

The baselines are written from the formulas as published code evaluates them: softmaxes and their logarithms as
tensors, the target hidden by one-hot masks, cosine similarities of centred probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.losses.logits import DISTLoss, DKDLoss, KDLoss, NKDLoss

from ..case import Baseline, Case

CIFAR = "CIFAR-100, batch {} (Zhao et al. 2022; Wang et al. 2023)"
IMAGENET = "ImageNet, batch 256"
RCNN = "box head of Faster R-CNN, 2 images of 512 proposals, 81 classes (Wang et al. 2023)"
LANGUAGE = "language model, {} tokens"
TEMPERATURE = 4.0
HIDDEN = 1000.0  # subtracted from the target's logit in published DKD


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, q = F.log_softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_p, q, reduction="none").sum(1).mean() * TEMPERATURE**2


def _target_mask(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter_(1, labels[:, None], 1).bool()


def dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    target = _target_mask(student, labels)
    p, q = F.softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    binary_p, binary_q = (
        torch.cat([(v * target).sum(1, keepdim=True), (v * ~target).sum(1, keepdim=True)], 1) for v in (p, q)
    )
    tckd = F.kl_div(binary_p.log(), binary_q, reduction="sum")
    others_p = F.log_softmax(student / TEMPERATURE - HIDDEN * target, dim=1)
    others_q = F.softmax(teacher / TEMPERATURE - HIDDEN * target, dim=1)
    nckd = F.kl_div(others_p, others_q, reduction="sum")
    return (tckd + 8 * nckd) * TEMPERATURE**2 / labels.shape[0]


def nkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    n, classes = student.shape
    log_p, q = F.log_softmax(student, dim=1), F.softmax(teacher, dim=1)
    target = -(q.gather(1, labels[:, None]) * log_p.gather(1, labels[:, None])).mean()
    others = ~_target_mask(student, labels)
    s, t = student[others].reshape(n, classes - 1), teacher[others].reshape(n, classes - 1)
    return target - 1.5 * (F.softmax(t, dim=1) * F.log_softmax(s, dim=1)).sum(1).mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def dist(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.softmax(1), teacher.softmax(1)
    return 2 - _correlation(p, q).mean() - _correlation(p.T, q.T).mean()


def _case(
    name: str,
    loss: Callable[..., Tensor],
    naive: Callable[..., Tensor],
    source: str,
    shape: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    labels: bool = False,
    flops: int = 8,
) -> Case:
    rows, classes = shape

    def make(device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        student, noise = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
        made = [(2 * student).to(dtype), (2 * student + noise).to(dtype)]
        if labels:
            made.append(torch.randint(0, classes, (rows,), device=device, generator=generator))
        return made

    return Case(
        family="logits",
        name=f"{name} [{rows}, {classes}]",
        source=source,
        loss=loss,
        make=make,
        # Both sides are read once, the student's gradient is written: where a row's sums give its gradient, forward and
        # backward are one pass. DIST's gradient waits for sums over all rows.
        bytes=(5 if name == "dist" else 3) * rows * classes * dtype.itemsize,
        flops=flops * rows * classes,
        dtype=dtype,
        baselines={
            "naive": Baseline(naive, 0.1 if dtype != torch.float32 else 1e-2, memory=8 * rows * classes * 4)
        },
        memory=8 * rows * classes * 4,
    )


def cases() -> list[Case]:
    losses = {
        "kd": (KDLoss(TEMPERATURE), kd, False),
        "dkd": (DKDLoss(1.0, 8.0, TEMPERATURE), dkd, True),
        "nkd": (NKDLoss(1.5, 1.0), nkd, True),
        "dist": (DISTLoss(), dist, False),
    }
    sizes = {
        (64, 100): CIFAR.format(64),
        (128, 100): CIFAR.format(128),
        (256, 1000): IMAGENET,
        (1024, 81): RCNN,
    }
    found = [
        _case(name, loss, naive, source, shape, labels=labels)
        for shape, source in sizes.items()
        for name, (loss, naive, labels) in losses.items()
    ]
    loss, naive, _ = losses["kd"]
    found += [
        _case("kd", loss, naive, LANGUAGE.format(256), (256, 32000)),
        _case("kd", loss, naive, LANGUAGE.format(256), (256, 32000), dtype=torch.bfloat16),
        _case("kd", loss, naive, LANGUAGE.format(64), (64, 128256)),
        _case("kd", loss, naive, LANGUAGE.format(64), (64, 128256), dtype=torch.bfloat16),
        _case("kd", loss, naive, LANGUAGE.format(128), (128, 128000)),
        _case("kd", loss, naive, LANGUAGE.format(128), (128, 128000), dtype=torch.bfloat16),
    ]
    return found
