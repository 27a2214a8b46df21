"""The other losses on maps against their formulas as a loop: PatchLoss, GramMMDLoss on patches, MimicLoss."""

from __future__ import annotations

import pytest
import torch
from pcka_checks import check, maps, naive_patches
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize

import kdfast
from kdfast.reference.patch_gram import AVERAGES


def naive_patch_loss(base: str, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    xs, ys = (naive_patches(v, (16, 16), "channel") for v in (student, teacher))
    if base == "at":
        a, b = (normalize(torch.stack(v).sum(0), dim=1) for v in (xs, ys))
        return (a - b).pow(2).mean() / len(xs)

    def one(x: Tensor, y: Tensor) -> Tensor:
        if base == "kd":
            p, q = log_softmax(x / tau, 1), log_softmax(y / tau, 1)
            return kl_div(p, q, reduction="batchmean", log_target=True) * tau**2
        if base == "mmd":
            k, m = (normalize(v @ v.T, dim=1) for v in (x, y))
            return ((k - m) ** 2).mean() - 0.5 * (k**2 + m**2).mean() + 1 / x.shape[0]
        p, q = (x / tau).softmax(1), (y / tau).softmax(1)

        def pearson(a: Tensor, b: Tensor) -> Tensor:
            a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
            return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

        return tau**2 * (1 - pearson(p, q)) + tau**2 * (1 - pearson(p.T, q.T))

    return torch.stack([one(x, y) for x, y in zip(xs, ys, strict=True)]).mean()


@pytest.mark.parametrize("base", ["kd", "at", "dist", "mmd"])
def test_patch_losses_equal_the_loop(base: str) -> None:
    tau = 1.0 if base == "dist" else 4.0
    inputs = maps((2, 3, 40, 52), (2, 3, 40, 52))
    check(
        kdfast.PatchLoss(base, temperature=tau),
        lambda s, t: naive_patch_loss(base, s, t, tau),
        inputs,
        "auto",
        1e-4,
    )
    same = kdfast.PatchLoss(base)(inputs[0], inputs[0])
    # The published Pearson correlation has 1e-8 in its denominator, against probabilities near 1 / D.
    assert 0 <= float(same) < (0.2 if base == "dist" else 1e-5)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", ["gram", "upper", "author"])
def test_gram_mmd_on_patches(kind: str, average: str) -> None:
    def naive(s: Tensor, t: Tensor) -> Tensor:
        terms = []
        for x, y in zip(*(naive_patches(v, (8, 8), average) for v in (s, t)), strict=True):
            k, m, n = x @ x.T, y @ y.T, x.shape[0]
            if kind == "author":
                terms.append((normalize(k, dim=1) - normalize(m, dim=1)).square().mean())
            else:
                d = k / k.norm() - m / m.norm()
                terms.append(n**2 / 2 * d.mean() ** 2 if kind == "gram" else d.square().sum() / 2)
        return torch.stack(terms).mean()

    loss = kdfast.GramMMDLoss(kind=kind, patch_size=8, average=average)
    check(loss, naive, maps((2, 3, 21, 30), (2, 3, 21, 30)), "auto", 1e-4)


def test_mimic() -> None:
    student = [torch.randn(2, 4, 8, 9), torch.randn(2, 6, 4, 5)]
    teacher = [torch.randn(2, 7, 8, 9), torch.randn(2, 7, 4, 5)]
    loss = kdfast.MimicLoss([4, 6], [7, 7], weight=2.0)
    want = sum(((a(s) - t) ** 2).mean() for a, s, t in zip(loss.adapters, student, teacher, strict=True))
    torch.testing.assert_close(loss(student, teacher), 2 * want)
    shared = kdfast.MimicLoss(4, 7)
    assert len(list(shared.parameters())) == 2
    shared(student[0], teacher[0]).backward()
    assert shared.adapters[0].weight.grad.any()
    with pytest.raises(ValueError, match="one per adapter"):
        loss(student[:1], teacher[:1])
    with pytest.raises(ValueError, match="4 and 7 channels"):
        shared(student[1], teacher[1])
