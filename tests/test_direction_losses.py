"""Direction and norm losses against the formulas (Wang et al., KD++), written out naively here; torch.compile; bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import backend
from kdfast.class_means import ClassMeans
from kdfast.losses.direction import (
    DirectionLoss,
    DirectionNormLoss,
    EmbeddingProjector,
    NormLoss,
    direction_norm_loss,
)

BACKENDS = [name for name in ("reference", "cpu") if backend.why_not(name) is None]


@pytest.fixture(params=BACKENDS)
def on_backend(request):
    with kdfast.use_backend(request.param):
        yield request.param


def batch(rows: int = 12, columns: int = 7, classes: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher, means = (
        torch.randn(rows, columns),
        torch.randn(rows, columns),
        torch.randn(classes, columns),
    )
    return student * 2, teacher * torch.rand(rows, 1) * 4, means, torch.randint(0, classes, (rows,))


def row_loss(s: Tensor, t: Tensor | None, c: Tensor) -> Tensor:
    """Eq. 6 of one sample as printed: both branches."""
    s_norm = s.pow(2).sum().sqrt()
    longest = s_norm if t is None or s_norm >= t.pow(2).sum().sqrt() else t.pow(2).sum().sqrt()
    return 1 - (s @ (c / c.pow(2).sum().sqrt())) / longest


def agrees(loss, formula, student: Tensor) -> None:
    student, exact = student.detach().requires_grad_(), student.detach().double().requires_grad_()
    got, want = loss(student), formula(exact)
    assert got.dtype == torch.float32 and got.shape == ()
    assert abs(got.item() - want.item()) <= 2e-6 * max(1, abs(want.item()))
    g, w = torch.autograd.grad(got, student)[0], torch.autograd.grad(want, exact)[0]
    assert float((g - w).abs().max()) <= 1e-5 * float(w.abs().max())


def test_direction_norm(on_backend):
    student, teacher, means, labels = batch()
    t, c = teacher.double(), means.double()

    def formula(s):
        return torch.stack([row_loss(s[i], t[i], c[labels[i]]) for i in range(len(s))]).mean()

    agrees(lambda s: DirectionNormLoss(means)(s, teacher, labels), formula, student)
    agrees(lambda s: direction_norm_loss(s, teacher, means, labels.int()), formula, student)
    agrees(lambda s: direction_norm_loss(s, teacher, None, means[labels]), formula, student)
    longer, shorter = student.norm(dim=1) >= teacher.norm(dim=1), student.norm(dim=1) < teacher.norm(dim=1)
    assert longer.any() and shorter.any(), "both branches take part"


def test_class_balanced(on_backend):
    student, teacher, means, labels = batch(rows=11)
    labels[:5] = 1
    labels[6] = -100
    t, c = teacher.double(), means.double()

    def formula(s):
        classes = []
        for k in set(labels.tolist()) - {-100}:
            classes.append(
                torch.stack([row_loss(s[i], t[i], c[k]) for i in range(len(s)) if labels[i] == k]).mean()
            )
        return torch.stack(classes).mean()

    agrees(
        lambda s: DirectionNormLoss(means, reduction="class_balanced")(s, teacher, labels), formula, student
    )


def test_class_balanced_is_the_mean_of_a_balanced_batch(on_backend):
    student, teacher, means, _ = batch(rows=12)
    labels = torch.arange(12) % 4
    mean, balanced = (
        direction_norm_loss(student, teacher, means, labels, reduction=r) for r in ("mean", "class_balanced")
    )
    torch.testing.assert_close(mean, balanced)


def test_cosine_and_infonce(on_backend):
    student, teacher, means, labels = batch()
    c = means.double()

    def cosine(s):
        return torch.stack([row_loss(s[i], None, c[labels[i]]) for i in range(len(s))]).mean()

    def infonce(s):
        terms = []
        for i in range(len(s)):
            scores = torch.stack([1 - row_loss(s[i], None, c[k]) for k in range(len(c))]) / 0.5
            terms.append(scores.exp().sum().log() - scores[labels[i]])
        return torch.stack(terms).mean()

    agrees(lambda s: DirectionLoss(means)(s, labels), cosine, student)
    agrees(lambda s: DirectionLoss(means)(s, teacher, labels), cosine, student)
    agrees(lambda s: DirectionLoss(means, kind="infonce", temperature=0.5)(s, labels), infonce, student)


@pytest.mark.parametrize("reduction", ["mean", "class_balanced"])
def test_infonce_leaves_out_unseen_classes_and_ignored_samples(reduction):
    student, _, means, labels = batch()
    means[2] = 0
    labels[3:6] = torch.tensor([2, -100, 2])
    kept, known = (labels != 2) & (labels != -100), [0, 1, 3]
    compact = torch.tensor([0, 1, -1, 2])[labels[kept]]
    loss = DirectionLoss(means, kind="infonce", reduction=reduction)
    student.requires_grad_()
    got = loss(student, labels)
    want = DirectionLoss(means[known], kind="infonce", reduction=reduction)(student[kept], compact)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, student)
    assert gradient.isfinite().all() and not gradient[~kept].any()
    nothing = loss(student, torch.full_like(labels, -100))
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, student)[0].any()


def test_norms():
    student, teacher, _, _ = batch()
    t = teacher.double()
    agrees(lambda s: NormLoss("l2")(s, teacher), lambda s: (s - t).pow(2).sum(1).mean(), student)
    previous = torch.rand(len(student))
    agrees(
        lambda s: NormLoss("sifn", 0.5)(s, previous_norms=previous),
        lambda s: (s.pow(2).sum(1).sqrt() - (previous.double() + 0.5)).pow(2).mean(),
        student,
    )
    student.requires_grad_()
    loss = NormLoss("sifn", 0.3)(
        student
    )  # the norms of this very step: (|f| - |f| - r)^2, gradient -2 r f/|f|
    assert abs(loss.item() - 0.09) < 1e-6
    (gradient,) = torch.autograd.grad(loss, student)
    expected = -0.6 * torch.nn.functional.normalize(student.detach(), dim=1) / len(student)
    torch.testing.assert_close(gradient, expected)
    zero = torch.zeros(2, 3, requires_grad=True)
    assert torch.autograd.grad(NormLoss("sifn")(zero), zero)[0].isfinite().all()


def test_weight_and_half_precision(on_backend):
    student, teacher, means, labels = batch()
    plain = DirectionNormLoss(means)(student, teacher, labels)
    torch.testing.assert_close(DirectionNormLoss(means, weight=3)(student, teacher, labels), 3 * plain)
    half = student.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = DirectionNormLoss(means)(half, teacher, labels)
    assert loss.dtype == torch.float32 and abs(float(loss.detach() - plain)) < 1e-2
    assert torch.autograd.grad(loss, half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("reduction", ["mean", "class_balanced"])
def test_compiles_without_a_break(on_backend, reduction):
    student, teacher, means, labels = batch()
    loss = DirectionNormLoss(means, reduction=reduction)
    student.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = [f(student, teacher, labels) for f in (loss, compiled)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*[torch.autograd.grad(v, student)[0] for v in values])


def test_module_holds_the_means():
    means = ClassMeans(3, 5)
    means.update(torch.randn(9, 5), torch.arange(9) % 3)
    loss = DirectionNormLoss(means)
    assert torch.equal(loss.class_means, means.compute())
    assert not loss.state_dict() and loss.to(torch.float64).class_means.dtype == torch.float64
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    labels = torch.tensor([0, 1, 2, 2])
    torch.testing.assert_close(
        direction_norm_loss(student, teacher, means, labels),
        DirectionNormLoss(means)(student, teacher, labels),
    )


def test_classifier_weights_as_means(on_backend):
    """Table 5; a detector's background, the last class, has a row as every class does."""
    student, teacher, _, labels = batch(rows=9)
    labels[::2] = 80
    fc = torch.nn.Linear(7, 81)
    rows = fc.weight.detach().double()

    def formula(s):
        return torch.stack(
            [row_loss(s[i], teacher[i].double(), rows[labels[i]]) for i in range(len(s))]
        ).mean()

    agrees(lambda s: DirectionNormLoss(fc.weight)(s, teacher, labels), formula, student)
    loss = DirectionNormLoss(fc.weight)(student.requires_grad_(), teacher, labels)
    loss.backward()
    assert fc.weight.grad is None and student.grad.any()


def test_layers(on_backend):
    """Layer x: pooled maps of the layer before the last, with its own class means and projector."""
    maps, wide, means = torch.randn(6, 5, 4, 4), torch.randn(6, 7, 3, 3), torch.randn(4, 7)
    labels, projector = torch.randint(0, 4, (6,)), EmbeddingProjector(5, 7, dropout=0.0)
    loss = DirectionNormLoss(means)
    got = loss(projector(maps.mean((2, 3))), wide.mean((2, 3)), labels)
    s, t = projector(maps.mean((2, 3))).double(), wide.double().mean((2, 3))
    want = torch.stack([row_loss(s[i], t[i], means[labels[i]].double()) for i in range(6)]).mean()
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    gradients = [torch.autograd.grad(v, projector[2].weight)[0] for v in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_projector():
    projector = EmbeddingProjector(6, 11)
    assert projector(torch.randn(8, 6)).shape == (8, 11) and not projector[2].bias.any()
    assert projector[1].p == 0.5
    assert EmbeddingProjector(64, 1000, init="normal")[2].weight.std().item() == pytest.approx(0.01, rel=0.05)


BAD = {
    "teacher width": (
        lambda s, t, m, l: direction_norm_loss(s, t[:, :3], m, l),
        ValueError,
        "EmbeddingProjector",
    ),
    "rows": (lambda s, t, m, l: direction_norm_loss(s, t[:3], m, l), ValueError, "student and teacher"),
    "means width": (lambda s, t, m, l: direction_norm_loss(s, t, m[:, :3], l), ValueError, "class_means"),
    "no means": (lambda s, t, m, l: direction_norm_loss(s, t, None, l), TypeError, "class_means"),
    "labels": (lambda s, t, m, l: direction_norm_loss(s, t, m, l[:3]), ValueError, "labels"),
    "bool labels": (lambda s, t, m, l: direction_norm_loss(s, t, m, l > 1), TypeError, "labels"),
    "label list": (lambda s, t, m, l: direction_norm_loss(s, t, m, l.tolist()), TypeError, "labels"),
    "float labels": (lambda s, t, m, l: direction_norm_loss(s, t, m, l.float()), ValueError, "labels"),
    "reduction": (lambda s, t, m, l: DirectionNormLoss(m, reduction="sum"), ValueError, "reduction"),
    "balanced centres": (
        lambda s, t, m, l: direction_norm_loss(s, t, None, m[l], reduction="class_balanced"),
        ValueError,
        "class_balanced",
    ),
    "integers": (lambda s, t, m, l: direction_norm_loss(s.int(), t, m, l), TypeError, "student"),
    "kind": (lambda s, t, m, l: DirectionLoss(m, kind="dot"), ValueError, "kind"),
    "temperature": (lambda s, t, m, l: DirectionLoss(m, temperature=0), ValueError, "temperature"),
    "no teacher": (lambda s, t, m, l: NormLoss("l2")(s), ValueError, "teacher"),
    "previous": (lambda s, t, m, l: NormLoss("sifn")(s, previous_norms=t), ValueError, "previous_norms"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, match = BAD[case]
    with pytest.raises(error, match=match):
        call(*batch())


def test_loss_is_never_negative(on_backend):
    means = torch.randn(50, 33)
    value = direction_norm_loss(means * 3, means, means, torch.arange(50))
    assert 0 <= value.item() < 1e-6 and math.isfinite(value.item())
