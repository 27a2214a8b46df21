"""The ops behind ``attention_mask``: schemas, fakes and references. What they compute: :mod:`kdfast.ops.attention_mask`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import attention_mask as reference
from ..reference._common import accumulator
from ..reference.attention_mask import Settings
from ._define import define, kernel


def _fake_pool(x, signed):
    b, c, h, w = x.shape
    dtype = accumulator(x)
    return x.new_empty((1 + signed, b, 1, h, w), dtype=dtype), x.new_empty((1 + signed, b, c), dtype=dtype)


def _fake(student, teacher, adapted, *settings):
    b, c, h, w = student.shape
    settings, dtype = Settings(*settings), accumulator(student, teacher)
    saved = 1 + settings.through
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty((2, 3), dtype=dtype),
        student.new_empty((*settings.kept, b, 1, h, w), dtype=dtype),
        student.new_empty((*settings.kept, b, c), dtype=dtype),
        student.new_empty((saved, b, 1, h, w), dtype=dtype),
        student.new_empty((saved, b, c), dtype=dtype),
    )


def _fake_with_gradient(student, teacher, *settings):
    dtype = accumulator(student, teacher)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty((2, 3), dtype=dtype),
        torch.empty_like(student),
    )


def _fake_distance(x, y, spatial_mask, channel_mask):
    return x.new_empty((2, 3), dtype=accumulator(x, y))


def _fake_backward(x, *args):
    return torch.empty_like(x)


def _factors(weight: float, distance: Tensor) -> Tensor:
    return torch.where(distance > 0, weight / distance, 0)


def _reference(student, teacher, adapted, *settings):
    s = Settings(*settings)
    dtype = accumulator(student, teacher)
    pooled = [[p.to(dtype) for p in reference.attention_pool(v, s.signed)] for v in (student, teacher)]
    spatial, channel = (torch.stack([pooled[0][i], pooled[1][i]], 1) for i in (0, 1))
    spatial_mask = reference.mask(*spatial[0], s.temperature, s.softmax_of_sum)[None]
    channel_mask = reference.mask(*channel[0], s.temperature, s.softmax_of_sum)[None]
    if not s.channel_mask:
        channel_mask = torch.ones_like(channel_mask)
    x = student if adapted is None else adapted
    masked = reference.masked_distance(x, teacher, spatial_mask[0], channel_mask[0])
    transfer = torch.stack([torch.linalg.vector_norm(v[-1, 0] - v[-1, 1]) for v in (spatial, channel)])
    transfer = transfer if s.transfer_weight else torch.zeros_like(transfer)
    if s.through:
        square = (x.to(dtype) - teacher.to(dtype)).square()
        spatial_mask, channel_mask = (
            torch.cat(
                [spatial_mask, (channel_mask[0, :, :, None, None] * square).sum(1, keepdim=True)[None]]
            ),
            torch.cat([channel_mask, (spatial_mask[0] * square).sum((2, 3))[None]]),
        )
    distances = torch.cat([transfer, masked[None]])
    factors = torch.cat([_factors(s.transfer_weight, transfer), _factors(s.masked_weight, masked)[None]])
    loss = s.transfer_weight * transfer.sum() + s.masked_weight * masked
    spatial, channel = (v[-s.kept[0] :] for v in (spatial, channel))
    if not s.pairs:
        spatial, channel = (v[:, :1] - v[:, 1:] for v in (spatial, channel))
    spatial, channel = spatial.clone(), channel.clone()  # outputs of an op share no memory
    return loss, torch.stack([distances, factors]), spatial, channel, spatial_mask, channel_mask


def _reference_distance(x, y, spatial_mask, channel_mask):
    distance = reference.masked_distance(x, y, spatial_mask, channel_mask)
    terms = distance.new_zeros(2, 3)
    terms[0, 2], terms[1, 2] = distance, _factors(1.0, distance)
    return terms


def _reference_backward(
    x, other, grad_loss, terms, spatial, channel, spatial_mask, channel_mask, grad_spatial, grad_channel, side, signed
):  # fmt: skip
    b, c, h, w = x.shape
    dtype = accumulator(x) if other is None else accumulator(x, other)
    value = x.to(dtype)
    gradient = torch.zeros_like(value)
    parts = []  # (gradient of the means over channels, of those over pixels, means of |x|?)
    if grad_spatial is not None:
        kinds = (True, False)[-len(grad_spatial) :] if signed else (True,)
        parts += zip(grad_spatial, grad_channel, kinds, strict=True)
    if spatial is not None:
        factors = grad_loss * terms[1]
        s, t = (factors[i] * _difference(v[-1], side) for i, v in enumerate((spatial, channel)))
        parts.append((s, t, not signed))
    for s, t, absolute in parts:
        part = s / c + (t / (h * w))[:, :, None, None]
        gradient += part * value.sign() if absolute else part
    if other is not None:
        weight = grad_loss * terms[1, 2] * spatial_mask[0] * channel_mask[0][:, :, None, None]
        gradient += weight * (value - other.to(dtype))
    return torch.empty_like(x).copy_(gradient)


def _reference_with_gradient(student, teacher, *settings):
    loss, terms, *small = _reference(student, teacher, None, *settings, False, False)
    arguments = (torch.ones_like(loss), terms, *small, None, None, 0, settings[-1])
    return loss, terms, _reference_backward(student, teacher, *arguments)


def _difference(pooled: Tensor, side: int) -> Tensor:
    """Own minus the other map's attention, of both, or of student minus teacher."""
    difference = pooled[0] - pooled[1] if len(pooled) == 2 else pooled[0]
    return -difference if side else difference


define(
    "attention_pool",
    "(Tensor x, bool signed) -> (Tensor spatial, Tensor channel)",
    _fake_pool,
    reference.attention_pool,
    kernel("attention_mask", "attention_pool"),
)
define(
    "attention_mask",
    "(Tensor student, Tensor teacher, Tensor? adapted, float temperature, float transfer_weight, float masked_weight,"
    " bool softmax_of_sum, bool channel_mask, bool signed, bool through, bool pairs)"
    " -> (Tensor loss, Tensor terms, Tensor spatial, Tensor channel, Tensor spatial_mask, Tensor channel_mask)",
    _fake,
    _reference,
    kernel("attention_mask", "attention_mask"),
)
define(
    "attention_mask_with_gradient",
    "(Tensor student, Tensor teacher, float temperature, float transfer_weight, float masked_weight,"
    " bool softmax_of_sum, bool channel_mask, bool signed) -> (Tensor loss, Tensor terms, Tensor gradient)",
    _fake_with_gradient,
    _reference_with_gradient,
    None,
)
define(
    "masked_distance",
    "(Tensor x, Tensor y, Tensor spatial_mask, Tensor channel_mask) -> Tensor terms",
    _fake_distance,
    _reference_distance,
    kernel("attention_mask", "masked_distance"),
)
# The gradient for x: of L_AM where `other` is given, of L_AT where `spatial` and `channel` are (their last kind; x is
# row `side`, or, of a difference, its first or second part), and of means where their gradients are: `signed` says that
# the last kind is that of x, not of |x|.
define(
    "attention_mask_backward",
    "(Tensor x, Tensor? other, Tensor? grad_loss, Tensor? terms, Tensor? spatial, Tensor? channel,"
    " Tensor? spatial_mask, Tensor? channel_mask, Tensor? grad_spatial, Tensor? grad_channel, int side,"
    " bool signed) -> Tensor",
    _fake_backward,
    _reference_backward,
    kernel("attention_mask", "attention_mask_backward"),
)


_ops = {
    (name, triton): getattr(torch.ops.kdfast, f"{name}_triton" if triton else name).default
    for name in ("attention_pool", "attention_mask", "masked_distance", "attention_mask_backward")
    for triton in (False, True)
}

with_gradient = torch.ops.kdfast.attention_mask_with_gradient.default


def op_of(name: str, triton: bool):
    return _ops[name, triton]
