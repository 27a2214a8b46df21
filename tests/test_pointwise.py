"""1x1 convolutions as products: values and gradients of the convolution, on maps large enough to be products."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from kdfast.losses import _pointwise
from kdfast.losses._pointwise import pointwise, pointwise_layer


@pytest.fixture(autouse=True)
def all_maps_are_large(monkeypatch):
    monkeypatch.setattr(_pointwise, "_LARGE", 1)


def products(call) -> list[str]:
    with torch.profiler.profile() as profile:
        call()
    return [e.key for e in profile.key_averages() if e.key in ("aten::baddbmm", "aten::conv2d")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 8, 1, 1), (3, 1, 4, 6)])
def test_is_the_convolution(shape, dtype):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(6, shape[1], 1, 1, dtype=dtype)
    inputs = [v.requires_grad_() for v in (x, weight, torch.randn(6, dtype=dtype))]
    assert products(lambda: pointwise(*inputs)) == ["aten::baddbmm"]
    grad = torch.randn(shape[0], 6, *shape[2:], dtype=dtype)
    found, expected = pointwise(*inputs), conv2d(*(v.double() for v in inputs))
    for a, b in zip(
        (found, *torch.autograd.grad(found, inputs, grad)),
        (expected, *torch.autograd.grad(expected, inputs, grad.double())),
        strict=True,
    ):
        torch.testing.assert_close(a, b.to(dtype))


def inputs_of(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = ((2, 5, 3, 4), (6, 5, 1, 1), (6,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def test_second_derivatives():
    assert torch.autograd.gradcheck(pointwise, inputs_of())
    assert torch.autograd.gradgradcheck(pointwise, inputs_of())


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("strided", [False, True])
def test_gradients_of_some(needed, strided):
    inputs = inputs_of()
    for v, need in zip(inputs, needed, strict=True):
        v.requires_grad_(bool(need))
    wanted = [v for v in inputs if v.requires_grad]
    grad = (
        torch.randn(2, 6, 4, 3).double().transpose(2, 3)
        if strided
        else torch.ones(()).double().expand(2, 6, 3, 4)
    )
    found = torch.autograd.grad(pointwise(*inputs), wanted, grad)
    torch.testing.assert_close(found, torch.autograd.grad(conv2d(*inputs), wanted, grad))


def test_transforms_and_compile_see_plain_products():
    x, weight, bias = (v.detach() for v in inputs_of())
    call = lambda w: pointwise(x, w, bias).square().sum()  # noqa: E731
    expected = torch.func.grad(lambda w: conv2d(x, w, bias).square().sum())(weight)
    torch.testing.assert_close(torch.func.grad(call)(weight), expected)
    torch.testing.assert_close(
        torch.vmap(lambda v: pointwise(v, weight, bias))(x[None])[0], conv2d(x, weight, bias)
    )
    compiled = torch.compile(pointwise, fullgraph=True, backend="aot_eager")
    inputs = inputs_of()
    found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(conv2d(*inputs).sum(), inputs))


def test_other_maps_are_convolved():
    layer = nn.Conv2d(5, 6, 1)
    x = torch.randn(2, 5, 7, 9)
    last = x.contiguous(memory_format=torch.channels_last)
    assert products(lambda: pointwise_layer(layer, last)) == ["aten::conv2d"]
    torch.testing.assert_close(pointwise_layer(layer, last), pointwise_layer(layer, x))
    assert pointwise_layer(layer, last).is_contiguous(memory_format=torch.channels_last)
    half = pointwise_layer(layer.bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16
    layer = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert pointwise_layer(layer, x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(4, 6, 1, padding=1),
        nn.Conv2d(4, 6, 1, groups=2),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Identity(),
    ],
)
def test_other_layers_are_called(layer):
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(pointwise_layer(layer, x), layer(x))


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_of_a_layer_run(register):
    layer, calls = nn.Conv2d(4, 6, 1), []
    getattr(layer, register)(lambda *args: calls.append(register))
    pointwise_layer(layer, torch.randn(2, 4, 5, 5, requires_grad=True)).sum().backward()
    assert calls == [register]
