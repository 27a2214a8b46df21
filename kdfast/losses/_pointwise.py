"""1x1 convolutions of large maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ..ops import _second
from ..ops.result import result

# Elements of the larger map from which a CPU's convolution loses more by bringing it into its own layout than products of this
# size do: 2x256x100x168 with 64 results takes 29 ms as a convolution, 8 as a product; 2x256x50x84 the same either way.
_LARGE = 1 << 22


def _products(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.baddbmm(bias[:, None], weight.flatten(1).expand(len(x), -1, -1), x.flatten(2), out=out)


class _Pointwise(torch.autograd.Function):
    """:func:`_products` with maps and their gradients in memory that is kept: large ones would be cleared at every step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        out = result(x, len(x), len(weight), *x.shape[2:])
        _products(x, weight, bias, out.flatten(2))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if _second.wanted():
            call = lambda *inputs: _products(*inputs).unflatten(2, x.shape[2:])  # noqa: E731
            return tuple(_second.gradients(call, (x, weight, bias), ctx.needs_input_grad, (grad,)))
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad, of_x, of_weight, of_bias = grad.flatten(2), None, None, None
        if need_x:
            of_x = result(x, *x.shape)
            torch.bmm(weight.flatten(1).T.expand(len(x), -1, -1), grad, out=of_x.flatten(2))
        if need_weight:
            of_weight = torch.bmm(grad, x.flatten(2).transpose(1, 2)).sum(0).view_as(weight)
        if need_bias:
            of_bias = grad.sum((0, 2))
        return of_x, of_weight, of_bias


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution of x [B, C, H, W] with weight [D, C, 1, 1] and bias [D]: [B, D, H, W]."""
    if (
        x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or x.numel() // x.shape[1] * max(weight.shape[:2]) < _LARGE
        or not x.is_contiguous()
        or torch.is_autocast_enabled("cpu")
    ):
        return conv2d(x, weight, bias)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or type(x) is not Tensor:
        return _products(x, weight, bias).unflatten(2, x.shape[2:])
    return _Pointwise.apply(x, weight, bias)


def pointwise_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """What ``layer`` makes of x; a plain 1x1 convolution, without hooks that a call would run, by :func:`pointwise`."""
    plain = (
        type(layer) is nn.Conv2d and layer.bias is not None and layer.weight.shape[1:] == (x.shape[1], 1, 1)
    )
    hooks = plain and (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
    if plain and not hooks and layer.padding in (0, (0, 0)) and layer.stride == (1, 1) and layer.groups == 1:
        return pointwise(x, layer.weight, layer.bias)
    return layer(x)


def in_its_type(layer: nn.Module, x: Tensor) -> Tensor:
    """What ``layer`` makes of attention x, which is float32 where a layer in half precision is not; x's type again."""
    return layer(x.to(layer.weight.dtype)).to(x.dtype)
