"""Op ``attention_mask``: pooled attention, masks and masked distance. Formulas: :mod:`kdfast.reference.attention_mask`.

Forward: one pass over both maps pools them and sums what the masked errors are made of, except by CUDA C++, where a
second pass sums the masked errors, as elsewhere where the student is adapted or gradients go through the masks (on the
CPU also where pooled attention is asked for); beside that lie only maps of one channel. Backward:
one pass over both maps, which writes the gradient with all its parts. Kept for it are a mask, and what L_AT compares as
a difference; both maps' pooled attention only where the caller or gradients through the masks need it. On the CPU,
where the student alone learns, the forward writes the gradient too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..kernels import attention_mask_cuda
from ..reference import attention_mask as reference
from ..reference._common import accumulator
from ..reference.attention_mask import Settings
from . import _early, _second
from .attention_mask_ops import op_of, with_gradient


class _AttentionMask(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        adapted: Tensor | None,
        settings: Settings,
        distances: bool,
        triton: bool,
    ):
        found = op_of("attention_mask", triton)(student, teacher, adapted, *settings)
        ctx.save_for_backward(student, teacher, adapted, *found[1:])
        ctx.settings, ctx.triton = settings, triton
        ctx.set_materialize_grads(False)
        loss, terms, spatial, channel, _, _ = found
        if not distances:
            return loss
        ctx.mark_non_differentiable(terms)
        return (loss, terms, spatial[-1], channel[-1]) if settings.pairs else (loss, terms)

    @staticmethod
    def backward(ctx: Any, grad_loss, _=None, grad_spatial=None, grad_channel=None):
        # Read once: a checkpoint unpacks them once.
        student, teacher, adapted, terms, *pairs = ctx.saved_tensors
        spatial, channel, spatial_mask, channel_mask = pairs
        s, needed = ctx.settings, ctx.needs_input_grad[:3]
        if _second.wanted():

            def call(*maps):
                loss, _, *pooled = reference.attention_mask(*maps, *s[:6], detach_mask=not s.through)
                return loss, *pooled

            maps, grads = (student, teacher, adapted), (grad_loss, grad_spatial, grad_channel)
            return *_second.gradients(call, maps, needed, grads), None, None, None
        op = op_of("attention_mask_backward", ctx.triton)
        x = student if adapted is None else adapted
        transfers = s.transfer_weight and grad_loss is not None
        pooled = (spatial, channel) if transfers else (None, None)
        masks = (spatial_mask, channel_mask) if grad_loss is not None else (None, None)
        results = [None, None, None]
        for side, v in enumerate((student, teacher)):
            if not needed[side]:
                continue
            other = (teacher if adapted is None else None) if side == 0 else x
            other = other if grad_loss is not None else None
            given = _pooled_gradients(ctx, side, terms, pairs, grad_loss, grad_spatial, grad_channel)
            results[side] = op(v, other, grad_loss, terms, *pooled, *masks, *given, side, s.signed)
        if needed[2]:
            other = teacher if grad_loss is not None else None
            nothing = (None, None)
            results[2] = op(adapted, other, grad_loss, terms, *nothing, *masks, *nothing, 0, s.signed)
        return *results, None, None, None


def _loss(student: Tensor, teacher: Tensor, *settings) -> Tensor:
    return reference.attention_mask(student, teacher, None, *settings)[0]


def _pooled_gradients(ctx: Any, side: int, terms: Tensor, pairs: list, grad_loss, grad_spatial, grad_channel):
    """Gradients [kinds, B, ...] of one map's means that the caller's use of them and the masks ask for, or None."""
    s = ctx.settings
    through = s.through and grad_loss is not None
    if not through and grad_spatial is None and grad_channel is None:
        return None, None
    results = []
    for pooled, mask, given, used in (
        (pairs[0], pairs[2], grad_spatial, True),
        (pairs[1], pairs[3], grad_channel, s.channel_mask),
    ):
        result = torch.zeros_like(pooled[:, side])
        if given is not None:
            result[-1] = given[side]
        if through and used:
            weights, error = mask.flatten(2)
            count = weights.shape[1]
            slope = error * (grad_loss * terms[1, 2] * count / (2 * s.temperature))
            if s.softmax_of_sum:
                softmax = weights / count
            else:
                softmax = torch.softmax(pooled[0, side].flatten(1) / s.temperature, 1) / 2
            # Only differences of slopes count. From the largest weight's nothing cancels where that weight is almost all.
            slope = slope - slope.gather(1, softmax.argmax(1, keepdim=True))
            scale = 1 if s.softmax_of_sum else 2
            part = softmax * (slope - scale * (softmax * slope).sum(1, keepdim=True))
            result[0] += part.view(result[0].shape)
        results.append(result)
    return results


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, signed: bool, triton: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.signed, ctx.triton = signed, triton
        return op_of("attention_pool", triton)(x, signed)

    @staticmethod
    def backward(ctx: Any, grad_spatial: Tensor, grad_channel: Tensor):
        (x,) = ctx.saved_tensors
        if _second.wanted():
            grads = (grad_spatial, grad_channel)
            found = _second.gradients(lambda x: reference.attention_pool(x, ctx.signed), (x,), (True,), grads)
            return *found, None, None
        nothing = (None,) * 7
        return (
            op_of("attention_mask_backward", ctx.triton)(
                x, *nothing, grad_spatial, grad_channel, 0, ctx.signed
            ),
            None,
            None,
        )


class _MaskedDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, spatial_mask: Tensor, channel_mask: Tensor, triton: bool
    ) -> Tensor:
        terms = op_of("masked_distance", triton)(x, y, spatial_mask, channel_mask)
        ctx.save_for_backward(x, y, spatial_mask, channel_mask, terms)
        ctx.triton = triton
        return terms[0, 2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, y, spatial_mask, channel_mask, terms = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if _second.wanted():

            def call(x, y):
                return (reference.masked_distance(x, y, spatial_mask, channel_mask),)

            return *_second.gradients(call, (x, y), needed, (grad,)), None, None, None
        masks = (spatial_mask[None], channel_mask[None])
        op, nothing = op_of("attention_mask_backward", ctx.triton), (None, None)
        results = [
            op(a, b, grad, terms, *nothing, *masks, *nothing, 0, False) if need else None
            for a, b, need in ((x, y, needed[0]), (y, x, needed[1]))
        ]
        return *results, None, None, None


def attention_pool(x: Tensor, *, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Means of |x| (and of x) over channels and pixels; see :func:`kdfast.reference.attention_mask.attention_pool`."""
    chosen = _choose("attention_pool", x)
    if chosen == "reference":
        return reference.attention_pool(x, signed)
    return _Pool.apply(x, signed, chosen == "triton")


def masked_distance(x: Tensor, y: Tensor, spatial_mask: Tensor, channel_mask: Tensor) -> Tensor:
    """(sum of M^s M^c (x - y)²)^½; see the reference. Differentiable in x and y; the masks are constants."""
    x, y = _one_dtype(x, y)
    masks = [m.detach().to(accumulator(x)).contiguous() for m in (spatial_mask, channel_mask)]
    chosen = _choose("masked_distance", x)
    if chosen == "reference":
        return reference.masked_distance(x, y, *masks)
    return _MaskedDistance.apply(x, y, *masks, chosen == "triton")


def attention_mask(
    student: Tensor,
    teacher: Tensor,
    adapted: Tensor | None = None,
    *,
    temperature: float,
    transfer_weight: float = 1.0,
    masked_weight: float = 1.0,
    softmax_of_sum: bool = False,
    channel_mask: bool = True,
    signed: bool = False,
    detach_mask: bool = True,
    pooled: bool = True,
    distances: bool = True,
) -> tuple[Tensor, ...]:
    """Loss of one level, with ``distances`` followed by them, with ``pooled`` too by both maps' attention.

    That attention is then kept for the backward. See :func:`kdfast.reference.attention_mask.attention_mask`.
    """
    student, teacher, adapted = _one_dtype(student, teacher, adapted)
    weights = (temperature, transfer_weight, masked_weight)
    if adapted is None and detach_mask and not (distances and pooled) and _early.wanted(student, teacher):
        settings = (*map(float, weights), softmax_of_sum, channel_mask, signed)
        found = _early.loss(with_gradient, _loss, student, (teacher,), settings, distances)
        return (found[0], found[1][0]) if distances else (found,)
    chosen = _choose("attention_mask", student)
    if chosen == "reference":
        flags = (softmax_of_sum, channel_mask, signed, detach_mask)
        found = reference.attention_mask(student, teacher, adapted, *weights, *flags)
        return found[: 1 + distances + 2 * (distances and pooled)]
    through = not detach_mask
    pairs = (distances and pooled) or through
    settings = Settings(*map(float, weights), softmax_of_sum, channel_mask, signed, through, pairs)
    found = _AttentionMask.apply(student, teacher, adapted, settings, distances, chosen == "triton")
    if not distances:
        return (found,)
    return found[0], found[1][0], *found[2 : 2 + 2 * pooled]


def _choose(op: str, x: Tensor) -> str:
    order = ("cuda", "triton") if attention_mask_cuda.is_small(x) else ("triton", "cuda")
    return backend.choose(
        op, x.device.type, order, lambda name: attention_mask_cuda.unsupported(x) if name == "cuda" else None
    )


def _one_dtype(*maps: Tensor | None) -> list[Tensor | None]:
    """Maps of one dtype, the widest; under autocast an adapted map is in half precision, the raw one may not be."""
    dtypes = [m.dtype for m in maps if m is not None]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        if dtype is not widest:
            widest = torch.promote_types(widest, dtype)
    return [m if m is None or m.dtype is widest else m.to(widest) for m in maps]
