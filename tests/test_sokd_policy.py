"""The policy: operations against their definition, gradients against the estimator's definition, state, search."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from kdfast.sokd import OPERATIONS, FeatureAugmentation, PolicySearch, SearchSettings


def certain(augmentation: FeatureAugmentation, probability: float = 1.0) -> FeatureAugmentation:
    """Every operation always (or never) applied."""
    nn.init.constant_(augmentation.probability_logits, 50.0 if probability == 1 else -50.0)
    return augmentation


def one(name: str, magnitude: float, **settings) -> FeatureAugmentation:
    found = certain(FeatureAugmentation(operations=[name], length=1, **settings))
    nn.init.constant_(found.magnitudes, magnitude)
    return found


def warped(x: Tensor, source) -> Tensor:
    """Bilinear sampling pixel by pixel; ``source``: (column, row) from the centre -> the same, of x. Zeros outside."""
    h, w = x.shape[2:]
    out = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            u, v = source(j - (w - 1) / 2, i - (h - 1) / 2)
            u, v = u + (w - 1) / 2, v + (h - 1) / 2
            for y in (math.floor(v), math.floor(v) + 1):
                for z in (math.floor(u), math.floor(u) + 1):
                    if 0 <= y < h and 0 <= z < w:
                        out[:, :, i, j] += x[:, :, y, z] * (1 - abs(v - y)) * (1 - abs(u - z))
    return out


GEOMETRY = {
    "shear_x": lambda v, h, w: lambda x, y: (x - v * y, y),
    "shear_y": lambda v, h, w: lambda x, y: (x, y - v * x),
    "translate_x": lambda v, h, w: lambda x, y: (x - v * w, y),
    "translate_y": lambda v, h, w: lambda x, y: (x, y - v * h),
    "rotate": lambda v, h, w: (
        lambda x, y: (
            math.cos(math.radians(v)) * x - math.sin(math.radians(v)) * y,
            math.sin(math.radians(v)) * x + math.cos(math.radians(v)) * y,
        )
    ),
}


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("magnitude", [0.0, 0.37, 0.5, 1.0])
def test_geometry(name, magnitude):
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    with torch.no_grad():
        got = one(name, magnitude).augment(x)
    value = OPERATIONS[name].value(torch.tensor(magnitude, dtype=torch.float32).item())
    torch.testing.assert_close(got, warped(x, GEOMETRY[name](value, 6, 9)), rtol=1e-6, atol=1e-7)
    if magnitude == 0.5:
        torch.testing.assert_close(got, x)


@pytest.mark.parametrize("size", [4, 32])
def test_translation_is_a_fraction_of_the_map(size):
    """A quarter of the map at any resolution; published code throws maps of more than a few pixels away."""
    x = torch.rand(1, 1, size, size)
    shift = size // 4
    with torch.no_grad():
        got = one("translate_x", 0.5 + 0.25 / 0.9).augment(x)
    torch.testing.assert_close(got[..., shift:], x[..., :-shift], rtol=1e-4, atol=1e-5)
    assert not got[..., : shift - 1].abs().gt(1e-4).any()


def test_random_operations():
    x = torch.rand(4, 64, 20, 30) + 1
    with torch.no_grad():
        noise = one("noise", 0.5).augment(x) - x
        assert abs(noise.std().item() - 0.05) < 0.002 and abs(noise.mean().item()) < 0.002
        dropped = one("channel_drop", 1.0).augment(x)
        lost = (dropped == 0).all(3).all(2)  # [B, C]
        assert torch.equal(lost, lost[:1].expand(4, -1)) and 0.3 < lost.float().mean() < 0.7
        assert torch.equal(dropped[:, ~lost[0]], x[:, ~lost[0]])  # not rescaled
        shuffled = one("channel_shuffle", 0.5).augment(x)
        order = [int((shuffled[0, i] == x[0]).all(2).all(1).nonzero()) for i in range(64)]
        assert sorted(order) == list(range(64)) != order and torch.equal(shuffled, x[:, order])
        for seed in range(5):
            hole = one("cutout", 1.0, seed=seed).augment(x) == 0
            assert torch.equal(hole, hole[:1, :1].expand_as(hole))
            rows, columns = (hole[0, 0].any(i).sum().item() for i in (1, 0))
            assert 0 < rows <= 5 and 0 < columns <= 7 and hole[0, 0].sum() == rows * columns


def definition(
    augmentation: FeatureAugmentation, x: Tensor, g: Tensor, draw
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the estimator's definition, of <g, s(F)> for operations whose adjoint is a factor here."""
    a = augmentation
    s, (first, second) = draw.policy, draw.applied
    seeds = draw.seeds

    def operate(v, place):
        return a._operate(v, s, place, seeds[place])

    x1 = operate(x, 0)
    x_first = x1 if first else x
    x2 = operate(x_first, 1)
    with torch.no_grad():
        out = a.augment(x, draw)
    probe = x_first.clone().requires_grad_()
    (back,) = torch.autograd.grad((operate(probe, 1) if second else probe * 1), probe, g)
    u = draw.logistic
    b = torch.sigmoid((a.probability_logits[s].detach() + u) / a.relaxation)
    slope = b * (1 - b) / a.relaxation
    logits, probabilities = torch.zeros_like(a.logits), torch.zeros_like(a.probability_logits)
    magnitudes = torch.zeros_like(a.magnitudes)
    w = torch.softmax((a.logits.detach() + draw.gumbel) / a.temperature, 0)
    logits -= w[s] * w * (g * (out - x)).sum() / a.temperature
    logits[s] += w[s] * (g * (out - x)).sum() / a.temperature
    probabilities[s, 0] = slope[0] * (back * (x1 - x)).sum()
    probabilities[s, 1] = slope[1] * (g * (x2 - x_first)).sum()
    magnitudes[s, 0] = back.sum() if first else 0
    magnitudes[s, 1] = g.sum() if second else 0
    return logits, probabilities, magnitudes


def test_policy_gradients_follow_the_estimator():
    augmentation = FeatureAugmentation(seed=3)
    for parameter in (augmentation.logits, augmentation.probability_logits):
        nn.init.normal_(parameter)
    nn.init.uniform_(augmentation.magnitudes)
    x, g = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 5, 7)
    seen = set()
    for _ in range(12):
        draw = augmentation.draw()
        out = augmentation.augment(x, draw)
        with torch.no_grad():
            assert torch.equal(out, augmentation.augment(x, draw))  # the value is the hard draw, exactly
        got = torch.autograd.grad((out * g).sum(), list(augmentation.parameters()))
        for have, want in zip(got, definition(augmentation, x, g, draw), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
        seen.add((draw.policy, draw.applied))
    assert len(seen) > 5


def test_mixture_is_its_formula():
    names = ("noise", "rotate", "channel_drop")
    augmentation = FeatureAugmentation(operations=names, estimator="mixture", seed=1)
    nn.init.normal_(augmentation.logits)
    x = torch.randn(2, 6, 5, 7)
    draw = augmentation.draw()
    out = augmentation.augment(x, draw)
    w = torch.softmax((augmentation.logits + draw.gumbel) / 0.5, 0)
    b = torch.sigmoid((augmentation.probability_logits + draw.logistic) / 0.5)
    want, seeds = 0.0, iter(draw.seeds)
    for s in range(3):
        v = x
        for j in range(2):
            v = b[s, j] * augmentation._operate(v, s, j, next(seeds)) + (1 - b[s, j]) * v
        want = want + w[s] * v
    torch.testing.assert_close(out, want)
    parameters = [augmentation.logits, augmentation.probability_logits]
    g = torch.randn_like(out)
    for have, need in zip(
        torch.autograd.grad(out, parameters, g, retain_graph=True),
        torch.autograd.grad(want, parameters, g),
        strict=True,
    ):
        torch.testing.assert_close(have, need, rtol=1e-4, atol=1e-5)
    (m,) = torch.autograd.grad(out, augmentation.magnitudes, g)
    last = (w[:, None] * b)[:, 1] * g.sum()  # nothing follows the last operation
    torch.testing.assert_close(m[:, 1], last.detach(), rtol=1e-4, atol=1e-5)


def test_draws_follow_the_policy():
    augmentation = FeatureAugmentation(operations=("noise", "cutout", "rotate"), seed=2)
    with torch.no_grad():
        augmentation.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        augmentation.probability_logits.copy_(torch.tensor([[0.0, 1.0]]).expand(3, 2))
    draws = [augmentation.draw() for _ in range(3000)]
    share = torch.bincount(torch.tensor([d.policy for d in draws]), minlength=3) / 3000
    torch.testing.assert_close(share, torch.softmax(augmentation.logits.detach(), 0), atol=0.03, rtol=0)
    applied = torch.tensor([d.applied for d in draws]).float().mean(0)
    torch.testing.assert_close(applied, torch.sigmoid(torch.tensor([0.0, 1.0])), atol=0.03, rtol=0)


def test_same_seed_same_result_and_one_draw_for_all_levels():
    x = [torch.randn(2, 4, 6, 6), torch.randn(2, 8, 3, 3), torch.randn(2, 8)]
    outs = [FeatureAugmentation(seed=5).augment(x) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert outs[0][2] is x[2]
    other = [FeatureAugmentation(seed=s).draw() for s in range(8)]
    assert len({d.policy for d in other}) > 3
    state = torch.random.get_rng_state()
    FeatureAugmentation().augment(x)
    assert torch.equal(state, torch.random.get_rng_state())  # its own generator


def test_search_loss():
    augmentation = certain(FeatureAugmentation(seed=1), 0.0)
    s, t = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 6, 6)
    value = augmentation.search_loss(s, t)
    torch.testing.assert_close(value, 0.5 * (s.detach() - t).square().mean())
    assert value.dtype == torch.float32 and augmentation.search_loss([s, s], [t, t]).isfinite()
    value.backward()
    assert s.grad is None and augmentation.probability_logits.grad is not None
    augmentation.search_loss(s, t, detach_student=False).backward()
    assert s.grad is not None
    half = augmentation.search_loss(s.half(), t.half())
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="shape"):
        augmentation.search_loss(s, t[:, :2])


def test_freeze_and_state():
    augmentation = FeatureAugmentation(seed=1)
    nn.init.normal_(augmentation.logits)
    nn.init.normal_(augmentation.probability_logits)
    best = int(augmentation.logits.argmax())
    x = torch.randn(2, 6, 8, 8)
    augmentation.augment(x)
    for frozen in (False, True):
        if frozen:
            augmentation.freeze()
            assert not any(p.requires_grad for p in augmentation.parameters())
            assert {augmentation.draw().policy for _ in range(10)} == {best}
        file = io.BytesIO()
        torch.save(augmentation.state_dict(), file)
        file.seek(0)
        other = FeatureAugmentation(seed=99)
        other.load_state_dict(torch.load(file, weights_only=True))
        twin = copy.deepcopy(augmentation)
        assert other.frozen == augmentation.frozen
        for _ in range(4):
            out = augmentation.augment(x)
            assert torch.equal(out, other.augment(x)) and torch.equal(out, twin.augment(x))
    assert augmentation.policies[best][0] in augmentation.describe() and "frozen" in repr(augmentation)
    assert augmentation.unfreeze().logits.requires_grad


def test_readable_printout():
    augmentation = FeatureAugmentation(operations=("rotate", "channel_shuffle"))
    assert augmentation.describe() == "100.0 %  rotate +0.000 degrees (p 0.50), then channel_shuffle (p 0.50)"


@pytest.mark.parametrize("estimator", ["straight_through", "mixture"])
def test_search_learns_what_brings_the_teacher_near(estimator):
    """The student is the teacher: what changes it least, a small hole, must win."""
    augmentation = FeatureAugmentation(
        operations=("channel_drop", "cutout", "channel_shuffle"), length=1, estimator=estimator
    )
    augmentation = certain(augmentation)
    search = PolicySearch(augmentation, SearchSettings(epochs=1, lr=0.05, weight_decay=0))
    t = torch.rand(8, 16, 8, 8) + 1
    for _ in range(60):
        search.step(lambda: augmentation.search_loss(t, t))
    assert search.start_epoch(0)
    assert not search.start_epoch(1)
    assert augmentation.policies[augmentation.frozen] == ("cutout",)
    assert search.step(lambda: augmentation.search_loss(t, t)) is None


def test_second_order_is_the_derivative_through_the_step():
    """Against differences of the loss after one step of gradient descent, in float64, with a smooth policy."""
    torch.manual_seed(0)
    augmentation = FeatureAugmentation(operations=("rotate", "noise"), length=1, estimator="mixture").double()
    nn.init.uniform_(augmentation.magnitudes)
    t = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    w = nn.Parameter(torch.randn(1, 3, 1, 1, dtype=torch.float64))
    state = augmentation.get_generator_state()

    def train(weight):
        return (weight * t - augmentation.augment(t)).pow(4).mean()

    def upper(weight):
        return (weight * t - augmentation.augment(t)).square().mean()

    settings = SearchSettings(second_order=True, inner_lr=0.1, inner_weight_decay=0.01, difference=1e-4)
    search = PolicySearch(augmentation, settings, parameters=[w, *augmentation.parameters()])
    before = w.detach().clone()
    _, got = search._second_order(lambda: upper(w), lambda: train(w))
    assert torch.equal(w, before)
    augmentation.set_generator_state(state)
    smooth = [augmentation.logits, augmentation.probability_logits]

    def through() -> Tensor:
        augmentation.set_generator_state(state)
        (g,) = torch.autograd.grad(train(w), w)
        moved = (w - 0.1 * (g + 0.01 * w)).detach()
        return upper(moved).detach()

    for parameter, gradient in zip(smooth, got[:2], strict=True):
        for i in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * 1e-5
                values.append(through())
                with torch.no_grad():
                    parameter.view(-1)[i] -= sign * 1e-5
            want = (values[0] - values[1]) / 2e-5
            torch.testing.assert_close(gradient.view(-1)[i], want, rtol=1e-4, atol=1e-7)
    value = search.step(lambda: upper(w), lambda: train(w))
    assert value.isfinite() and torch.equal(w, before)
    with pytest.raises(ValueError, match="train_loss"):
        search.step(lambda: upper(w))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"operations": ["blur"]}, "operations"),
        ({"length": 10}, "length"),
        ({"policies": 40}, "policies"),
        ({"temperature": 0}, "temperature"),
        ({"estimator": "relax"}, "estimator"),
    ],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        FeatureAugmentation(**settings)
    assert len(FeatureAugmentation(policies=35).policies) == 35
