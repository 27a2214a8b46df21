"""Op ``projector``: batch norm over the batch, dropout, linear layer. Formulas: :mod:`kdfast.reference.projector`.

For embeddings so small that calls cost more than arithmetic; there is a kernel for the CPU only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference import projector as reference
from ..reference._common import autocast_device
from . import _second
from ._define import define

_PLAIN = (Tensor, torch.nn.Parameter)
WIDTH = 16  # of whose multiples the widths must be
MOST_PRODUCTS = 1 << 23  # multiply-adds; above, products are what the time goes into


def _fake(x, noise, gamma, beta, weight, bias, running_mean, running_var, momentum, eps):
    return x.new_empty((x.shape[0], weight.shape[0])), torch.empty_like(gamma), torch.empty_like(gamma)


def _fake_backward(grad, x, noise, gamma, beta, weight, mean, scale):
    return (*(torch.empty_like(v) for v in (x, gamma, beta, weight)), weight.new_empty((weight.shape[0],)))


def _reference(x, noise, gamma, beta, weight, bias, running_mean, running_var, momentum, eps):
    variance, mean = torch.var_mean(x, 0, correction=0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (len(x) / (len(x) - 1)), momentum)
    y = reference.projector(x, noise, gamma, beta, weight, bias, eps)
    return y, mean, (variance + eps).rsqrt()


def _reference_backward(grad, x, noise, gamma, beta, weight, mean, scale):
    with torch.autocast(autocast_device(x), enabled=False):
        unit = (x - mean) * scale
        z, grad_z = gamma * unit + beta, grad @ weight
        if noise is not None:
            z, grad_z = z * noise, grad_z * noise
        grad_beta, grad_gamma = grad_z.sum(0), (grad_z * unit).sum(0)
        grad_x = gamma * scale * (grad_z - (grad_beta + unit * grad_gamma) / len(x))
        return grad_x, grad_gamma, grad_beta, grad.T @ z, grad.sum(0)


define(
    "projector",
    "(Tensor x, Tensor? noise, Tensor gamma, Tensor beta, Tensor weight, Tensor bias, Tensor(a!) running_mean,"
    " Tensor(b!) running_var, float momentum, float eps) -> (Tensor y, Tensor mean, Tensor scale)",
    _fake,
    _reference,
    None,
)
define(
    "projector_backward",
    "(Tensor grad, Tensor x, Tensor? noise, Tensor gamma, Tensor beta, Tensor weight, Tensor mean, Tensor scale)"
    " -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
    _reference_backward,
    None,
)
_forward, _backward = torch.ops.kdfast.projector.default, torch.ops.kdfast.projector_backward.default


class _Projector(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, noise, gamma, beta, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, scale = _forward(
            x, noise, gamma, beta, weight, bias, running_mean, running_var, momentum, eps
        )
        ctx.save_for_backward(x, noise, gamma, beta, weight, bias, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, noise, gamma, beta, weight, bias, mean, scale = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5))
        if _second.wanted():
            found = _second.gradients(
                lambda x, gamma, beta, weight, bias: reference.projector(
                    x, noise, gamma, beta, weight, bias, ctx.eps
                ),
                (x, gamma, beta, weight, bias),
                needed,
                (grad,),
            )
        else:
            found = _backward(grad, x, noise, gamma, beta, weight, mean, scale)
            found = [v if need else None for v, need in zip(found, needed, strict=True)]
        return found[0], None, *found[1:], None, None, None, None


def supports(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, weight: Tensor, *others: Tensor | None
) -> bool:
    """Whether the kernel takes embeddings x [B, D] and these parameters, and is the faster one.

    Not under autocast, and not tensors of other classes or under a transform of torch.func, which an op would not see.
    """
    if not backend.is_cpu(x) or x.dim() != 2 or type(x) not in _PLAIN or torch.is_autocast_enabled("cpu"):
        return False
    for v in (x, gamma, beta, weight, *others):
        if v is None or v.dtype is not torch.float32 or type(v) not in _PLAIN:
            return False
        if not (v.is_cpu and v.is_contiguous()):
            return False
    (rows, width), out = x.shape, len(weight)
    if (
        width != weight.shape[1]
        or width % WIDTH
        or out % WIDTH
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    return rows > 1 and rows * width * out <= MOST_PRODUCTS


def projector(
    x: Tensor,
    noise: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """:func:`kdfast.reference.projector.projector` where :func:`supports`; updates the running statistics."""
    return _Projector.apply(x, noise, gamma, beta, weight, bias, running_mean, running_var, momentum, eps)
