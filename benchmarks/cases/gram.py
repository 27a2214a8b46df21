"""CKA and RCKA, similarity preserving, MMD bound, pairwise affinity: sizes of the papers that use them.

The baselines are written from the formulas as published code evaluates them: the trace of K Lᵀ by a matrix
product, an explicit centring matrix, class Grams of D x D entries, all pixel pairs at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

import kdfast

from ..case import Baseline, Case, pair

CIFAR = "CIFAR-100, batch 128 (Zhou et al. 2024, Sec. 4)"
IMAGENET = "ImageNet, batch 256 (Zhou et al. 2024, Sec. 4)"


def trace_cka(student: Tensor, teacher: Tensor, centered: bool = True, row_norm: bool = False) -> Tensor:
    """1 - CKA by traces of N x N matrix products."""
    x, y = student.flatten(1), teacher.flatten(1)
    k, m = x @ x.T, y @ y.T  # [N, N]
    if row_norm:
        k, m = (g / g.diagonal().sqrt()[:, None] for g in (k, m))
    if centered:
        n = k.shape[0]
        h = torch.eye(n, device=k.device, dtype=k.dtype) - 1 / n
        k, m = h @ k @ h, h @ m @ h
    return 1 - torch.trace(k @ m.T) / torch.sqrt(torch.trace(k @ k.T) * torch.trace(m @ m.T))


def trace_logit_cka(
    student: Tensor, teacher: Tensor, centered: bool = True, row_norm: bool = False
) -> Tensor:
    """Intra + inter; the Grams of the classes are D x D."""
    intra = trace_cka(student, teacher, centered, row_norm)
    return intra + trace_cka(student.T, teacher.T, centered, row_norm)


def trace_rcka(s1, s2, s3, t1, t2, t3, student_logits, teacher_logits) -> Tensor:
    features = trace_cka(s1, t1) + trace_cka(s2, t2) + trace_cka(s3, t3)
    return features + 15 * trace_logit_cka(student_logits, teacher_logits)


def unbiased_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - debiased CKA from the unbiased HSIC estimator written out (Song et al. 2012, Eq. 5)."""
    x, y = student.flatten(1), teacher.flatten(1)
    n = x.shape[0]
    off = 1 - torch.eye(n, device=x.device, dtype=x.dtype)
    k, m = (x @ x.T) * off, (y @ y.T) * off

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        ab = a @ b
        return torch.trace(ab) + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * ab.sum()

    return 1 - hsic(k, m) / torch.sqrt(hsic(k, k) * hsic(m, m))


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    x, y = student.flatten(1), teacher.flatten(1)
    g, h = normalize(x @ x.T, dim=1), normalize(y @ y.T, dim=1)
    return (h - g).pow(2).sum() / x.shape[0] ** 2


def mmd_bound(student: Tensor, teacher: Tensor) -> Tensor:
    x, y = student.flatten(1), teacher.flatten(1)
    k, m = x @ x.T, y @ y.T
    return (k / k.norm() - m / m.norm()).mean().pow(2) * x.shape[0] ** 2 / 2


def all_pairs(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two [B, HW, HW] affinities."""
    affinities = [
        torch.einsum("bcm,bcn->bmn", f, f)
        for f in (normalize(v.flatten(2), dim=1) for v in (student, teacher))
    ]
    return (affinities[0] - affinities[1]).pow(2).mean()


def comparison_cost(n: int, dx: int, dy: int, itemsize: int, groups: int = 1) -> tuple[int, int]:
    """Bytes and operations of one comparison, forward and backward, on the cheaper side.

    Bytes: both sides once forward; the student once backward, and its gradient written. Operations on the
    Gram side: two symmetric N x N products, then one of [N, N] with [N, D]; on the feature side two
    symmetric D x D products and one D x D', then two of their products with the features.
    """
    gram_side = n * n * (dx + dy) + 2 * n * n * dx
    feature_side = n * (dx * dx + dy * dy + 2 * dx * dy) + 2 * n * (dx * dx + dx * dy)
    return groups * itemsize * n * (3 * dx + dy), groups * min(gram_side, feature_side)


def pair_cost(n: int, d: int, itemsize: int) -> tuple[int, int]:
    """Intra and inter together: two symmetric products and one cross product, then two products with X and Y.

    The backward reads both sides.
    """
    return itemsize * n * 5 * d, 8 * n * d * min(n, d)


def _comparison(
    name: str,
    loss: Callable[..., Tensor],
    naive: Callable[..., Tensor],
    source: str,
    student: Sequence[int],
    teacher: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    pixels: bool = False,
    tolerance: float = 1e-2,
) -> Case:
    teacher = student if teacher is None else teacher
    n, dx, dy = student[0], math.prod(student[1:]), math.prod(teacher[1:])
    groups = 1
    if pixels:
        groups, dx, dy, n = student[0], student[1], teacher[1], student[2] * student[3]
    nbytes, flops = comparison_cost(n, dx, dy, dtype.itemsize, groups)
    return Case(
        family="gram",
        name=f"{name} {_shape(student)}" + ("" if teacher == student else f" to {_shape(teacher)}"),
        source=source,
        loss=loss,
        make=pair(
            student,
            teacher,
            dtype=dtype,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        ),
        bytes=nbytes,
        flops=flops,
        dtype=dtype,
        layout="channels_last" if channels_last else "contiguous",
        baselines={"naive": Baseline(naive, tolerance, memory=6 * 4 * groups * n * n)},
        memory=4 * 6 * groups * n * (dx + dy),
    )


def _logits(
    name: str, loss: Callable[..., Tensor], source: str, n: int, d: int, **naive_arguments: bool
) -> Case:
    nbytes, flops = pair_cost(n, d, 4)
    return Case(
        family="gram",
        name=f"{name} [{n}, {d}]",
        source=source,
        loss=loss,
        make=pair((n, d), (n, d), relu=False),
        bytes=nbytes,
        flops=flops,
        baselines={
            "naive": Baseline(lambda s, t: trace_logit_cka(s, t, **naive_arguments), memory=6 * 4 * d * d)
        },
    )


def _rcka(source: str) -> Case:
    """The whole criterion of the paper on one network: three stages and the logits."""
    stages = [(128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8)]
    loss = kdfast.RCKALoss()

    def make(device: torch.device, seed: int) -> list[Tensor]:
        levels = [pair(stage, stage)(device, seed + i) for i, stage in enumerate(stages)]
        student, teacher = zip(*levels, strict=True)
        return [*student, *teacher, *pair((128, 100), (128, 100), relu=False)(device, seed + 3)]

    costs = [comparison_cost(s[0], math.prod(s[1:]), math.prod(s[1:]), 4) for s in stages]
    costs.append(pair_cost(128, 100, 4))
    return Case(
        family="gram",
        name="rcka 3 stages + logits, resnet8x4",
        source=source,
        loss=lambda s1, s2, s3, t1, t2, t3, zs, zt: loss([s1, s2, s3], [t1, t2, t3], zs, zt),
        make=make,
        bytes=sum(c[0] for c in costs),
        flops=sum(c[1] for c in costs),
        needs_grad=(True, True, True, False, False, False, True, False),
        baselines={"naive": Baseline(trace_rcka)},
    )


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def cases() -> list[Case]:
    cka, debiased = kdfast.CKALoss(), kdfast.CKALoss(debiased=True)
    logit = kdfast.LogitCKALoss()
    found = []
    for net, stages in {
        "resnet8x4": [(64, 32, 32), (128, 16, 16), (256, 8, 8)],
        "resnet20": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
        "wrn_16_2": [(32, 32, 32), (64, 16, 16), (128, 8, 8)],
    }.items():
        found += [_comparison(f"cka {net}", cka, trace_cka, CIFAR, (128, *stage)) for stage in stages]
    found += [
        _comparison("cka wrn_40_1", cka, trace_cka, CIFAR, (128, 64, 8, 8), (128, 128, 8, 8)),
        _comparison("cka", cka, trace_cka, "small batch, wide features", (64, 50000)),
        _comparison("cka resnet18", cka, trace_cka, f"{IMAGENET}: ResNet-34", (256, 512, 7, 7)),
        _comparison(
            "cka mobilenet", cka, trace_cka, f"{IMAGENET}: ResNet-50", (256, 1024, 7, 7), (256, 2048, 7, 7)
        ),
        _comparison(
            "cka resnet50", cka, trace_cka, f"{IMAGENET}: last stage of ResNet-50", (256, 2048, 7, 7)
        ),
        _comparison("cka", cka, trace_cka, CIFAR, (128, 65536), dtype=torch.bfloat16, tolerance=0.1),
        _comparison("cka", cka, trace_cka, CIFAR, (128, 64, 32, 32), channels_last=True),
        _comparison(
            "debiased cka", debiased, unbiased_cka, "Nguyen et al. 2021, mini-batch CKA", (128, 256, 8, 8)
        ),
        _comparison("cka analysis", cka, trace_cka, "representation analysis, feature side", (4096, 512)),
        _comparison(
            "cka analysis", cka, trace_cka, "representation analysis, feature side", (2048, 64), (2048, 256)
        ),
        _logits("logit cka", logit, CIFAR, 128, 100),
        _logits("logit cka", logit, "CIFAR-100, batch 1024", 1024, 100),
        _logits("logit cka", logit, IMAGENET, 256, 1000),
        _logits("logit cka", logit, "ImageNet, batch 1024", 1024, 1000),
        _logits(
            "logit cka, official",
            kdfast.LogitCKALoss(centered=False, row_norm="row"),
            f"{CIFAR}, as the authors' code: uncentred, rows normalised",
            128,
            100,
            centered=False,
            row_norm=True,
        ),
        _rcka(CIFAR),
        _comparison(
            "sp resnet8x4", kdfast.SimilarityPreservingLoss(), similarity_preserving, CIFAR, (128, 256, 8, 8)
        ),
        _comparison(
            "sp resnet20", kdfast.SimilarityPreservingLoss(), similarity_preserving, CIFAR, (128, 64, 8, 8)
        ),
        _comparison(
            "mmd resnet8x4", kdfast.GramMMDLoss(), mmd_bound, f"{CIFAR}, Theorem 2", (128, 256, 8, 8)
        ),
    ]
    source = "segmentation, 512 x 512 crops at stride 16 (Liu et al. 2019)"
    found += [
        _comparison("pairwise", kdfast.PairwiseAffinityLoss(), all_pairs, source, (8, c, 32, 32), pixels=True)
        for c in (64, 128, 256, 512)
    ]
    return found
