"""Op ``gram``: comparisons of batched strided (centred) Grams. Formulas and views: :mod:`kdfast.reference.gram`.

On the CPU, where the student alone learns, the forward computes its gradient too: :func:`gram_distance`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..kernels import gram_cuda
from ..reference import gram as reference
from ..reference._common import accumulator
from ..reference.gram import COMPARISONS
from . import _early, _second
from ._define import define, kernel, new_gradients, reference_gradients

# Saved Grams may take this share of the inputs, or this many elements; above both the backward computes them again.
SAVED_SHARE = 0.1
SAVED_ELEMENTS = 1 << 20

# What gram_distance sees as a view: samples [N, ...], columns [N, K] with rows K, pixels [B, C, H, W] with rows H W.
LAYOUTS = ("samples", "columns", "pixels")


def workspace_size(x: Tensor, y: Tensor, inter: bool, feature_side: bool) -> int:
    """Elements per group of the full matrices that a backward needs: XX, YY and, where used, XY."""
    n, dx, dy = _rows(x), _features(x), _features(y)
    if feature_side:
        return dx * dx + dy * dy + dx * dy
    return (3 if inter else 2) * (n + int(inter)) ** 2


def saved_size(x: Tensor, y: Tensor, inter: bool, feature_side: bool) -> int:
    """Elements per group that the C++ forward saves on the CPU: the symmetric XX and YY as triangles.

    Where there is an XY, also two numbers for the mean of each row.
    """
    n, dx, dy = _rows(x), _features(x), _features(y)
    if feature_side:
        return dx * (dx + 1) // 2 + dy * (dy + 1) // 2 + dx * dy + 2 * (dx + dy)
    rows = n + int(inter)  # torch 2.11 fails where a bool is added to a symbolic size
    return rows * (rows + 1) + (rows * rows + 4 * n if inter else 0)


def _rows(v: Tensor) -> int:
    return v.shape[1] * v.shape[2]


def _features(v: Tensor) -> int:
    return v.shape[3] * v.shape[4] * v.shape[5]


def _fake(x, y, compare, centered, cosine, inter, feature_side, save, size=None):
    size = size or (workspace_size if x.device.type == "cuda" else saved_size)
    groups, terms, dtype = x.shape[0], 1 + inter, accumulator(x, y)
    saved = (groups, size(x, y, inter, feature_side)) if save else (0,)
    return (
        x.new_empty((terms, 3, groups), dtype=dtype),
        x.new_empty((terms, groups), dtype=dtype),
        x.new_empty(saved, dtype=dtype),
    )


def _fake_triton(*args):
    return _fake(*args, size=workspace_size)


def _fake_backward(grad_products, grad_distance, x, y, *arguments):
    return new_gradients((x, y), arguments[-2:])


def _reference(x, y, compare, centered, cosine, inter, feature_side, save):
    products, distance = reference.gram(x, y, compare, centered, cosine, inter, feature_side)
    saved = (x.shape[0], saved_size(x, y, inter, feature_side)) if save else (0,)
    return products, distance, products.new_zeros(saved)


def _reference_backward(grad_products, grad_distance, x, y, saved, *arguments):
    *flags, need_x, need_y = arguments
    grads = (grad_products, grad_distance)
    return reference_gradients(lambda x, y: reference.gram(x, y, *flags), (x, y), (need_x, need_y), grads)


define(
    "gram",
    "(Tensor x, Tensor y, int compare, bool centered, bool cosine, bool inter, bool feature_side, bool save)"
    " -> (Tensor products, Tensor distance, Tensor saved)",
    _fake,
    _reference,
    kernel("gram", "gram"),
    _fake_triton,
)
define(
    "gram_backward",
    "(Tensor grad_products, Tensor grad_distance, Tensor x, Tensor y, Tensor saved, int compare, bool centered,"
    " bool cosine, bool inter, bool feature_side, bool need_x, bool need_y) -> (Tensor grad_x, Tensor grad_y)",
    _fake_backward,
    _reference_backward,
    kernel("gram", "gram_backward"),
)


def view(x: Tensor, layout: str) -> Tensor:
    """The view [G, R1, R2, F1, F2, F3] of a tensor in one of :data:`LAYOUTS`; up to four axes nothing is copied."""
    if layout == "pixels":
        return x.permute(0, 2, 3, 1)[:, :, :, None, None]
    if layout == "columns":
        return x.T[None, :, None, None, None]
    if x.dim() > 4:
        x = x.flatten(3)
    return x[(None, slice(None), None) + (None,) * (4 - x.dim())]


def _fake_with_gradient(student, teacher, *arguments):
    return student.new_empty((), dtype=accumulator(student, teacher)), torch.empty_like(student)


def _weighted(student, teacher, layout, compare, centered, cosine, inter, feature_side, *weights):
    views = (view(v, LAYOUTS[layout]) for v in (student, teacher))
    _, distance = reference.gram(*views, compare, centered, cosine, inter, feature_side)
    means = distance.mean(1)
    return weights[0] * means[0] + weights[1] * means[1] if inter else weights[0] * means[0]


def _reference_with_gradient(student, *arguments):
    loss = _weighted(student, *arguments)
    one = torch.ones_like(loss)
    return loss, *reference_gradients(lambda s: _weighted(s, *arguments), (student,), (True,), (one,))


define(
    "gram_with_gradient",
    "(Tensor student, Tensor teacher, int layout, int compare, bool centered, bool cosine, bool inter,"
    " bool feature_side, float weight, float inter_weight) -> (Tensor loss, Tensor gradient)",
    _fake_with_gradient,
    _reference_with_gradient,
    None,
)

_with_gradient = torch.ops.kdfast.gram_with_gradient.default


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, flags: tuple, save: bool, triton: bool
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.kdfast.gram_triton if triton else torch.ops.kdfast.gram
        products, distance, saved = op(x, y, *flags, save)
        ctx.save_for_backward(x, y, saved)
        ctx.flags, ctx.triton = flags, triton
        return products, distance

    @staticmethod
    def backward(ctx: Any, grad_products: Tensor, grad_distance: Tensor):
        x, y, saved = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        if _second.wanted():
            grads = (grad_products, grad_distance)
            found = _second.gradients(
                lambda x, y: reference.gram(x, y, *ctx.flags), (x, y), (need_x, need_y), grads
            )
            return *found, None, None, None
        op = torch.ops.kdfast.gram_backward_triton if ctx.triton else torch.ops.kdfast.gram_backward
        grad_x, grad_y = op(grad_products, grad_distance, x, y, saved, *ctx.flags, need_x, need_y)
        return grad_x if need_x else None, grad_y if need_y else None, None, None, None


def gram(
    x: Tensor,
    y: Tensor,
    *,
    compare: str = "cka",
    centered: bool = True,
    cosine: bool = False,
    inter: bool = False,
    most_saved: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Products [T, 3, G] and distances [T, G] of the Grams of two views [G, R1, R2, F1, F2, F3].

    Differentiable in both views. See :func:`kdfast.reference.gram.gram` for the arguments and results; the cheaper
    side (N x N Grams or D x D products) is chosen here. Backward computes Grams again that take more than
    ``most_saved`` elements (None: more than a share of the views and than a few MB).
    """
    # U-centred Grams do not depend on the features' means, which would cost them digits.
    centered = centered or compare == "unbiased"
    n, dx, dy = _rows(x), _features(x), _features(y)
    swap = inter and n > dx  # the transposed problem has the smaller Grams; its terms are these exchanged
    if inter and x.shape[3:] != y.shape[3:]:
        x, y = (v.flatten(3)[..., None, None] for v in (x, y))
    if swap:
        x, y = transposed(x), transposed(y)
        n, dx, dy = dx, n, n
    feature_side = not inter and _feature_side_is_cheaper(n, dx, dy, compare, centered, cosine)
    flags = (COMPARISONS.index(compare), centered, cosine, inter, feature_side)
    chosen = backend.choose("gram", x.device.type, ("cuda", "triton"), partial(_unsupported, x, y, flags))
    if chosen == "reference":
        products, distance = reference.gram(x, y, *flags)
    else:
        matrices = (saved_size if chosen == "cpu" else workspace_size)(x, y, inter, feature_side)
        if most_saved is None:
            most_saved = max(SAVED_ELEMENTS, int(SAVED_SHARE * x.shape[0] * n * (dx + dy)))
        small = x.shape[0] * matrices <= most_saved
        products, distance = _Gram.apply(x, y, flags, small and not cosine, chosen == "triton")
    return (products.flip(0), distance.flip(0)) if swap else (products, distance)


def gram_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    layout: str = "samples",
    compare: str = "cka",
    centered: bool = True,
    cosine: bool = False,
    weight: float = 1.0,
    inter_weight: float | None = None,
) -> Tensor:
    """``weight`` times the mean over groups of the distance, plus ``inter_weight`` times that of the inter term.

    Args:
        layout: how the inputs become views (:data:`LAYOUTS`); ``"views"``: they are.
        inter_weight: None asks for no inter term. The rest: see :func:`gram`.
    """
    inter = inter_weight is not None
    centered = centered or compare == "unbiased"  # see gram()
    if _is_plain(student, teacher, layout, inter) and _early.wanted(student, teacher):
        weights = (weight, inter_weight or 0.0)
        if layout == "pixels":
            n, dx, dy = student.shape[2] * student.shape[3], student.shape[1], teacher.shape[1]
        elif layout == "columns":
            n, dx, dy = student.shape[1], student.shape[0], teacher.shape[0]
        else:
            n = student.shape[0]
            dx, dy = student.shape[1:].numel(), teacher.shape[1:].numel()
            if inter and n > dx:  # as gram() does
                layout, weights = "columns", weights[::-1]
        feature_side = not inter and _feature_side_is_cheaper(n, dx, dy, compare, centered, cosine)
        flags = (COMPARISONS.index(compare), centered, cosine, inter, feature_side)
        settings = (LAYOUTS.index(layout), *flags, *weights)
        return _early.loss(_with_gradient, _weighted, student, (teacher,), settings)
    if layout != "views":
        student, teacher = view(student, layout), view(teacher, layout)
    _, distance = gram(student, teacher, compare=compare, centered=centered, cosine=cosine, inter=inter)
    # Of one group: a launch less on a GPU than a mean, and than an index in the backward.
    mean = distance.reshape(-1) if distance.shape[1] == 1 else distance.mean(1)
    if not inter:
        return mean.reshape(()) if weight == 1 else weight * mean.reshape(())
    of_rows, of_columns = mean
    return weight * of_rows + inter_weight * of_columns


def _is_plain(student: Tensor, teacher: Tensor, layout: str, inter: bool) -> bool:
    """Whether both are views of the layout as they lie."""
    if layout == "views":
        return False
    return student.dim() == teacher.dim() == 2 or (not inter and student.dim() <= 4 and teacher.dim() <= 4)


def _unsupported(x: Tensor, y: Tensor, flags: tuple, name: str) -> str | None:
    compare, _, cosine, _, feature_side = flags
    return gram_cuda.unsupported(x, y, compare, cosine, feature_side) if name == "cuda" else None


def _feature_side_is_cheaper(n: int, dx: int, dy: int, compare: str, centered: bool, cosine: bool) -> bool:
    if compare not in ("cka", "difference") or (cosine and centered):
        return False
    # Multiply-adds: two symmetric D x D products and a full one against two symmetric N x N Grams.
    return n * (dx * (dx + 1) // 2 + dy * (dy + 1) // 2 + dx * dy) <= n * (n + 1) // 2 * (dx + dy)


def transposed(v: Tensor) -> Tensor:
    """Rows and features of a view exchanged: three feature axes fold into two row axes (a copy if they must)."""
    g, r1, r2, f1, f2, f3 = v.shape
    return v.permute(0, 3, 4, 5, 1, 2).reshape(g, f1 * f2, f3, r1, r2).unsqueeze(3)
