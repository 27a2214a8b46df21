"""The ++ compositions: published rows, warm-up, and the sum of Eq. 8."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdfast.losses.direction import direction_norm_loss
from kdfast.recipes import RECIPES, PlusPlusLoss, Recipe, plus_plus


def test_published_rows():
    assert len(RECIPES) == 4 * 6 + 3 * 5 + 2 * 2 + 2 * 3
    row = RECIPES["dkd++", "cifar100", "resnet50-mobilenetv2"]
    assert (row.kd, row.alpha, row.beta, row.nd, row.temperature, row.warmup) == (None, 0.5, 8, 1.0, 4.0, 20)
    row = RECIPES["kd++", "imagenet", "resnet101-resnet18"]
    assert (row.kd, row.nd, row.temperature, row.warmup, row.warm_nd) == (3.5, 4.0, 1.0, 5, True)
    row = RECIPES["kd++", "imagenet", "vit_base-resnet18"]
    assert (row.kd, row.nd, row.warm_nd) == (2.0, 1.0, False)
    row = RECIPES["reviewkd++", "coco", "resnet101-resnet50"]
    assert (row.kd, row.nd, row.temperature, row.warmup) == (1.4, 1.0, 1.0, 0)


@pytest.mark.parametrize("warm_nd", [False, True])
@pytest.mark.parametrize("epoch", [0, 5, 20, 100])
def test_composition(epoch, warm_nd):
    logits, teacher_logits = torch.randn(6, 4), torch.randn(6, 4)
    student, teacher, means = torch.randn(6, 5), torch.randn(6, 5), torch.randn(4, 5)
    labels = torch.randint(0, 4, (6,))
    recipe = Recipe(kd=3.0, nd=2.0, temperature=4.0, warmup=20, warm_nd=warm_nd)
    got = PlusPlusLoss(F.mse_loss, means, recipe)(
        logits, student, teacher, labels, (logits, teacher_logits), epoch
    )
    warm = min(1, epoch / 20)
    want = F.cross_entropy(logits, labels) + 3 * warm * F.mse_loss(logits, teacher_logits)
    want += (warm if warm_nd else 1) * 2 * direction_norm_loss(student, teacher, means, labels)
    torch.testing.assert_close(got, want)


def test_no_cross_entropy_where_it_has_no_weight(monkeypatch):
    embeddings, means = torch.randn(6, 5), torch.randn(4, 5)
    labels, logits = torch.randint(0, 4, (6,)), torch.randn(6, 4)
    settings = (F.mse_loss, means, Recipe(kd=3.0, nd=2.0, temperature=4.0, warmup=0))
    inputs = (logits, embeddings, embeddings.flip(0), labels, (logits, logits.flip(0)), 0)
    both, half = (PlusPlusLoss(*settings, ce_weight=w)(*inputs) for w in (1.0, 0.5))
    monkeypatch.setattr(F, "cross_entropy", None)
    torch.testing.assert_close(PlusPlusLoss(*settings, ce_weight=0.0)(*inputs), 2 * half - both)


def test_unknown_rows_and_missing_base():
    means = torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"kd\+\+"):
        plus_plus("at++", means)
    with pytest.raises(ValueError, match="resnet34-resnet18"):
        plus_plus("kd++", means, dataset="imagenet")
    with pytest.raises(ValueError, match="base"):
        plus_plus("reviewkd++", means)
    assert plus_plus("reviewkd++", means, base=F.mse_loss).recipe.kd == 1.2
