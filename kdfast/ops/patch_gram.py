"""Op ``patch_gram``: the gram op on the patches of resized maps, without the resized maps in memory.

Formulas and groups: :mod:`kdfast.reference.patch_gram`. On the CPU one call resizes, cuts and compares a few groups at
a time; on a GPU the maps go through the gram op's kernels in blocks of groups. Backward resizes again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..reference import patch_gram as reference
from ..reference._common import accumulator
from ..reference.gram import COMPARISONS
from ..reference.gram import gram as reference_gram
from ..reference.patch_gram import AVERAGES, Grid
from . import _second
from ._define import define, new_gradients, reference_gradients
from .gram import _feature_side_is_cheaper as feature_side_is_cheaper
from .gram import gram, saved_size, workspace_size

# Saved Grams may take this share of a resized map, or of both maps where neither is resized, in bytes. With the tiles
# beside them, a call then stays below one resized copy, or 10 % of the maps.
SAVED_SHARE_RESIZED = 0.55
SAVED_SHARE_GPU = 0.55
SAVED_SHARE = 0.04
# With both terms, tiles and Grams of threads take that much of this many bytes; where less is left, a little is saved.
UNSAVED_BYTES, LEAST_SAVED_SHARE = 12 << 20, 0.01
SAVED_SHARE_SPATIAL = 0.02  # where a block is a row of pixels: 1 / patch_h of the groups
# On a GPU a block of groups has resized copies of at most this size, of each map: few launches count more there.
GPU_BLOCK_BYTES = 256 << 20
MANY_GROUPS = 8  # from here on the C++ forward can save the Grams of some of the groups

SPATIAL = AVERAGES.index("spatial")
BATCH = AVERAGES.index("batch")


class _Matrices(NamedTuple):
    """Stands for a view in computations on shapes."""

    shape: tuple[int, ...]


def _matrices(x: Tensor, grid: Grid, transposed: bool) -> _Matrices:
    groups, rows, features = grid.matrices(x)
    rows, features = (features, rows) if transposed else (rows, features)
    return _Matrices((groups, rows, 1, 1, 1, features))


def _fake(x, y, *arguments, size=saved_size):
    grid, (_, _, _, inter, feature_side, turn, saved_groups) = Grid(*arguments[:6]), arguments[6:]
    mx, my = (_matrices(v, grid, turn) for v in (x, y))
    groups, terms, dtype = mx.shape[0], 1 + inter, accumulator(x, y)
    saved = (saved_groups, size(mx, my, inter, feature_side)) if saved_groups else (0,)
    return (
        x.new_empty((terms, 3, groups), dtype=dtype),
        x.new_empty((terms, groups), dtype=dtype),
        x.new_empty(saved, dtype=dtype),
    )


def _fake_triton(*arguments):
    return _fake(*arguments, size=workspace_size)


def _fake_backward(grad_products, grad_distance, x, y, *arguments):
    return new_gradients((x, y), arguments[-2:])


def _reference(x, y, *arguments):
    products, distance = reference.patch_gram(x, y, Grid(*arguments[:6]), *arguments[6:-1])
    return products, distance, _fake(x, y, *arguments)[2].zero_()


def _reference_backward(grad_products, grad_distance, x, y, saved, *arguments):
    grid, flags, needed = Grid(*arguments[:6]), arguments[6:-2], arguments[-2:]
    grads = (grad_products, grad_distance)
    return reference_gradients(lambda x, y: reference.patch_gram(x, y, grid, *flags), (x, y), needed, grads)


def _blocks(x: Tensor, y: Tensor, grid: Grid) -> list[slice]:
    """Slices of the channels (batch average: of the images) that are resized at a time; all of them for spatial."""
    axis = 0 if grid.average == BATCH else 1
    count = x.shape[axis]
    pixels = grid.size[0] * grid.size[1]
    size = max(v.shape[0] * v.shape[1] for v in (x, y)) * pixels * accumulator(x, y).itemsize
    if grid.average == SPATIAL or size <= GPU_BLOCK_BYTES:
        return [slice(None)]
    step = max(1, count * GPU_BLOCK_BYTES // size)
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]


def _part(x: Tensor, grid: Grid, block: slice) -> Tensor:
    return x if block == slice(None) else x[block] if grid.average == BATCH else x[:, block]


def _view(matrices: Tensor, transposed: bool) -> Tensor:
    """Patch matrices [G, N, D] as a view for the gram op."""
    return (matrices.mT if transposed else matrices)[:, :, None, None, None]


def _triton(x, y, *arguments):
    from ..kernels.gram import gram
    from ..kernels.resize import patch_matrices

    grid, (*flags, transposed, saved_groups) = Grid(*arguments[:6]), arguments[6:]
    parts = []
    for block in _blocks(x, y, grid):
        found = patch_matrices([_part(v, grid, block) for v in (x, y)], grid)
        parts.append(gram(*(_view(m, transposed) for m in found), *flags, saved_groups > 0))
    if len(parts) == 1:
        return parts[0]
    products, distance, saved = zip(*parts, strict=True)
    return torch.cat(products, 2), torch.cat(distance, 1), torch.cat(saved)


def _triton_backward(grad_products, grad_distance, x, y, saved, *arguments):
    from ..kernels.gram import gram_backward
    from ..kernels.resize import map_gradients, patch_matrices

    grid, (*flags, transposed, need_x, need_y) = Grid(*arguments[:6]), arguments[6:]
    needed, gradients = (need_x, need_y), new_gradients((x, y), (need_x, need_y))
    inter, feature_side = flags[3:]
    own = saved.numel() > 0 and not (
        inter or feature_side
    )  # each side's gradient takes that side and saved Grams
    for block in _blocks(x, y, grid):
        sides = [_part(v, grid, block) for v in (x, y)]
        used = [not own or need for need in needed]
        found = iter(patch_matrices([v for v, use in zip(sides, used, strict=True) if use], grid))
        views = [
            _view(next(found) if use else _unread(v, grid), transposed)
            for v, use in zip(sides, used, strict=True)
        ]
        groups = slice(None) if grid.average == SPATIAL else block
        found = gram_backward(
            grad_products[:, :, groups], grad_distance[:, groups], *views,
            saved[groups] if saved.numel() else saved, *flags, *needed,
        )  # fmt: skip
        map_gradients(
            [_matrices_of(f, transposed) for f, need in zip(found, needed, strict=True) if need],
            [_part(g, grid, block) for g, need in zip(gradients, needed, strict=True) if need],
            grid,
        )
    return gradients


def _unread(x: Tensor, grid: Grid) -> Tensor:
    """Stands for patch matrices [G, N, D] of which only the shape is used: one element."""
    return x.new_empty(1, dtype=reference.resized_dtype(x, grid)).expand(grid.matrices(x))


def _matrices_of(view: Tensor, transposed: bool) -> Tensor:
    """Patch matrices [G, N, D] of a view of them: the inverse of :func:`_view`."""
    matrices = view[:, :, 0, 0, 0]
    return matrices.mT if transposed else matrices


_GRID = "int patch_h, int patch_w, int rows, int columns, bool bilinear, int average, "
_FLAGS = "int compare, bool centered, bool cosine, bool inter, bool feature_side, bool transposed, "

define(
    "patch_gram",
    f"(Tensor x, Tensor y, {_GRID}{_FLAGS}int saved_groups) -> (Tensor products, Tensor distance, Tensor saved)",
    _fake,
    _reference,
    _triton,
    _fake_triton,
)
define(
    "patch_gram_backward",
    f"(Tensor grad_products, Tensor grad_distance, Tensor x, Tensor y, Tensor saved, {_GRID}{_FLAGS}"
    "bool need_x, bool need_y) -> (Tensor grad_x, Tensor grad_y)",
    _fake_backward,
    _reference_backward,
    _triton_backward,
)


class _PatchGram(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, grid: Grid, flags: tuple, saved_groups: int, triton: bool
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.kdfast.patch_gram_triton if triton else torch.ops.kdfast.patch_gram
        products, distance, saved = op(x, y, *grid, *flags, saved_groups)
        ctx.save_for_backward(x, y, saved)
        ctx.grid, ctx.flags, ctx.triton = grid, flags, triton
        return products, distance

    @staticmethod
    def backward(ctx: Any, grad_products: Tensor, grad_distance: Tensor):
        x, y, saved = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        unused = (None,) * 4
        if _second.wanted():
            grads = (grad_products, grad_distance)
            found = _second.gradients(
                lambda x, y: reference.patch_gram(x, y, ctx.grid, *ctx.flags), (x, y), (need_x, need_y), grads
            )
            return *found, *unused
        ops = torch.ops.kdfast
        op: Callable = ops.patch_gram_backward_triton if ctx.triton else ops.patch_gram_backward
        grad_x, grad_y = op(grad_products, grad_distance, x, y, saved, *ctx.grid, *ctx.flags, need_x, need_y)
        return grad_x if need_x else None, grad_y if need_y else None, *unused


def row_inter_distance(x: Tensor, y: Tensor, centered: bool) -> Tensor:
    """Distances [G] of the features of two views [G, R1, R2, F1, F2, F3] by ``cka_row``, without a D x D Gram.

    The dual of D x D Grams: products of N x N entries weighted by the norms of the features. In plain PyTorch on every
    backend (the op's feature side has no ``cka_row``); autograd keeps a few copies of the views.
    """
    x, y = (v.flatten(3).flatten(1, 2).mT[:, :, None, None, None] for v in (x, y))  # [G, D, 1, 1, 1, N]
    compare = COMPARISONS.index("cka_row")
    return reference_gram(x, y, compare, centered, feature_side=True)[1][0]


def _reads_planes(x: Tensor, grid: Grid) -> bool:
    """Whether the C++ kernels read one plane after the other: not where channels are neighbours in memory."""
    return grid.average != SPATIAL and (x.stride(3) == 1 or x.stride(1) != 1)


def patch_gram(
    x: Tensor,
    y: Tensor,
    grid: Grid,
    *,
    compare: str = "cka",
    centered: bool = True,
    cosine: bool = False,
    inter: bool = False,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Products [T, 3, G] and distances [T, G] of the patch matrices of two maps [B, C, H, W].

    Differentiable in both maps. ``transposed`` exchanges rows and features, ``inter`` adds the terms of the exchange.
    Groups and resize: :class:`kdfast.reference.patch_gram.Grid`; comparisons: :func:`kdfast.reference.gram.gram`.
    """
    chosen = backend.choose("patch_gram", x.device.type, ("triton",))
    resized = not (grid.fits(x) and grid.fits(y))
    if resized or chosen == "triton":
        pixels, share = (
            grid.size[0] * grid.size[1],
            SAVED_SHARE_GPU if chosen == "triton" else SAVED_SHARE_RESIZED,
        )
        most_saved = int(share * pixels * min(v.shape[0] * v.shape[1] for v in (x, y)))
    else:
        nbytes = x.numel() * x.element_size() + y.numel() * y.element_size()
        share = SAVED_SHARE_SPATIAL if grid.average == SPATIAL else SAVED_SHARE
        most_bytes = share * nbytes
        if inter:
            most_bytes = max(LEAST_SAVED_SHARE * nbytes, most_bytes - share * UNSAVED_BYTES)
        most_saved = int(most_bytes / accumulator(x, y).itemsize)
    _, n, dx = grid.matrices(x)
    swap = inter and (n < dx if transposed else n > dx)  # as in gram: the other problem has the smaller Grams
    transposed = transposed != swap
    mx, my = (_matrices(v, grid, transposed) for v in (x, y))
    groups, n, dx, dy = mx.shape[0], mx.shape[1], mx.shape[5], my.shape[5]
    feature_side = not inter and feature_side_is_cheaper(n, dx, dy, compare, centered, cosine)
    planes = not (feature_side or transposed) and all(_reads_planes(v, grid) for v in (x, y))
    # Whole patches need no copy where the kernels read along their rows.
    along_rows = x.stride(3) == 1 and y.stride(3) == 1 and grid.average != SPATIAL
    if not resized and along_rows and (chosen == "triton" or (chosen == "cpu" and not planes)):
        views = (reference.view(v, grid, transposed) for v in (x, y))
        most = None if chosen == "triton" else most_saved
        results = gram(
            *views, compare=compare, centered=centered, cosine=cosine, inter=inter, most_saved=most
        )
        return tuple(r.flip(0) for r in results) if swap else results
    flags = (COMPARISONS.index(compare), centered, cosine, inter, feature_side, transposed)
    if chosen == "reference":
        products, distance = reference.patch_gram(x, y, grid, *flags)
    else:
        matrices = (workspace_size if chosen == "triton" else saved_size)(mx, my, inter, feature_side)
        saved_groups = 0 if cosine else min(groups, most_saved // max(matrices, 1))
        if saved_groups < groups and not (chosen == "cpu" and planes and groups >= MANY_GROUPS):
            saved_groups = 0
        products, distance = _PatchGram.apply(x, y, grid, flags, saved_groups, chosen == "triton")
    return (products.flip(0), distance.flip(0)) if swap else (products, distance)
