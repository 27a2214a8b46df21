"""NonLocalBlock and NonLocalLoss against their formulas (Zhang & Ma, Eq. 5) written out in float64, a query at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import NonLocalBlock, NonLocalLoss
from kdfast.losses.non_local import CRISS_CROSS, KINDS, relation_distance

EVERYWHERE = [k for k in KINDS if k not in CRISS_CROSS]


def apply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A 1x1 convolution of one image [C, H, W], in plain indices."""
    y = (weight.flatten(1)[:, :, None, None] * x).sum(1)
    return y if bias is None else y + bias[:, None, None]


def keys(x: Tensor, stride: int) -> Tensor:
    """Maxima of whole windows of one image [d, H, W], as rows [m, d]."""
    h, w = (n // stride for n in x.shape[1:])
    cells = [
        x[:, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].amax((1, 2))
        for i in range(h)
        for j in range(w)
    ]
    return torch.stack(cells)


def attend(block: NonLocalBlock, x: Tensor) -> Tensor:
    """y of one image [C, H, W], of the kinds that look everywhere."""
    named = dict(block.named_parameters())
    conv = lambda name: (  # noqa: E731
        apply(*(named.get(f"{name}.{p}", named.get(f"{name}.0.{p}")) for p in ("weight", "bias")), x)
    )
    kind, stride = block.kind, block.key_stride
    value = keys(conv("g"), stride)
    query = x if kind == "gaussian" else conv("theta")
    key = keys(x if kind == "gaussian" else conv("phi"), stride)
    rows = []
    for q in query.flatten(1).T:
        if kind == "concatenation":
            w = named["concat_project.0.weight"].flatten()
            f = torch.stack([(w * torch.cat([q, k])).sum().clamp_min(0) for k in key]) / len(key)
        elif kind == "dot_product":
            f = torch.stack([(q * k).sum() for k in key]) / len(key)
        else:
            e = torch.stack([(q * k).sum() for k in key])
            f = (e - e.max()).exp()
            f = f / f.sum()
        rows.append((f[:, None] * value).sum(0))
    return torch.stack(rows, 1).view(-1, *x.shape[1:])


def cross(block: NonLocalBlock, x: Tensor) -> Tensor:
    """Criss-cross attention of one image: each pixel looks at its row and column once."""
    q, k, v = (apply(c.weight, c.bias, x) for c in (block.query_conv, block.key_conv, block.value_conv))
    _, h, w = x.shape
    rows = []
    for i in range(h):
        for j in range(w):
            cells = [(i, n) for n in range(w)] + [(n, j) for n in range(h) if n != i]
            e = torch.stack([(q[:, i, j] * k[:, a, b]).sum() for a, b in cells])
            f = (e - e.max()).exp()
            f = f / f.sum()
            rows.append(sum(weight * v[:, a, b] for weight, (a, b) in zip(f, cells, strict=True)))
    return torch.stack(rows, 1).view_as(x)


def dense(block: NonLocalBlock, x: Tensor) -> Tensor:
    """z of a batch [B, C, H, W], batch norm in training."""
    if block.kind in CRISS_CROSS:
        for _ in range(2 if block.kind == "rcca" else 1):
            x = block.gamma * torch.stack([cross(block, image) for image in x]) + x
        return x
    conv, norm = block.W
    y = torch.stack([apply(conv.weight, conv.bias, attend(block, image)) for image in x])
    mean, spread = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    y = (y - mean) / (spread + norm.eps).sqrt()
    return x + y * norm.weight[:, None, None] + norm.bias[:, None, None]


def trained(module: nn.Module, seed: int = 3) -> nn.Module:
    """With parameters as after training: none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return module


def agree(got: Tensor, want: Tensor, inputs: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(
        got.double(), want, rtol=tolerance, atol=tolerance * want.detach().abs().max().item()
    )
    weights = torch.linspace(-1, 1, got.numel()).view(got.shape)
    found = torch.autograd.grad((got * weights).sum(), inputs)
    truth = torch.autograd.grad((want * weights.double()).sum(), exact, retain_graph=True)
    largest = max(t.abs().max() for t in truth)
    for f, t in zip(found, truth, strict=True):
        # biases that batch norm or softmax cancels have a gradient of 0, but for the rounding of what cancels
        size = t.abs().max()
        share = 0.1 if size < 1e-9 * largest else 0.02
        error = (f.double() - t).abs().max()
        assert error <= tolerance * max(size, share * largest), (f.shape, error)


CASES = [
    *((kind, stride, (2, 6, 5, 7)) for kind in EVERYWHERE for stride in (1, 2, 3)),
    *((kind, 1, (1, 4, 3, 2)) for kind in KINDS),
    *((kind, 1, (2, 8, 4, 5)) for kind in CRISS_CROSS),
    ("dot_product", 4, (3, 3, 4, 9)),
    ("criss_cross", 1, (2, 8, 1, 5)),
]


@pytest.mark.parametrize(("kind", "stride", "shape"), CASES)
def test_every_kind_is_dense_attention(kind, stride, shape):
    x = torch.randn(shape, requires_grad=True)
    block = trained(NonLocalBlock(shape[1], kind=kind, key_stride=stride))
    exact_block, exact_x = copy.deepcopy(block).double(), x.detach().double().requires_grad_()
    exact = [exact_x, *exact_block.parameters()]
    want = dense(exact_block, exact_x)
    agree(exact_block(exact_x), want, exact, exact, 1e-9)
    agree(block(x), want, [x, *block.parameters()], exact, 2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_double_precision(kind):
    x = torch.randn(2, 9, 8, 6, dtype=torch.float64).transpose(2, 3)[:, :8]
    block = trained(NonLocalBlock(8, kind=kind)).double()
    want = dense(block, x)
    for v in (x, x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(block(v), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_init_is_the_identity(kind):
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(NonLocalBlock(8, kind=kind)(x), x)
    assert torch.count_nonzero(NonLocalBlock(8, kind=kind, residual=False)(x)) == 0
    assert not torch.allclose(NonLocalBlock(8, kind=kind, zero_init=False)(x), x, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_without_residual(kind):
    x = torch.randn(2, 8, 5, 6)
    torch.manual_seed(1)
    with_x = trained(NonLocalBlock(8, kind=kind))
    torch.manual_seed(1)
    alone = trained(NonLocalBlock(8, kind=kind, residual=False))
    if kind == "rcca":
        first = trained(NonLocalBlock(8, kind="criss_cross"))
        first.load_state_dict(with_x.state_dict())
        torch.testing.assert_close(with_x(x), alone(x) + first(x), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(with_x(x), alone(x) + x)


def test_channels_inside():
    assert NonLocalBlock(10).theta.out_channels == 5
    assert NonLocalBlock(1).theta.out_channels == 1
    assert NonLocalBlock(16, kind="rcca").query_conv.out_channels == 2
    assert NonLocalBlock(16, kind="rcca").value_conv.out_channels == 16
    assert NonLocalBlock(16, 3, kind="criss_cross").key_conv.out_channels == 3
    assert "theta.weight" not in NonLocalBlock(8, kind="gaussian").state_dict()


class Largest(TorchDispatchMode):
    """Notes the most elements that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.elements = max(
            self.elements, *(v.numel() for v in pytree.tree_leaves(found) if torch.is_tensor(v)), 0
        )
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_of_queries_and_keys(kind):
    x = torch.randn(1, 8, 40, 48, requires_grad=True)
    block = NonLocalBlock(8, kind=kind, zero_init=False)
    with Largest() as seen:
        block(x).sum().backward()
    assert 8 * 40 * 48 <= seen.elements <= (40 * 48) ** 2 // 2


def naive_loss(loss: NonLocalLoss, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    value = 0
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        r_s, r_t = dense(loss.student[i], s), dense(loss.teacher[i], t)
        if isinstance(loss.adaptation[i], nn.Conv2d):
            r_s = torch.stack([apply(loss.adaptation[i].weight, loss.adaptation[i].bias, v) for v in r_s])
        value = value + ((r_s - r_t) ** 2).sum().sqrt()
    return loss.weight * value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapt", [True, False])
def test_loss_of_levels(kind, adapt):
    widths = [(4, 6), 6] if adapt else [6, 6]
    strides = 1 if kind in CRISS_CROSS else (3, 2)
    loss = trained(NonLocalLoss(widths, kind=kind, key_stride=strides, adapt=adapt, weight=0.7))
    first = 4 if adapt else 6
    student = [torch.randn(2, c, *s, requires_grad=True) for c, s in ((first, (6, 7)), (6, (3, 4)))]
    teacher = [torch.randn(2, 6, *s, requires_grad=True) for s in ((6, 7), (3, 4))]
    value = loss(student, teacher)
    assert value.dtype == torch.float32 and value.shape == ()
    exact_loss = copy.deepcopy(loss).double()
    exact = [[v.detach().double().requires_grad_() for v in side] for side in (student, teacher)]
    want = naive_loss(exact_loss, *exact)
    inputs = [*student, *teacher, *loss.parameters()]
    agree(value, want, inputs, [*exact[0], *exact[1], *exact_loss.parameters()], 5e-4)


def test_starts_as_the_distance_of_the_maps():
    student, teacher = torch.randn(2, 8, 9, 10, requires_grad=True), torch.randn(2, 8, 9, 10)
    for kind in KINDS:
        value = NonLocalLoss(8, kind=kind, adapt=False)(student, teacher)
        torch.testing.assert_close(value, (student - teacher).pow(2).sum().sqrt())
        (found,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(found, ((student - teacher) / value).detach())


def test_the_teachers_block_learns_and_its_map_does_not():
    loss = NonLocalLoss(8)
    teacher = torch.randn(2, 8, 9, 10)
    loss(torch.randn(2, 8, 9, 10, requires_grad=True), teacher).backward()
    assert loss.teacher[0].W[1].weight.grad.abs().max() > 0
    assert teacher.grad is None
    trained(loss)(torch.randn(2, 8, 9, 10), teacher).backward()
    for name, p in loss.named_parameters():
        assert p.grad is not None, name


def test_equal_maps_have_a_finite_gradient():
    x = torch.randn(2, 8, 9, 10, requires_grad=True)
    loss = NonLocalLoss(8, adapt=False)
    value = loss(x, x.detach().clone())
    value.backward()
    assert value.item() == 0
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in loss.parameters())
    assert relation_distance(x, x.detach()).item() == 0


def test_published_defaults():
    loss = NonLocalLoss([256] * 5)
    found = [(b.inter_channels, b.key_stride) for b in loss.student]
    assert found == [(64, 8), (64, 4), (128, 2), (128, 2), (128, 2)]
    assert found == [(b.inter_channels, b.key_stride) for b in loss.teacher]
    crossing = NonLocalLoss([(64, 128)] * 2, kind="rcca")
    assert [b.inter_channels for b in crossing.student] == [8, 8]
    assert [b.inter_channels for b in crossing.teacher] == [16, 16]
    other = NonLocalLoss([8, 8], key_stride=[2, 1], inter_channels=3)
    assert [(b.inter_channels, b.key_stride) for b in other.teacher] == [(3, 2), (3, 1)]
    assert NonLocalLoss((4, 8)).adaptation[0].out_channels == 8


@pytest.mark.parametrize("kind", ["embedded_gaussian", "concatenation", "rcca"])
def test_compiles_into_one_graph(kind):
    loss = trained(NonLocalLoss(8, kind=kind, key_stride=1 if kind in CRISS_CROSS else 2))
    student, teacher = torch.randn(2, 8, 9, 6, requires_grad=True), torch.randn(2, 8, 9, 6)
    torch._dynamo.reset()
    found = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = call(student, teacher)
        found.append([value.detach(), *torch.autograd.grad(value, [student, *loss.parameters()])])
    largest = max(g.abs().max().item() for g in found[0][1:])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    torch.manual_seed(1)
    loss = NonLocalLoss(8, kind=kind)
    student, teacher = torch.randn(2, 8, 9, 8, requires_grad=True), torch.randn(2, 8, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student, teacher), rtol=2e-2, atol=0)
    value.backward()
    assert student.grad.isfinite().all() and all(p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree(kind):
    loss = trained(NonLocalLoss(8, kind=kind, key_stride=1))
    student, teacher = torch.randn(2, 8, 9, 8, requires_grad=True), torch.randn(2, 8, 9, 8)
    with kdfast.use_backend("reference"):
        want = loss(student, teacher)
        (truth,) = torch.autograd.grad(want, student)
    value = loss(student, teacher)
    torch.testing.assert_close(value, want, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], truth, rtol=1e-3, atol=1e-4)


def x(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NonLocalBlock(8, kind="dot"), ValueError, "kind: got 'dot'"),
        (lambda: NonLocalBlock(8, key_stride=0), ValueError, "key_stride: .* an integer above 0; got 0"),
        (lambda: NonLocalBlock(8, kind="rcca", key_stride=2), ValueError, "key_stride: kind 'rcca' needs 1"),
        (
            lambda: NonLocalBlock(8, key_stride=4)(x(2, 8, 3, 9)),
            ValueError,
            r"at least 4 x 4.*\[2, 8, 3, 9\]",
        ),
        (lambda: NonLocalBlock(8)(x(2, 7, 3, 9)), ValueError, r"x: need a map \[B, 8, H, W\]"),
        (lambda: NonLocalBlock(8)(x(8, 3, 9)), ValueError, "x: need a map"),
        (lambda: NonLocalBlock(8)(x(2, 8, 3, 9).int()), TypeError, "x: need a floating point"),
        (lambda: NonLocalLoss((4, 8), adapt=False), ValueError, "adapt: student and teacher of different"),
        (
            lambda: NonLocalLoss([8, 8], key_stride=[2]),
            ValueError,
            "key_stride: need an int or one per level",
        ),
        (lambda: NonLocalLoss("eight"), ValueError, "channels: need an int"),
        (lambda: NonLocalLoss(8)([x(1, 8, 9, 9)] * 2, [x(1, 8, 9, 9)] * 2), ValueError, "1 levels, got 2"),
        (lambda: NonLocalLoss(8)(x(1, 8, 9, 9), x(1, 8, 9, 8)), ValueError, "one size H x W"),
        (lambda: NonLocalLoss(8)(x(1, 8, 9, 9), [x(1, 8, 9, 9)]), TypeError, "must both be"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_copies_and_print():
    loss = NonLocalLoss([4, (4, 6)], key_stride=1)
    other = NonLocalLoss([4, (4, 6)], key_stride=1)
    other.load_state_dict(loss.state_dict())
    pairs = ([x(1, 4, 3, 3), x(1, 4, 2, 2)], [x(1, 4, 3, 3), x(1, 6, 2, 2)])
    assert torch.equal(other(*pairs), copy.deepcopy(loss)(*pairs))
    assert "kind='dot_product'" in repr(loss)
    assert NonLocalLoss(4, key_stride=1, weight=0)(pairs[0][0], pairs[1][0]).item() == 0
