"""SoKDLoss: every base against its formula, targets without gradients, freeze and reload, the bilevel loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kdfast
from kdfast.losses.features import AttentionTransferLoss
from kdfast.sokd import SETTINGS, FeatureAugmentation, PolicySearch, SearchSettings, SoKDLoss

STUDENT, TEACHER = (4, 8, 8), (6, 8, 8)
BASES = ("fitnet", "at", "crd", "reviewkd")


def make(base: str, **settings) -> SoKDLoss:
    options = {"num_samples": 20, "num_negatives": 5, "feature_dim": 8} if base == "crd" else None
    return SoKDLoss(base, student_shape=STUDENT, teacher_shape=TEACHER, options=options, **settings)


def inputs(base: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    s, t = torch.randn(3, *STUDENT, requires_grad=True), torch.randn(3, *TEACHER)
    extra = [torch.tensor([3, 11, 0]), torch.randint(20, (3, 5))] if base == "crd" else []
    return s, t, extra


@pytest.mark.parametrize("base", BASES)
def test_value_is_the_base_on_what_was_refined(base):
    loss = make(base, base_weight=3.0, detection_weight=0.5, weight=2.0)
    s, t, extra = inputs(base)
    twin = copy.deepcopy(loss)
    got = loss(s, t, *extra)
    with torch.no_grad():
        refined = twin.augmentation.augment(t)
    assert not torch.equal(refined, t)
    if base == "reviewkd":
        want = 2 * 3 * twin.base_loss([s], [refined])
    else:
        adapted, area = twin.adapters[0](s), twin.areas[0]
        seen = [area.maps(v) for v in (adapted, refined)]
        mask = area.mask(area.decode(seen[0]), 8, 8)
        assert mask.mean() > 0
        if base == "fitnet":
            value = (mask * (adapted - refined).square()).mean()
        elif base == "at":
            value = AttentionTransferLoss()(mask * s, mask * refined)
        else:
            count = mask.sum((2, 3))
            value = twin.base_loss(
                (mask * s).sum((2, 3)) / count, (mask * refined).sum((2, 3)) / count, *extra
            )
        want = 2 * (3 * value + 0.5 * area.detection_loss(*seen))
    torch.testing.assert_close(got, want)
    assert got.dtype == torch.float32 and got.item() >= 0
    torch.testing.assert_close(
        torch.autograd.grad(got, s)[0], torch.autograd.grad(want, s)[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("base", BASES)
def test_the_teacher_is_a_target(base):
    loss = make(base)
    s, t, extra = inputs(base)
    t.requires_grad_()
    loss(s, t, *extra).backward()
    assert t.grad is None and all(p.grad is None for p in loss.augmentation.parameters())
    trained = {n: p for n, p in loss.named_parameters() if not n.startswith("augmentation")}
    assert s.grad is not None and trained and all(p.grad is not None for p in trained.values())
    loss(s, t, *extra, through_policy=True).backward()
    assert loss.augmentation.logits.grad is not None


@pytest.mark.parametrize("base", BASES)
def test_freeze_and_reload_reproduce_the_loss(base):
    torch.manual_seed(3)
    loss = make(base)
    s, t, extra = inputs(base)
    loss(s, t, *extra)
    loss.augmentation.freeze()
    other = make(base, augmentation=FeatureAugmentation(seed=77))
    other.load_state_dict(loss.state_dict())
    for _ in range(3):
        a, b = loss(s, t, *extra), other(s, t, *extra)
        assert torch.equal(a, b)
        assert torch.equal(torch.autograd.grad(a, s)[0], torch.autograd.grad(b, s)[0])


@pytest.mark.parametrize("base", BASES)
def test_same_seed_same_result_and_no_draws_in_evaluation(base):
    s, t, extra = inputs(base)
    values = []
    for _ in range(2):
        torch.manual_seed(1)
        loss = make(base, augmentation=FeatureAugmentation(seed=4))
        values.append(loss(s, t, *extra))
    assert torch.equal(*values)
    loss.eval()
    state = loss.augmentation.get_generator_state()
    assert torch.equal(loss(s, t, *extra), loss(s, t, *extra))
    assert torch.equal(state, loss.augmentation.get_generator_state())


@pytest.mark.parametrize("base", ["fitnet", "at", "reviewkd"])
def test_levels_and_sizes(base):
    student, teacher = [(4, 8, 8), (8, 4, 4)], [(6, 8, 8), (10, 4, 4)]
    if base == "reviewkd":
        student, teacher = [*student, 8], [*teacher, 10]
    else:
        student[0] = (4, 16, 16)
    loss = SoKDLoss(base, student_shape=student, teacher_shape=teacher)

    def maps(shapes) -> list[Tensor]:
        return [torch.randn((3, v) if isinstance(v, int) else (3, *v), requires_grad=True) for v in shapes]

    s, t = maps(student), maps(teacher)
    loss(s, t).backward()
    assert all(v.grad is not None for v in s) and all(v.grad is None for v in t)
    assert loss.search_loss(s, t).isfinite()
    assert len(loss.components) == (0 if base == "reviewkd" else 2)
    with pytest.raises(ValueError, match="levels"):
        loss(s[:1], t[:1])


@pytest.mark.parametrize("base", BASES)
def test_search_loss_moves_only_the_policy(base):
    loss = make(base)
    s, t, _ = inputs(base)
    for parameter in (loss.augmentation.probability_logits,):
        torch.nn.init.constant_(parameter, -50.0)  # nothing is applied
    value = loss.search_loss(s, t)
    if base == "reviewkd":
        want = 0.5 * loss.base_loss([s], [t])
    else:
        want = 0.5 * F.mse_loss(loss.adapters[0](s), t)
    torch.testing.assert_close(value, want)
    value.backward()
    assert s.grad is None and loss.augmentation.logits.grad is not None
    loss.search_loss(s, t, detach_student=False).backward()
    assert s.grad is not None


@pytest.mark.parametrize("second_order", [False, True])
def test_the_loop(second_order):
    torch.manual_seed(0)
    student = torch.nn.Conv2d(3, 4, 3, padding=1)
    loss = make("fitnet")
    weights = [*student.parameters(), *loss.student_parameters()]
    optimizer = torch.optim.SGD(weights, 0.05, momentum=0.9)
    settings = SearchSettings(epochs=2, lr=0.05, second_order=second_order)
    search = PolicySearch(loss.augmentation, settings, parameters=weights, optimizer=optimizer)
    images, teacher = torch.randn(4, 3, 8, 8), torch.randn(4, *TEACHER)
    before = copy.deepcopy(loss.augmentation.state_dict())
    for epoch in range(3):
        assert search.start_epoch(epoch) == (epoch < 2)
        frozen = copy.deepcopy(loss.augmentation.logits) if epoch == 2 else None
        for _ in range(3):
            if second_order:
                search.step(
                    lambda: loss.search_loss(student(images), teacher, detach_student=False),
                    lambda: loss(student(images), teacher, through_policy=True),
                )
            maps = student(images)
            if not second_order:
                search.step(lambda maps=maps: loss.search_loss(maps, teacher))
            value = loss(maps, teacher)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert torch.equal(frozen, loss.augmentation.logits) and value.isfinite()
    after = loss.augmentation.state_dict()
    for name in ("logits", "probability_logits"):
        assert not torch.equal(before[name], after[name])
    assert after["magnitudes"].min() >= 0 and after["magnitudes"].max() <= 1


def test_compiles():
    """Without a policy in one graph; in training with one break, where the policy draws on the host."""
    loss, twin = (make("fitnet") for _ in range(2))
    twin.load_state_dict(loss.state_dict())
    s, t, _ = inputs("fitnet")
    torch.testing.assert_close(torch.compile(loss)(s, t), twin(s, t))
    loss.eval()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(s, t), loss(s, t))


def test_half_precision_and_autocast():
    loss = make("fitnet")
    s, t, _ = inputs("fitnet")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(s, t)
    assert value.dtype == torch.float32 and value.isfinite()
    torch.autograd.grad(value, s)


def test_public_names_and_settings():
    assert kdfast.sokd.SoKDLoss is SoKDLoss and "sokd" in kdfast.__all__
    cifar = SETTINGS["cifar100"]
    assert (cifar.epochs, cifar.batch_size, cifar.lr, cifar.search.epochs) == (240, 64, 0.05, 20)
    assert SETTINGS["imagenet"].search.epochs == 5
    assert SearchSettings() == SearchSettings(20, 3e-4, (0.5, 0.999), 1e-3, False, 0.01, 0.9, 1e-4, 0.01)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"base": "kd"}, "base"),
        ({"base": "crd"}, "num_samples"),
        ({"options": {"p": 2}}, "options"),
        ({"student_shape": 4}, "student_shape"),
        ({"student_shape": [STUDENT, STUDENT]}, "equally many"),
    ],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises((ValueError, TypeError), match=named):
        SoKDLoss(**{"student_shape": STUDENT, "teacher_shape": TEACHER, **settings})
