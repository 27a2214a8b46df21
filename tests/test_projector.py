"""Op projector and EmbeddingProjector, which is batch norm, dropout and a linear layer whatever computes it."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import same_for_any_threads
from early_checks import called
from torch import Tensor, nn

import kdfast
from kdfast import EmbeddingProjector
from kdfast.ops import projector as module
from kdfast.reference.projector import projector as reference

# Rows in no whole block, several blocks, and threads; widths of one vector and of an odd number of them.
SHAPES = [(2, 16, 16), (7, 48, 80), (49, 16, 128), (512, 16, 128), (130, 112, 48)]


def inputs(rows: int, width: int, out: int, mean: float = 0.0, noise: bool = False) -> list[Tensor | None]:
    """x, noise, gamma, beta, weight, bias."""
    x = torch.randn(rows, width) * (1 + torch.rand(width)) + mean
    mask = torch.empty(rows, width).bernoulli_(0.5).mul_(2) if noise else None
    return [x, mask, torch.rand(width) + 0.5, torch.randn(width), torch.randn(out, width), torch.randn(out)]


def statistics(width: int) -> tuple[Tensor, Tensor]:
    return torch.full((width,), 0.5), torch.full((width,), 2.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, mean, noise, backend):
    """Values, statistics and all gradients against float64; the backend "reference" is the op's own."""
    tensors, grad = inputs(*shape, mean, noise), torch.randn(shape[0], shape[2])
    running = statistics(shape[1])
    forward, backward = (
        (torch.ops.kdfast.projector, torch.ops.kdfast.projector_backward)
        if backend == "cpu"
        else (module._reference, module._reference_backward)
    )
    y, center, scale = forward(*tensors, *running, 0.2, 1e-3)
    found = (y, *backward(grad, *tensors[:5], center, scale), *running)

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        exact = [None if v is None else v.to(dtype).requires_grad_(v is not tensors[1]) for v in tensors]
        want = reference(*exact, 1e-3)
        x, wide = exact[0].detach(), statistics(shape[1])
        kept = (0.8 * wide[0] + 0.2 * x.mean(0), 0.8 * wide[1] + 0.2 * x.var(0))
        return want, *torch.autograd.grad(want, [exact[i] for i in (0, 2, 3, 4, 5)], grad.to(dtype)), *kept

    for name, got, exact, plain in zip(
        ("y", "x", "gamma", "beta", "weight", "bias", "running mean", "running var"),
        found,
        expected(torch.float64),
        expected(torch.float32),
        strict=True,
    ):
        size, error = exact.abs().max(), (got.double() - exact).abs().max()
        assert error <= 2 * (plain.double() - exact).abs().max() + 3e-6 * size, (
            name,
            float(error),
            float(size),
        )


def projectors(dropout: float, width: int = 16, out: int = 32) -> tuple[EmbeddingProjector, nn.Sequential]:
    """The projector, and the three layers that it stands for."""
    projector = EmbeddingProjector(width, out, dropout)
    for v in projector.parameters():
        nn.init.uniform_(v, 0.1, 1)
    return projector, nn.Sequential(*copy.deepcopy(list(projector)))


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Value, and gradients of the embedding and the parameters."""
    torch.manual_seed(3)  # of dropout
    own = x.detach().requires_grad_()
    y = net(own)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [own, *net.parameters()])]


def check_same(projector: nn.Module, layers: nn.Module, x: Tensor) -> None:
    for a, b in zip(step(projector, x), step(layers, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.float().abs().max()))
    for (name, a), b in zip(projector.state_dict().items(), layers.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def same(projector: nn.Module, layers: nn.Module, x: Tensor) -> list[str]:
    """Compares two steps, and returns the ops of kdfast that ran in another."""
    check_same(projector, layers, x)
    check_same(projector, layers, x + 1)
    return called(lambda: (step(projector, x), step(layers, x)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_module_is_its_layers(dropout):
    projector, layers = projectors(dropout)
    with kdfast.use_backend("cpu"):
        assert same(projector, layers, torch.randn(40, 16) + 3) == ["projector", "projector_backward"]
    with kdfast.use_backend("reference"):
        assert same(projector, layers, torch.randn(40, 16)) == []
    assert projector[0].num_batches_tracked == 6
    projector.eval(), layers.eval()
    assert same(projector, layers, torch.randn(40, 16)) == []


def _double(projector, layers):
    projector.double(), layers.double()


def _hook(projector, layers):
    for net in (projector, layers):
        net[0].register_forward_hook(lambda m, args, y: 2 * y)


def _weight_norm(projector, layers):
    for net in (projector, layers):
        nn.utils.parametrizations.weight_norm(net[2])


def _cumulative(projector, layers):
    projector[0].momentum = layers[0].momentum = None


def _frozen_statistics(projector, layers):
    projector[0].eval(), layers[0].eval()


def _other_layer(projector, layers):
    projector[1], layers[1] = nn.Identity(), nn.Identity()


def _own_forward(projector, layers):
    for net in (projector, layers):
        net[2].forward = lambda x, layer=net[2]: 3 * nn.functional.linear(x, layer.weight, layer.bias)


CHANGES = [_double, _hook, _weight_norm, _cumulative, _frozen_statistics, _other_layer, _own_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_layers_run_themselves(change):
    projector, layers = projectors(0.0)
    change(projector, layers)
    assert same(projector, layers, torch.randn(12, 16, dtype=projector[0].weight.dtype)) == []


def test_what_the_kernel_does_not_take():
    for width, out, rows in ((6, 32, 12), (16, 11, 12), (512, 512, 64)):
        projector, layers = projectors(0.0, width, out)
        assert same(projector, layers, torch.randn(rows, width)) == []
    projector, layers = projectors(0.0)
    assert same(projector, layers, torch.randn(16, 12).T) == []
    with torch.autocast("cpu"):
        assert same(projector, layers, torch.randn(12, 16)) == []
    with pytest.raises(ValueError, match="more than 1 value"):
        projector(torch.randn(1, 16))
    with pytest.raises(ValueError, match=r"input: need \[B, 16\], got \[12, 32\]"):
        projector(torch.randn(12, 32))


def test_only_needed_gradients_and_second_backward():
    projector, layers = projectors(0.0)
    x, found = torch.randn(20, 16), []
    for net in (projector, layers):
        net[0].weight.requires_grad_(False)
        own = x.clone().requires_grad_()
        wanted = [own, net[2].weight]
        first = torch.autograd.grad(net(own).pow(3).sum(), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(first[0].square().sum(), wanted)])
        net(x).sum().backward()  # the embedding needs no gradient
        assert net[0].weight.grad is None
        found[-1] += [v.grad for v in net.parameters() if v.grad is not None]
        with torch.no_grad():
            found[-1].append(net(x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_compiles_without_a_break():
    projector, layers = projectors(0.0)
    check_same(torch.compile(projector, fullgraph=True), layers, torch.randn(12, 16))


def test_result_does_not_depend_on_threads():
    tensors, grad = inputs(500, 48, 128, noise=True), torch.randn(500, 128)

    def compute():
        y, center, scale = torch.ops.kdfast.projector(*tensors, *statistics(48), 0.1, 1e-5)
        found = torch.ops.kdfast.projector_backward(grad, *tensors[:5], center, scale)
        return y, center, scale, *found

    same_for_any_threads(compute)


@pytest.mark.parametrize("noise", [False, True])
def test_opcheck(noise):
    tensors = inputs(5, 16, 32, noise=noise)
    torch.library.opcheck(torch.ops.kdfast.projector.default, (*tensors, *statistics(16), 0.1, 1e-5))
    center, scale = torch.randn(16), torch.rand(16)
    torch.library.opcheck(
        torch.ops.kdfast.projector_backward.default, (torch.randn(5, 32), *tensors[:5], center, scale)
    )


def test_wrong_calls_are_refused():
    tensors, running = inputs(5, 16, 32), statistics(16)
    call = torch.ops.kdfast.projector
    with pytest.raises(RuntimeError, match="two rows"):
        call(tensors[0][:1], *tensors[1:], *running, 0.1, 1e-5)
    with pytest.raises(RuntimeError, match="multiples of 16"):
        call(
            tensors[0][:, :8].contiguous(),
            *tensors[1:4],
            tensors[4][:, :8].contiguous(),
            tensors[5],
            *running,
            0.1,
            1e-5,
        )
    with pytest.raises(RuntimeError, match="bias"):
        call(*tensors[:5], tensors[5][:16], *running, 0.1, 1e-5)
    with pytest.raises(RuntimeError, match="float32"):
        call(tensors[0].double(), *tensors[1:], *running, 0.1, 1e-5)
