"""StructuredKDLoss against its formulas (Zhang & Ma, Eq. 2 to 9) written out, and the detector example."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attention import published
from test_non_local import naive_loss, trained

import kdfast
from kdfast import StructuredKDLoss

# alpha, beta, gamma, T and the channel mask, of paper and code; all code compares signed means, the paper means of |A|.
TABLE = {
    "two_stage": (4e-3, 7e-5, 7e-5, 0.5, False),
    "one_stage": (2.4e-2, 4.2e-4, 4.2e-4, 0.1, True),
    "paper_two_stage": (7e-5, 4e-3, 7e-5, 0.1, True),
    "paper_one_stage": (4e-4, 2e-2, 4e-4, 0.5, True),
}


def pyramid(*widths: int, requires_grad: bool = False) -> list[torch.Tensor]:
    sizes = ((9, 11), (5, 6), (3, 3))
    return [
        torch.randn(2, c, *size, dtype=torch.float64, requires_grad=requires_grad)
        for c, size in zip(widths, sizes, strict=False)
    ]


def close(found: float, expected: float, tolerance: float = 1e-6) -> None:
    assert abs(float(found) - float(expected)) <= tolerance * abs(float(expected))


@pytest.mark.parametrize("preset", ["two_stage", "one_stage"])
def test_published_presets(preset):
    student, teacher = pyramid(6, 6, 6, requires_grad=True), pyramid(6, 6, 6)
    alpha, beta, gamma, temperature, channel_mask = TABLE[preset]
    loss = trained(StructuredKDLoss([6] * 3, preset=preset, key_stride=[4, 2, 1], weight=3.0)).double()
    expected = gamma * naive_loss(loss.non_local, student, teacher) / loss.non_local.weight
    for s, t, layer in zip(student, teacher, loss.attention.adaptation, strict=True):
        layers = (layer.spatial, layer.channel, layer.feature)
        expected = expected + published(s, t, temperature, alpha, beta, channel_mask, *layers)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    close(value, 3 * expected)
    wanted = [*student, *loss.parameters()]
    found, truth = (torch.autograd.grad(v, wanted) for v in (value, 3 * expected))
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f, t, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("preset", TABLE)
def test_components_are_the_terms(preset):
    """Each by itself, from the losses it is made of, with the table's factors."""
    student, teacher = pyramid(6, requires_grad=True), pyramid(6)
    loss = StructuredKDLoss(6, preset=preset, key_stride=1, weight=2.0, adapt=False).double()
    assert loss.components == {}
    value = loss(student, teacher)
    assert list(loss.components) == ["L_AT", "L_AM", "L_NLD"]
    assert not any(v.requires_grad for v in loss.components.values())
    close(sum(loss.components.values()), value)
    alpha, beta, gamma, temperature, channel_mask = TABLE[preset]
    (s,), (t,) = student, teacher
    pool = torch.abs if preset.startswith("paper") else torch.clone
    spatial, channel = kdfast.attention_masks(s, t, temperature=temperature)
    weights = spatial * channel if channel_mask else spatial
    transfer = sum(torch.dist(pool(s).mean(axes), pool(t).mean(axes)) for axes in (1, (2, 3)))
    close(loss.components["L_AT"], 2 * alpha * transfer)
    close(loss.components["L_AM"], 2 * beta * (weights * (s - t) ** 2).sum().sqrt())
    close(loss.components["L_NLD"], 2 * gamma * torch.dist(s, t))  # blocks start as identities


def test_components_with_adaptation_layers():
    student, teacher = [v.float() for v in pyramid(4, 6)], [v.float() for v in pyramid(6, 6)]
    loss = trained(StructuredKDLoss([(4, 6), 6], key_stride=2))
    value = loss(student, teacher)
    close(sum(loss.components.values()), value)
    for name, factor in (("transfer_weight", "L_AT"), ("masked_weight", "L_AM")):
        without = copy.deepcopy(loss)
        setattr(without.attention, name, 0.0)
        close(value - without(student, teacher), loss.components[factor], 1e-4)
        assert without.components[factor].item() == 0
    assert "components" not in repr(loss)


@pytest.mark.parametrize("kind", ["gaussian", "concatenation", "criss_cross"])
def test_kinds(kind):
    student, teacher = [v.float() for v in pyramid(8, 8, 8)], [v.float() for v in pyramid(8, 8, 8)]
    loss = StructuredKDLoss([8, 8, 8], kind=kind, key_stride=1)
    loss(student, teacher).backward()
    assert {b.kind for b in [*loss.non_local.student, *loss.non_local.teacher]} == {kind}
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


def test_compiles_into_one_graph():
    student, teacher = torch.randn(2, 8, 9, 11, requires_grad=True), torch.randn(2, 8, 9, 11)
    loss = trained(StructuredKDLoss(8))
    torch._dynamo.reset()
    found = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        loss._components = {}
        value = call(student, teacher)
        gradients = torch.autograd.grad(value, [student, *loss.parameters()])
        found.append([value.detach(), *loss.components.values(), *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_autocast():
    student, teacher = torch.randn(2, 8, 9, 11, requires_grad=True), torch.randn(2, 8, 9, 11)
    loss = StructuredKDLoss(8)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student, teacher), rtol=2e-2, atol=0)


def test_state_and_errors():
    loss, other = (StructuredKDLoss([4, (4, 6)], key_stride=1) for _ in range(2))
    other.load_state_dict(loss.state_dict())
    student = [torch.randn(1, 4, 3, 3), torch.randn(1, 4, 2, 2)]
    teacher = [torch.randn(1, 4, 3, 3), torch.randn(1, 6, 2, 2)]
    assert torch.equal(loss(student, teacher), other(student, teacher))
    assert torch.equal(copy.deepcopy(loss)(student, teacher), other(student, teacher))
    with pytest.raises(ValueError, match="preset: got 'three_stage'"):
        StructuredKDLoss(4, preset="three_stage")
    with pytest.raises(ValueError, match="kind: got 'all'"):
        StructuredKDLoss(4, kind="all")
    with pytest.raises(ValueError, match="2 levels, got 1"):
        loss(student[0], teacher[0])


def test_example(tmp_path):
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib"), pytest.importorskip("tqdm")
    script = Path(__file__).parents[1] / "examples" / "distill_detector.py"
    figure = tmp_path / "figure.png"
    short = ["--steps", "4", "--seeds", "1", "--test-scenes", "8", "--repeats", "1", "--out", str(figure)]
    done = subprocess.run([sys.executable, str(script), *short], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert figure.stat().st_size > 10_000
    scores = re.findall(r"^(teacher|student alone|student \+ structured KD) +([\d.]+) %", done.stdout, re.M)
    assert len(scores) == 3 and all(0 <= float(score) <= 100 for _, score in scores)
    shares = re.findall(r"^(published code|plain PyTorch|kdfast \w*).* ([\d.]+) %$", done.stdout, re.M)
    assert len(shares) >= 2 and all(0 < float(share) < 100 for _, share in shares)
