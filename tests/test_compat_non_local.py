"""Drop-ins of mmcv, CCNet and mmrazor's FBKD against modules written the published way: same keys, same values.

The modules here are written from the formulas and the published state keys, with the n x m matrices they form.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from test_attention import softmax_mask
from test_non_local import cross, trained
from torch import Tensor, nn

from kdfast import NonLocalBlock
from kdfast.compat.ccnet import CrissCrossAttention, RCCAModule
from kdfast.compat.mmcv import NonLocal2d
from kdfast.compat.mmrazor import FBKDLoss, FBKDStudentConnector, FBKDTeacherConnector

MODES = ["gaussian", "embedded_gaussian", "dot_product", "concatenation"]


def holder(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class Published(nn.Module):
    """A block with keys, values and names as given: ``conv`` under ``nest``, pools behind, ``last`` at the end."""

    def __init__(self, mode: str, c: int, d: int, pools: list[int], use_scale: bool, names: dict) -> None:
        super().__init__()
        self.mode, self.use_scale, self.names = mode, use_scale, names
        wrap = names["wrap"]

        def keyed() -> nn.Module:
            module = wrap(nn.Conv2d(c, d, 1))
            for stride in pools:
                module = nn.Sequential(module, nn.MaxPool2d(stride))
            return module

        self.g = keyed()
        self.pools = nn.Sequential(*(nn.MaxPool2d(stride) for stride in pools))
        self.add_module(names["last"], names["make_last"](d, c))
        if mode != "gaussian":
            self.theta, self.phi = wrap(nn.Conv2d(c, d, 1)), keyed()
        if mode == "concatenation":
            self.concat_project = wrap(nn.Conv2d(2 * d, 1, 1, bias=False), relu=True)

    @staticmethod
    def run(module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Sequential):
            for child in module:
                x = Published.run(child, x)
            return x
        children = list(module.children())
        return Published.run(nn.Sequential(*children), x) if type(module) is nn.Module else module(x)

    def forward(self, x: Tensor) -> Tensor:
        value = self.run(self.g, x).flatten(2).transpose(1, 2)  # [B, m, d]
        if self.mode == "gaussian":
            query, key = x.flatten(2), self.pools(x).flatten(2)
        else:
            query, key = self.run(self.theta, x).flatten(2), self.run(self.phi, x).flatten(2)
        n, m = query.shape[2], key.shape[2]
        if self.mode == "concatenation":
            pairs = torch.cat(
                [query[..., None].expand(-1, -1, -1, m), key[:, :, None].expand(-1, -1, n, -1)], 1
            )
            f = self.run(self.concat_project, pairs)[:, 0].relu() / m
        else:
            f = query.transpose(1, 2) @ key
            if self.mode == "dot_product":
                f = f / m
            else:
                scaled = self.mode == "embedded_gaussian" and self.use_scale
                f = (f / query.shape[1] ** 0.5 if scaled else f).softmax(2)
        y = (f @ value).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
        return x + self.run(getattr(self, self.names["last"]), y)


def mmcv_names(norm: bool) -> dict:
    def last(d: int, c: int) -> nn.Module:
        conv = nn.Conv2d(d, c, 1, bias=not norm)
        return holder(conv=conv, bn=nn.BatchNorm2d(c)) if norm else holder(conv=conv)

    return {"wrap": lambda conv, relu=False: holder(conv=conv), "last": "conv_out", "make_last": last}


ALEX = {
    "wrap": lambda conv, relu=False: nn.Sequential(conv, nn.ReLU()) if relu else conv,
    "last": "W",
    "make_last": lambda d, c: nn.Sequential(nn.Conv2d(d, c, 1), nn.BatchNorm2d(c)),
}


def same(ours: nn.Module, theirs: nn.Module, *shape: int, tolerance: float = 1e-9) -> None:
    """The same keys, and after loading the same results and gradients, in both directions."""
    ours, theirs = ours.double(), trained(theirs).double()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(expected)
    names = [k for k, _ in theirs.named_parameters()]
    wanted = [[x, *(dict(m.named_parameters())[k] for k in names)] for m in (ours, theirs)]
    gradients = (
        torch.autograd.grad((v * weights).sum(), w) for v, w in zip((found, expected), wanted, strict=True)
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_mmcv(mode, sub_sample, norm):
    ours = NonLocal2d(6, sub_sample, norm_cfg={"type": "BN"} if norm else None, mode=mode)
    theirs = Published(mode, 6, 3, [2] if sub_sample else [], True, mmcv_names(norm))
    same(ours, theirs, 2, 6, 5, 7)
    prefix = "g.0.conv" if sub_sample else "g.conv"
    assert f"{prefix}.weight" in ours.state_dict()


def test_mmcv_settings():
    same(
        NonLocal2d(8, use_scale=False, reduction=4),
        Published("embedded_gaussian", 8, 2, [], False, mmcv_names(False)),
        1,
        8,
        4,
        3,
    )
    x = torch.randn(2, 8, 4, 4)
    for norm_cfg in (None, {"type": "BN", "requires_grad": False}):
        assert torch.equal(NonLocal2d(8, norm_cfg=norm_cfg)(x), x)  # starts as the identity
        assert not torch.equal(NonLocal2d(8, norm_cfg=norm_cfg, zeros_init=False, std=1.0)(x), x)
    assert not NonLocal2d(8, norm_cfg={"type": "BN", "requires_grad": False}).conv_out.bn.weight.requires_grad
    block = NonLocal2d(512, std=0.01)
    assert 0.009 < block.theta.conv.weight.std() < 0.011 and not block.g.conv.bias.any()
    named = inspect.signature(NonLocal2d).parameters
    assert list(named)[:3] == ["in_channels", "sub_sample", "conv_cfg"]
    assert (named["mode"].default, named["reduction"].default) == ("embedded_gaussian", 2)
    for settings, message in (
        ({"mode": "rcca"}, "mode: got 'rcca'"),
        ({"conv_cfg": {"type": "Conv1d"}}, "conv_cfg: need None"),
        ({"norm_cfg": {"type": "GN"}}, "norm_cfg.*got 'GN'"),
    ):
        with pytest.raises(ValueError, match=message):
            NonLocal2d(8, **settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 3])
def test_block_loads_the_first_published_code(mode, stride):
    """AlexHex7's keys, and those of the detectors of Zhang & Ma."""
    pools = [stride] if stride > 1 else []
    same(
        NonLocalBlock(6, kind=mode, key_stride=stride), Published(mode, 6, 3, pools, False, ALEX), 2, 6, 7, 5
    )


class PublishedCrissCross(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(c, c // 8, 1), nn.Conv2d(c, c // 8, 1)
        self.value_conv = nn.Conv2d(c, c, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * torch.stack([cross(self, image) for image in x]) + x


def test_criss_cross():
    same(CrissCrossAttention(16), PublishedCrissCross(16), 2, 16, 3, 4)
    x = torch.randn(1, 16, 3, 4)
    assert torch.equal(CrissCrossAttention(16)(x), x)


@pytest.mark.parametrize("recurrence", [0, 1, 2])
def test_rcca(recurrence):
    def block(c: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(c, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]

    theirs = holder(
        conva=nn.Sequential(*block(32, 8)),
        cca=PublishedCrissCross(8),
        convb=nn.Sequential(*block(8, 8)),
        bottleneck=nn.Sequential(*block(40, 12), nn.Dropout2d(0.1), nn.Conv2d(12, 5, 1)),
    )
    ours = RCCAModule(32, 12, 5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(trained(theirs).state_dict())
    # InPlaceABNSync counts no batches: its checkpoints miss that buffer.
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "num_batches" not in k})
    x = torch.randn(2, 32, 4, 5)
    ours.eval(), theirs.eval()
    leaky = nn.LeakyReLU(0.01)
    y = leaky(theirs.conva(x))
    for _ in range(recurrence):
        y = theirs.cca(y)
    y = torch.cat([x, leaky(theirs.convb(y))], 1)
    expected = theirs.bottleneck[3](leaky(theirs.bottleneck[:2](y)))
    torch.testing.assert_close(ours(x, recurrence), expected, rtol=1e-4, atol=1e-4)
    if recurrence == 1:
        assert torch.equal(ours(x), ours(x, 1))


def published_fbkd(s: Tensor, t: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """The published loss of one level, image by image; ``student`` and ``teacher`` hold the layers."""
    adapted, error = student.adaptation_layers(s), 0
    for i in range(len(s)):
        mask = sum(softmax_mask(v[i].abs().mean(0), 0.5) for v in (s, t)) / 2
        error = error + (mask.detach() * (adapted[i] - t[i]) ** 2).sum()
    channel = student.channel_wise_adaptation(s.mean((2, 3))) - t.mean((2, 3))
    spatial = student.spatial_wise_adaptation(s.mean(1, keepdim=True)) - t.mean(1, keepdim=True)
    relation = student.non_local_adaptation(student.student_non_local(s)) - teacher.teacher_non_local(t)
    attention = 4e-3 * (channel.pow(2).sum().sqrt() + spatial.pow(2).sum().sqrt())
    return 7e-5 * error.sqrt() + attention + 7e-5 * relation.pow(2).sum().sqrt()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pools", [[], [2, 2], [2, 3]])
def test_fbkd(mode, pools):
    c, stride = 8, pools[1] if pools else 2
    settings = {"reduction": 4, "mode": mode, "sub_sample": bool(pools), "maxpool_stride": stride}

    def block() -> nn.Module:
        return Published(mode, c, 2, pools, True, mmcv_names(True))

    theirs_s = holder(
        channel_wise_adaptation=nn.Linear(c, c),
        spatial_wise_adaptation=nn.Conv2d(1, 1, 3, padding=1),
        adaptation_layers=nn.Conv2d(c, c, 1),
        student_non_local=block(),
        non_local_adaptation=nn.Conv2d(c, c, 1),
    )
    theirs_t = holder(teacher_non_local=block())
    ours_s, ours_t = FBKDStudentConnector(c, **settings), FBKDTeacherConnector(c, **settings)
    for ours, theirs in ((ours_s, theirs_s), (ours_t, theirs_t)):
        trained(theirs).double(), ours.double()
        assert set(ours.state_dict()) == set(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
    if pools:
        assert "teacher_non_local.g.0.0.conv.weight" in ours_t.state_dict()
    s, t = (torch.randn(2, c, 9, 13, dtype=torch.float64, requires_grad=True) for _ in range(2))
    s_tuple, t_tuple = ours_s(s), ours_t(t)
    shapes = [(2, 1, 9, 13), (2, c, 1, 1), (2, c), (2, 1, 9, 13), (2, c, 9, 13), (2, c, 9, 13)]
    assert [tuple(v.shape) for v in s_tuple] == shapes
    assert [tuple(v.shape) for v in t_tuple] == [shapes[i] for i in (0, 1, 3, 4, 5)]
    for found, own in zip(s_tuple[:2], (s.abs().mean(1), s.abs().mean((2, 3))), strict=True):
        for i in range(2):
            torch.testing.assert_close(found[i].flatten(), softmax_mask(own[i], 0.5).flatten())
    value, expected = FBKDLoss()(s_tuple, t_tuple), published_fbkd(s, t, theirs_s, theirs_t)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    wanted = [[s, t], [s, t]]
    for ours, theirs in ((ours_s, theirs_s), (ours_t, theirs_t)):
        for name, p in theirs.named_parameters():
            wanted[0].append(dict(ours.named_parameters())[name]), wanted[1].append(p)
    gradients = (torch.autograd.grad(v, w) for v, w in zip((value, expected), wanted, strict=True))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-10)


def test_fbkd_starts_as_published():
    student, teacher = (
        FBKDStudentConnector(8, sub_sample=True),
        FBKDTeacherConnector(8, init_cfg={"type": "x"}),
    )
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(teacher(x)[3], x) and teacher(x)[4] is x
    torch.testing.assert_close(student(x)[4], student.non_local_adaptation(x))
    assert torch.equal(student.forward_train(x)[5], student.adaptation_layers(x))
    named = list(inspect.signature(FBKDStudentConnector).parameters)
    assert named[:6] == ["in_channels", "reduction", "conv_cfg", "norm_cfg", "mode", "sub_sample"]
    assert named[6:11] == ["maxpool_stride", "zeros_init", "spatial_T", "channel_T", "init_cfg"]
