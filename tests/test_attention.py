"""AttentionGuidedLoss, attention_masks and FBKD's attention against the formulas (Zhang & Ma) written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kdfast
from kdfast import AttentionGuidedLoss, attention_masks
from kdfast.compat._fbkd import FBKDLoss, StudentAttention, TeacherAttention
from kdfast.losses.attention import PRESETS


def maps(*shape, dtype=torch.float32, other=None):
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(other or shape, dtype=dtype)


def softmax_mask(v, temperature):
    weights = (v / temperature).exp()
    return v.numel() * weights / weights.sum()


def published(s, t, temperature, transfer, masked, channel_mask, spatial=None, channel=None, feature=None):
    """One level as published code computes it, an image at a time, with its adaptation layers or none."""
    error, adapted = 0, s if feature is None else feature(s)
    for i in range(s.shape[0]):
        m_s = sum(softmax_mask(v[i].abs().mean(0), temperature) for v in (s, t)) / 2
        m_c = sum(softmax_mask(v[i].abs().mean((1, 2)), temperature) for v in (s, t)) / 2
        weight = m_s[None] * (m_c[:, None, None] if channel_mask else 1)
        error = error + (weight.detach() * (adapted[i] - t[i]) ** 2).sum()
    own_spatial, own_channel = s.mean(1, keepdim=True), s.mean((2, 3))
    if spatial is not None:
        own_spatial, own_channel = spatial(own_spatial), channel(own_channel)
    spatial_part = (own_spatial - t.mean(1, keepdim=True)).pow(2).sum().sqrt()
    channel_part = (own_channel - t.mean((2, 3))).pow(2).sum().sqrt()
    return transfer * (spatial_part + channel_part) + masked * error.sqrt()


CODE = {"two_stage": (0.5, 4e-3, 7e-5, False), "one_stage": (0.1, 2.4e-2, 4.2e-4, True)}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("adapt", [False, True])
def test_published_presets(name, adapt):
    torch.manual_seed(1)
    levels = [maps(2, 6, h, w, dtype=torch.float64) for h, w in ((9, 12), (5, 6), (1, 3))]
    student, teacher = zip(*levels, strict=True)
    loss = AttentionGuidedLoss.preset(name, [6, 6, 6], adapt=adapt).double()
    layers = [(a.spatial, a.channel, a.feature) for a in loss.adaptation] or [()] * 3
    expected = sum(published(s, t, *CODE[name], *a) for (s, t), a in zip(levels, layers, strict=True))
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert abs(value.item() - expected.item()) < 1e-6 * expected.item()
    wanted = [*student, *loss.parameters()]
    found, truth = (torch.autograd.grad(v, wanted) for v in (value, expected))
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f, t, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["paper_two_stage", "paper_one_stage"])
def test_paper_presets(name):
    """Weights and temperatures of the text, means of |A|, both masks."""
    s, t = maps(2, 6, 5, 7, dtype=torch.float64)
    p = PRESETS[name]
    found = AttentionGuidedLoss.preset(name)(s, t)
    spatial, channel = attention_masks(s, t, temperature=p["temperature"])
    masked = (spatial * channel * (s - t) ** 2).sum().sqrt()
    transfer = torch.dist(s.abs().mean(1), t.abs().mean(1)) + torch.dist(
        s.abs().mean((2, 3)), t.abs().mean((2, 3))
    )
    torch.testing.assert_close(found.double(), p["transfer_weight"] * transfer + p["masked_weight"] * masked)


@pytest.mark.parametrize("mode", ["mean_of_softmax", "softmax_of_sum"])
@pytest.mark.parametrize("temperature", [0.01, 0.5, 10])
def test_masks(mode, temperature):
    s, t = maps(3, 8, 13, 9)
    spatial, channel = attention_masks(s, t, temperature=temperature, mode=mode)
    assert spatial.shape == (3, 1, 13, 9)
    assert channel.shape == (3, 8, 1, 1)
    torch.testing.assert_close(spatial.sum((1, 2, 3)), torch.full((3,), 13 * 9.0))
    torch.testing.assert_close(channel.sum((1, 2, 3)), torch.full((3,), 8.0))
    for i in range(3):
        pooled = [v[i].double().abs().mean(0) for v in (s, t)]
        expected = softmax_mask(sum(pooled) - sum(pooled).max(), temperature)
        if mode == "mean_of_softmax":
            expected = sum(softmax_mask(v - v.max(), temperature) for v in pooled) / 2
        torch.testing.assert_close(spatial[i, 0].double(), expected, rtol=1e-4, atol=1e-6)
    assert spatial.requires_grad  # attention_masks itself is differentiable
    torch.autograd.grad(spatial[0, 0, 0, 0] + channel[0, 0, 0, 0], s)


def test_modes_differ_at_small_temperature():
    s, t = maps(1, 8, 9, 9)
    mean, product = (
        attention_masks(s, t, temperature=0.05, mode=m)[0] for m in ("mean_of_softmax", "softmax_of_sum")
    )
    assert (mean - product).abs().max() > 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_student_of_another_width(channels_last):
    s, t = maps(2, 4, 6, 5, other=(2, 7, 6, 5))
    if channels_last:
        s, t = (v.detach().contiguous(memory_format=torch.channels_last) for v in (s, t))
        s.requires_grad_()
    loss = AttentionGuidedLoss((4, 7), pooling="signed")
    layer = loss.adaptation[0]
    adapted = layer.feature(s)
    spatial, channel = attention_masks(adapted.detach(), t, temperature=0.5)
    expected = (spatial * channel * (adapted - t) ** 2).sum().sqrt()
    expected = expected + torch.dist(layer.spatial(s.mean(1, keepdim=True)), t.mean(1, keepdim=True))
    expected = expected + torch.dist(layer.channel(s.mean((2, 3))), t.mean((2, 3)))
    found = loss(s, t)
    torch.testing.assert_close(found, expected)
    wanted = [s, *loss.parameters()]
    for a, b in zip(*(torch.autograd.grad(v, wanted) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_channels_of_levels():
    def widths(channels):
        return [
            (a.channel.in_features, a.channel.out_features) for a in AttentionGuidedLoss(channels).adaptation
        ]

    assert widths(8) == [(8, 8)]
    assert widths((4, 8)) == [(4, 8)]
    assert widths([4, 8]) == [(4, 4), (8, 8)]
    assert widths([(4, 8), 8, (2, 1)]) == [(4, 8), (8, 8), (2, 1)]
    assert widths((8, 8, 8)) == [(8, 8)] * 3
    assert widths(None) == []
    assert not list(AttentionGuidedLoss([4, 8], adapt=False).parameters())


def test_no_channels_make_no_layers():
    """adapt=True asks for layers only where ``channels`` says of what width."""
    s, t = maps(2, 5, 4, 6)
    loss, without = AttentionGuidedLoss(), AttentionGuidedLoss(adapt=False)
    assert not list(loss.parameters()) and not loss.state_dict()
    assert torch.equal(loss(s, t), without(s, t))
    assert torch.equal(loss([s, s], [t, t]), without([s, s], [t, t]))  # any number of levels
    with pytest.raises(ValueError, match="equally many channels unless channels="):
        loss(s, torch.randn(2, 7, 4, 6))


@pytest.mark.parametrize("pooling", ["abs", "signed"])
@pytest.mark.parametrize("preset", ["two_stage", "one_stage"])
def test_kept_for_the_backward(preset, pooling):
    """Beside the maps: a mask and a difference of one channel, and numbers per channel."""
    s, t = maps(2, 16, 40, 50)
    kept = {}

    def keep(v):
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        AttentionGuidedLoss.preset(preset, pooling=pooling)(s, t)
    one_channel = 4 * 2 * 40 * 50
    reference = kdfast.backend.why_not("cpu") is not None
    assert reference or sum(kept.values()) < 2 * s.nbytes + 2.2 * one_channel


def test_weights_and_detachment():
    s, t = maps(2, 5, 4, 6)
    whole = AttentionGuidedLoss(weight=3.0, transfer_weight=0.5, masked_weight=2.0)(s, t)
    transfer = AttentionGuidedLoss(masked_weight=0.0)(s, t)
    masked = AttentionGuidedLoss(transfer_weight=0.0)(s, t)
    torch.testing.assert_close(whole, 3 * (0.5 * transfer + 2 * masked))
    attached = AttentionGuidedLoss(transfer_weight=0.0, detach_mask=False)(s, t)
    torch.testing.assert_close(attached, masked, rtol=1e-6, atol=0)
    spatial, channel = attention_masks(s, t, temperature=0.5)
    (expected,) = torch.autograd.grad((spatial * channel * (s - t) ** 2).sum().sqrt(), s)
    (found,) = torch.autograd.grad(attached, s)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, torch.autograd.grad(masked, s)[0], rtol=1e-2)


@pytest.mark.parametrize("channels", [None, 5])
def test_equal_maps_have_a_finite_gradient(channels):
    s, t = maps(2, 5, 4, 6)
    loss = AttentionGuidedLoss(channels)
    if channels:
        nn.init.dirac_(loss.adaptation[0].feature.weight), nn.init.zeros_(loss.adaptation[0].feature.bias)
        nn.init.dirac_(loss.adaptation[0].spatial.weight), nn.init.zeros_(loss.adaptation[0].spatial.bias)
        nn.init.eye_(loss.adaptation[0].channel.weight), nn.init.zeros_(loss.adaptation[0].channel.bias)
    value = loss(s, s.detach().clone())
    assert value.item() == 0
    for gradient in torch.autograd.grad(value, [s, *loss.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("detach_mask", [True, False])
def test_compiles_into_one_graph(adapt, detach_mask):
    s, t = maps(2, 5, 8, 6)
    loss = AttentionGuidedLoss(5, adapt=adapt, detach_mask=detach_mask)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    values = [f(s, t) for f in (loss, compiled)]
    torch.testing.assert_close(*values)
    wanted = [s, *loss.parameters()]
    for a, b in zip(*(torch.autograd.grad(v, wanted) for v in values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast():
    s, t = maps(2, 5, 8, 6)
    loss = AttentionGuidedLoss(5)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(s, t)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(s, t), rtol=2e-2, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, [s, *loss.parameters()]))


def test_state_and_copies():
    loss = AttentionGuidedLoss([4, (4, 6)])
    other = AttentionGuidedLoss([4, (4, 6)])
    other.load_state_dict(loss.state_dict())
    s, t = zip(maps(1, 4, 3, 3), maps(1, 4, 3, 3, other=(1, 6, 3, 3)), strict=True)
    assert torch.equal(other(s, t), copy.deepcopy(loss)(s, t))


def test_fbkd_is_the_two_stage_preset():
    """Connectors and loss of mmrazor, without relations, against the formula and against the preset."""
    s, t = maps(2, 6, 5, 7, dtype=torch.float64)
    student, teacher = StudentAttention(6).double(), TeacherAttention(6)
    relation = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    *parts, adapted = student.adapted(s)
    spatial_mask, channel_mask, spatial, _ = teacher.attention(t)
    value = FBKDLoss(loss_weight=2.0)(
        (*parts, relation + 1, adapted), (spatial_mask, channel_mask, spatial, relation, t)
    )
    layers = student.spatial_wise_adaptation, student.channel_wise_adaptation, student.adaptation_layers
    expected = published(s, t, *CODE["two_stage"], *layers)
    torch.testing.assert_close(value, 2 * (expected + 7e-5 * relation.numel() ** 0.5))
    wanted = [s, *student.parameters()]
    for a, b in zip(*(torch.autograd.grad(v, wanted) for v in (value, 2 * expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert list(student.state_dict()) == [
        f"{layer}.{kind}"
        for layer in ("channel_wise_adaptation", "spatial_wise_adaptation", "adaptation_layers")
        for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda s, t: AttentionGuidedLoss()(s, t[:, :3]),
            ValueError,
            "equally many channels unless channels=",
        ),
        (lambda s, t: AttentionGuidedLoss()(s, t[..., 1:]), ValueError, r"one size H x W.*\[2, 5, 4, 5\]"),
        (lambda s, t: AttentionGuidedLoss()(s, t[:1]), ValueError, "equally many samples"),
        (lambda s, t: AttentionGuidedLoss()(s[0], t[0]), ValueError, "one size H x W"),
        (lambda s, t: AttentionGuidedLoss()(s[:, :0], t[:, :0]), ValueError, "at least one channel"),
        (lambda s, t: AttentionGuidedLoss()(s.int(), t), TypeError, "student: need a floating point"),
        (lambda s, t: AttentionGuidedLoss(4)(s, t), ValueError, "student 4 and teacher 4 channels"),
        (lambda s, t: AttentionGuidedLoss(5)([s, s], [t, t]), ValueError, "made for 1 levels, got 2"),
        (lambda s, t: AttentionGuidedLoss("five"), ValueError, "channels: need an int"),
        (lambda s, t: AttentionGuidedLoss([(5, 0)]), ValueError, "channels: need an int"),
        (lambda s, t: AttentionGuidedLoss(temperature=0), ValueError, "temperature: need a number above 0"),
        (lambda s, t: AttentionGuidedLoss(mask="mean"), ValueError, "mask: got 'mean'"),
        (lambda s, t: AttentionGuidedLoss(pooling="max"), ValueError, "pooling: got 'max'"),
        (lambda s, t: AttentionGuidedLoss.preset("paper"), ValueError, "name: got 'paper'"),
        (lambda s, t: attention_masks(s, t, temperature=1, mode="sum"), ValueError, "mode: got 'sum'"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(*maps(2, 5, 4, 6))


def test_values_do_not_depend_on_the_backend():
    s, t = maps(2, 5, 14, 16)
    loss = AttentionGuidedLoss(5)
    with kdfast.use_backend("reference"):
        expected = loss(s, t)
    torch.testing.assert_close(loss(s, t), expected)
