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
    x,
    other,
    grad_loss,
    terms,
    spatial,
    channel,
    spatial_mask,
    channel_mask,
    grad_spatial,
    grad_channel,
    side,
    signed,
):
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


_OPS = {
    (name, triton): getattr(torch.ops.kdfast, f"{name}_triton" if triton else name).default
    for name in ("attention_pool", "attention_mask", "masked_distance", "attention_mask_backward")
    for triton in (False, True)
}

_with_gradient = torch.ops.kdfast.attention_mask_with_gradient.default


def _op(name: str, triton: bool):
    return _OPS[name, triton]


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
        found = _op("attention_mask", triton)(student, teacher, adapted, *settings)
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
        student, teacher, adapted, terms, spatial, channel, spatial_mask, channel_mask = ctx.saved_tensors
        s, needed = ctx.settings, ctx.needs_input_grad[:3]
        if _second.wanted():

            def call(*maps):
                loss, _, *pooled = reference.attention_mask(*maps, *s[:6], detach_mask=not s.through)
                return loss, *pooled

            maps, grads = (student, teacher, adapted), (grad_loss, grad_spatial, grad_channel)
            return *_second.gradients(call, maps, needed, grads), None, None, None
        op = _op("attention_mask_backward", ctx.triton)
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
            given = _pooled_gradients(ctx, side, grad_loss, grad_spatial, grad_channel)
            results[side] = op(v, other, grad_loss, terms, *pooled, *masks, *given, side, s.signed)
        if needed[2]:
            other = teacher if grad_loss is not None else None
            nothing = (None, None)
            results[2] = op(adapted, other, grad_loss, terms, *nothing, *masks, *nothing, 0, s.signed)
        return *results, None, None, None


def _loss(student: Tensor, teacher: Tensor, *settings) -> Tensor:
    return reference.attention_mask(student, teacher, None, *settings)[0]


def _pooled_gradients(ctx: Any, side: int, grad_loss, grad_spatial, grad_channel):
    """Gradients [kinds, B, ...] of one map's means that the caller's use of them and the masks ask for, or None."""
    s = ctx.settings
    through = s.through and grad_loss is not None
    if not through and grad_spatial is None and grad_channel is None:
        return None, None
    _, _, _, terms, *pairs = ctx.saved_tensors
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
        return _op("attention_pool", triton)(x, signed)

    @staticmethod
    def backward(ctx: Any, grad_spatial: Tensor, grad_channel: Tensor):
        (x,) = ctx.saved_tensors
        if _second.wanted():
            grads = (grad_spatial, grad_channel)
            found = _second.gradients(lambda x: reference.attention_pool(x, ctx.signed), (x,), (True,), grads)
            return *found, None, None
        nothing = (None,) * 7
        return (
            _op("attention_mask_backward", ctx.triton)(
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
        terms = _op("masked_distance", triton)(x, y, spatial_mask, channel_mask)
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
        op, nothing = _op("attention_mask_backward", ctx.triton), (None, None)
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
        found = _early.loss(_with_gradient, _loss, student, (teacher,), settings, distances)
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
