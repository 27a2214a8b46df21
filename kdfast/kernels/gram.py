"""Triton backend of the op ``gram``: which kernels run, at which sizes. Kernels: gram_whole, _pairs, _compare and _norms.

* Gram side: K = Xc Xc^T and L, compared as N x N matrices; the gradient is a small matrix times Xc. Up to 128
  rows (80 where products are float32) are held by one program, which centres them inside its tile and reads
  every element once; more rows go in tiles.
* Transposed comparisons (``inter``, ``feature_side``): |P^T Q|^2 = <P P^T, Q Q^T> turns a product over the
  rows of a view into one over its columns, and back. ``inter`` takes P = X and compares X^T by the N x N
  products P P^T, Q Q^T and P Q^T; ``feature_side`` takes P = X^T and compares X by D x D products. Both are
  one path here.

Launches where one program holds all rows: forward 2 (products, comparison; a sum between where columns are
split), backward 2. Sizes are fixed by the shapes alone, so that results do not depend on the load. They aim
at 512 programs, about four for each multiprocessor of a large GPU; columns are split into at most 128 parts,
because each part costs N^2 floats written and read again.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import gram as reference
from . import gram_compare, gram_norms, gram_pairs, gram_tiles, gram_whole
from ._launch import MOST_SHAPES, View, capability, cdiv, next_power_of_2, on_device, options, precision, view
from .gram_products import Config

# Triton 3.6, torch 2.11's: on Blackwell, for a loop that holds several products.
PIPELINER_FAILS = MEASURED_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
CKA, CKA_ROW, UNBIASED, ROW_COSINE, MEAN, DIFFERENCE = range(6)
PROGRAMS, MAX_SPLITS, MIN_STEPS = 512, 128, 4
# Rows that one program holds, by what multiplies them: TF32, float32 (its registers end there), float64
WHOLE_ROWS, WHOLE_ROWS_IEEE, WHOLE_ROWS_DOUBLE = 128, 80, 32
# How products of float32 are made: "bf16x6" (as exact as float32), "bf16x3" (16 bits) on tensor cores, or any
# input_precision of tl.dot
EXACT, ROUNDED = "bf16x6", "bf16x3"
PIECES = {"bf16x3": 2, "bf16x6": 3}
COMPARED_ROWS = 512  # rows of Grams that one program compares; larger Grams are compared by PyTorch


def gram(
    x: Tensor, y: Tensor, compare: int, centered: bool, cosine: bool, inter: bool, feature_side: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implementation of ``kdfast::gram_triton``; :func:`kdfast.reference.gram.gram` says what it computes."""
    call = _Call(x, y, compare, centered, inter, feature_side)
    if cosine:
        units = [_unit_rows(v, call.dtype) for v in (x, y)]
        return gram(*units, compare, centered, False, inter, feature_side, save)
    products = x.new_empty((1 + inter, 3, call.groups), dtype=call.dtype)
    distance = x.new_empty((1 + inter, call.groups), dtype=call.dtype)
    saved = x.new_empty((call.groups, call.workspace) if save else (0,), dtype=call.dtype)
    if call.groups > 0:
        with on_device(x):
            grams, transposed = call.products(saved if save else None, fill=True)
            if call.gram_side:
                call.compare_grams(grams, products[0], distance[0])
            if call.transposed:
                gram_norms.compared(transposed, *call.transposed_sizes, products[-1], distance[-1])
    return products, distance, saved


def gram_backward(
    grad_products: Tensor, grad_distance: Tensor, x: Tensor, y: Tensor, saved: Tensor,
    compare: int, centered: bool, cosine: bool, inter: bool, feature_side: bool, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Implementation of ``kdfast::gram_backward_triton``."""
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_y = torch.empty_like(y) if need_y else y.new_empty(0)
    call = _Call(x, y, compare, centered, inter, feature_side)
    if cosine:
        units = [_unit_rows(v, call.dtype) for v in (x, y)]
        flags = (compare, centered, False, inter, feature_side, need_x, need_y)
        through = gram_backward(grad_products, grad_distance, *units, saved, *flags)
        for v, unit, z, grad, need in zip(
            (x, y), units, through, (grad_x, grad_y), (need_x, need_y), strict=True
        ):
            if need:
                inverse = reference._inverse_norm(_matrices(v, call.dtype))[:, :, None, :, None, None]
                z = inverse * (z - unit * (unit * z).sum(3, keepdim=True))
                grad.copy_(z.reshape(v.shape))
        return grad_x, grad_y
    # Two centred rows (one) make every pair of Grams parallel (zero): a constant, whatever the inputs.
    use_grams = call.gram_side and not (centered and call.n <= 2)
    use_transposed = call.transposed and not (centered and call.contracted <= 2)
    if call.groups == 0 or not (use_grams or use_transposed):
        return grad_x.zero_(), grad_y.zero_()
    with on_device(x):
        grad_products, grad_distance = grad_products.contiguous(), grad_distance.contiguous()
        grams, transposed = call.products(saved if saved.numel() else None, fill=False)
        small = factors = None
        if use_grams:
            small = call.small_matrices(grams, grad_products[0], grad_distance[0], need_x, need_y)
        if use_transposed:
            factors = gram_norms.factors(
                transposed, *call.transposed_sizes, grad_products[-1], grad_distance[-1]
            )
        call.apply(small, transposed, factors, grad_x, grad_y, need_x, need_y)
    return grad_x, grad_y


def _precision(*dtypes: torch.dtype) -> tuple[str, int]:
    """Config.precision and Config.pieces."""
    found = precision(*dtypes)
    if torch.float64 in dtypes:
        return found, 1
    found = EXACT if found == "ieee" else ROUNDED
    return ("tf32", PIECES[found]) if found in PIECES else (found, 1)


@lru_cache(MOST_SHAPES)
def _by_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The feature axes with the innermost in memory last: a comparison does not depend on the order of features."""
    return tuple(sorted((3, 4, 5), key=lambda axis: (sizes[axis] == 1, -strides[axis])))


def _matrices(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.flatten(3).flatten(1, 2).to(dtype)  # [G, N, D]


def _unit_rows(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of unit length as a view of its own: the one case with an input-sized temporary."""
    return reference._unit_rows(_matrices(v, dtype))[:, :, None, :, None, None]


class _Call:
    """Shapes, views and sizes of one call, and its launches."""

    def __init__(
        self, x: Tensor, y: Tensor, compare: int, centered: bool, inter: bool, feature_side: bool
    ) -> None:
        if inter and compare != CKA:
            name = reference.COMPARISONS[compare]
            raise NotImplementedError(
                f"gram: backend 'triton' does inter for compare 'cka' only, got {name!r}"
            )
        self.x, self.compare, self.centered, self.inter = x, compare, centered, inter
        self.dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        self.precision, self.pieces = _precision(x.dtype, y.dtype)
        self.groups, self.n = x.shape[0], x.shape[1] * x.shape[2]
        self.dx, self.dy = (v.shape[3] * v.shape[4] * v.shape[5] for v in (x, y))
        self.order_x, self.order_y = (_by_stride(v.shape, v.stride()) for v in (x, y))
        if inter and self.order_x != self.order_y:  # features of x meet those of y
            self.order_x = self.order_y = (3, 4, 5)
        self.vx, self.vy = view(x, self.order_x), view(y, self.order_y)
        feature_elements = self.dx**2 + self.dy**2 + self.dx * self.dy
        self.workspace = feature_elements if feature_side else (3 if inter else 2) * (self.n + inter) ** 2
        # The row-normalised comparison has the same value on either side, and is implemented on one.
        self.feature_side = feature_side and compare != CKA_ROW
        self.saves = feature_side == self.feature_side
        self.gram_side, self.transposed = not self.feature_side, inter or self.feature_side
        # P and Q of the transposed comparison: their rows, and how many columns are contracted.
        self.px, self.py = (self.vx.T, self.vy.T) if self.feature_side else (self.vx, self.vy)
        self.rows_x, self.rows_y = (self.dx, self.dy) if self.feature_side else (self.n, self.n)
        self.contracted = self.n if self.feature_side else self.dx
        self.transposed_sizes = (self.rows_x, self.rows_y, self.n, compare)
        most = WHOLE_ROWS
        if self.precision == "ieee":
            most = min(most, WHOLE_ROWS_DOUBLE if self.dtype == torch.float64 else WHOLE_ROWS_IEEE)
        self.whole = self.n <= most
        # Rows that do not lie on 16 elements take more registers to load.
        self.aligned = self.dx % 16 == self.dy % 16 == 0
        self.measured = MEASURED_TRITON and capability(x) == 9 and self.aligned

    def products(self, saved: Tensor | None, fill: bool) -> tuple[Tensor | None, Tensor | None]:
        """K, L and (P P^T, Q Q^T, P Q^T), each [G, elements]: computed, or read from what a forward saved.

        ``saved`` holds the latter where there are any; with ``fill`` it is written.
        """
        saved = saved if self.saves else None
        held = saved if saved is not None and not fill else None
        if not self.transposed:
            return (self._grams(saved) if held is None else held), None
        products = self._pair_products(True, saved) if held is None else held
        if self.feature_side:
            return None, products
        # Uncentred products begin with K and L. Centred, the former have rows centred, the latter columns.
        return (self._grams(None) if self.centered else products), products

    def _config(self, rows0: int, rows1: int, columns: int, center: int, *views: View, **more) -> Config:
        acc = tl.float64 if self.dtype == torch.float64 else tl.float32
        flat = all(v.flat for v in views)
        return Config(
            rows0, rows1, columns, center * self.centered, flat, acc, self.precision, self.pieces, **more
        )

    def _columns(self, rows: int) -> int:
        """Columns of a tile of ``rows`` rows that is multiplied: what fits the registers, see the AOT
        tests."""
        if self.precision == "ieee":
            return 32 if rows <= 48 and self.dtype != torch.float64 else 16
        return 64 if rows <= 64 else 32

    def _splits(self, programs: int, columns: int, block: int) -> int:
        """How many programs share one sum over the columns."""
        return max(1, min(PROGRAMS // max(programs, 1), cdiv(columns, block) // MIN_STEPS, MAX_SPLITS))

    def _parts(self, splits: int, count: int, into: Tensor | None) -> Tensor:
        if splits == 1 and into is not None:
            return into[None]
        return self.x.new_empty((splits, self.groups, count), dtype=self.dtype)

    def _summed(self, parts: Tensor, count: int, into: Tensor | None) -> Tensor:
        if parts.shape[0] == 1:
            return parts[0]
        return torch.sum(
            parts, 0, out=into[:, :count] if into is not None else parts.new_empty(parts.shape[1:])
        )

    def _whole_tiles(self, table: dict[int, tuple], stages: int) -> tuple[int, int, int, int, int]:
        """Two row tiles that hold all rows, columns, warps, stages."""
        if self.pieces > 1:
            *tiles, stages = table[next(rows for rows in table if rows >= self.n)]
            return *tiles, self._stages(stages)
        rows = next(rows for rows in gram_tiles.ROW_TILES if rows >= self.n)
        return *gram_tiles.ROW_TILES[rows], self._columns(rows), 8 if rows >= 64 else 4, self._stages(stages)

    def _grams(self, into: Tensor | None) -> Tensor:
        """K and L [G, 2 N N] (or more where ``into`` has more)."""
        if not self.whole:
            return self._pair_products(False, into)
        ieee = self.precision == "ieee"
        table = gram_tiles.WHOLE_TILES if self.measured else gram_tiles.SPARE_WHOLE_TILES
        r0, r1, columns, warps, stages = self._whole_tiles(table, 2 if ieee else 3)
        n, dx, dy, groups = self.n, self.dx, self.dy, self.groups
        splits = self._splits(2 * groups, max(dx, dy), columns)
        parts = self._parts(splits, 2 * n * n, into)
        config = self._config(r0, r1, columns, 1, self.vx, self.vy, even=self.n == r0 + r1)
        args = (self.vx, self.vy, parts, parts.stride(1), n, dx, dy, splits, groups, config)
        # On Blackwell registers are kept in any case: else ptxas spills 8 to 32 bytes.
        keep = not ieee and (self.measured or r1 == 0 or self.pieces < 3 or capability(self.x) >= 10)
        keep = keep or self.dtype == torch.float64
        gram_whole.whole_grams[(splits * 2 * groups,)](*args, **options(warps, stages, keep=keep))
        return self._summed(parts, 2 * n * n, into)

    def _stages(self, stages: int) -> int:
        if PIPELINER_FAILS and capability(self.x) >= 10:
            return 1
        return stages

    def _pair_tile(self, rows: int) -> int:
        return 16 if rows <= 16 else 32 if rows <= 32 or self.dtype == torch.float64 else 64

    def _pair_products(self, cross: bool, into: Tensor | None) -> Tensor:
        """K and L in tiles; or with ``cross`` P P^T, Q Q^T and P Q^T."""
        vx, vy = (self.px, self.py) if cross else (self.vx, self.vy)
        nx, ny = (self.rows_x, self.rows_y) if cross else (self.n, self.n)
        dx, dy = (self.contracted, self.contracted) if cross else (self.dx, self.dy)
        count = nx * nx + ny * ny + cross * nx * ny
        if self.pieces > 1:
            measured = self.measured and not cross and vx.flat and vy.flat
            table = gram_tiles.PAIR_TILES if measured else gram_tiles.SPARE_PAIR_TILES
            tile, columns, warps, stages = gram_tiles.smallest(table, max(nx, ny))
            columns = columns if self.aligned else 16
        else:
            tile = self._pair_tile(max(nx, ny))
            columns, warps, stages = min(32, self._columns(tile)), 8 if tile == 64 else 4, 2
        tiles = cdiv(max(nx, ny), tile)
        programs = self.groups * (2 + cross) * tiles * tiles
        splits = self._splits(programs, max(dx, dy), columns)
        parts = self._parts(splits, count, into)
        means = self._row_means() if cross else self._column_means()
        config = self._config(tile, 0, columns, 2 if cross else 1, vx, vy, cross=cross)
        gram_pairs.pair_products[(splits * programs,)](
            vx, vy, *means, parts, parts.stride(1), nx, ny, dx, dy, splits, self.groups, tiles, config,
            **options(warps, self._stages(stages)),
        )  # fmt: skip
        return self._summed(parts, count, into)

    def _column_means(self) -> tuple[Tensor, Tensor]:
        """Of x and y, for the Gram side: [G, D], [G, D']."""
        return self._means(self.vx, self.vy, self.n, self.dx, self.dy, 32, 64)

    def _row_means(self) -> tuple[Tensor, Tensor]:
        """Of P and Q: [G, rows], [G, rows']."""
        return self._means(self.px.T, self.py.T, self.contracted, self.rows_x, self.rows_y, 64, 32)

    def _means(self, vx: View, vy: View, n: int, dx: int, dy: int, row_block: int, column_block: int):
        """Means over n rows, counted from the first. Blocks are long along what usually lies contiguous."""
        if not self.centered:
            return self.x.new_empty(0, dtype=self.dtype), self.x.new_empty(0, dtype=self.dtype)
        blocks = cdiv(max(dx, dy), column_block)
        parts = self._splits(2 * self.groups * blocks, n, row_block)
        outs = [self.x.new_empty((parts, self.groups, d), dtype=self.dtype) for d in (dx, dy)]
        config = self._config(row_block, 0, column_block, 0, vx, vy)
        gram_pairs.means[(blocks * parts * 2 * self.groups,)](
            vx, vy, *outs, n, n, dx, dy, parts, blocks, self.groups, config, num_warps=4
        )
        mean_x, mean_y = (out[0] if parts == 1 else out.sum(0) for out in outs)
        return mean_x, mean_y

    def _compare_tile(self) -> dict[str, int]:
        """Whole rows in blocks of at most 4096 elements: 16 of each Gram in every thread of 8 warps."""
        width = max(16, next_power_of_2(self.n))
        rows = min(width, 4096 // width)
        return {"BN": width, "BR": rows, **options(max(1, width * rows // 512))}

    def _split_grams(self, grams: Tensor) -> list[Tensor]:
        return [grams[:, i * self.n**2 : (i + 1) * self.n**2].view(-1, self.n, self.n) for i in range(2)]

    def compare_grams(self, grams: Tensor, products: Tensor, distance: Tensor) -> None:
        """Fills products [3, G] and distance [G]."""
        if self.n > COMPARED_ROWS:
            found = reference._gram_side(*self._split_grams(grams), reference.COMPARISONS[self.compare])
            products.copy_(found[0])
            distance.copy_(found[1])
            return
        gram_compare.compare[(self.groups,)](
            grams, grams.stride(0), self.n, products, distance, self.groups, COMPARE=self.compare, **self._compare_tile()
        )  # fmt: skip

    def small_matrices(
        self, grams: Tensor, grad_products: Tensor, grad_distance: Tensor, need_x: bool, need_y: bool
    ) -> Tensor:
        """Gx and Gy [G, 2, N, N] of dX = Gx Xc and dY = Gy Yc."""
        # Two comparisons leave a gradient that is not centred by itself.
        project = self.centered and self.compare in (CKA_ROW, ROW_COSINE)
        if self.n > COMPARED_ROWS:
            with torch.enable_grad():
                k, m = (v.detach().requires_grad_() for v in self._split_grams(grams))
                found = reference._gram_side(k, m, reference.COMPARISONS[self.compare])
                dk, dm = torch.autograd.grad(found, (k, m), (grad_products, grad_distance))
            small = torch.stack((dk + dk.mT, dm + dm.mT), 1)
            return small - small.mean(2, keepdim=True) if project else small
        small = self.x.new_empty((self.groups, 2, self.n, self.n), dtype=self.dtype)
        gram_compare.compare_backward[(self.groups,)](
            grams, grams.stride(0), self.n, grad_products, grad_distance, small, self.groups, need_x, need_y,
            COMPARE=self.compare, PROJECT=project, **self._compare_tile(),
        )  # fmt: skip
        return small

    def apply(
        self, small: Tensor | None, matrices: Tensor | None, factors: Tensor | None,
        grad_x: Tensor, grad_y: Tensor, need_x: bool, need_y: bool,
    ) -> None:  # fmt: skip
        """Writes the gradients of the sides that need one: all terms in one launch."""
        ox = view(grad_x, self.order_x) if need_x else self.vx
        oy = view(grad_y, self.order_y) if need_y else self.vy
        first, sides = int(not need_x), need_x + need_y
        ieee = self.precision == "ieee"
        if factors is None and self.whole:
            table = gram_tiles.APPLY_TILES if self.measured else gram_tiles.SPARE_APPLY_TILES
            r0, r1, columns, warps, stages = self._whole_tiles(table, 2)
            if capability(self.x) >= 10 and r0 == 128 and self.pieces == 2:
                columns = 16  # with 32 ptxas spills 12 bytes
            splits = self._splits(sides * self.groups, max(self.dx, self.dy), columns)
            config = self._config(r0, r1, columns, 1, self.vx, self.vy, ox, oy, even=self.n == r0 + r1)
            args = (self.vx, self.vy, ox, oy, small, self.n, self.dx, self.dy, splits, first, sides, config)
            gram_whole.whole_apply[(splits * sides * self.groups,)](
                *args, **options(warps, stages, keep=False)
            )
            return
        nothing = self.x.new_empty(0, dtype=self.dtype)
        gram_args = (nothing, nothing, nothing) if small is None else (small, *self._column_means())
        cross_args = (nothing, 0, nothing, nothing, nothing)
        if factors is not None:
            cross_args = (matrices, matrices.stride(0), factors, *self._row_means())
        if self.feature_side:
            ox, oy = ox.T, oy.T
        dx, dy = (self.contracted, self.contracted) if self.transposed else (self.dx, self.dy)
        if self.pieces > 1:
            measured = self.measured and (small is None or factors is None)
            table = gram_tiles.PAIR_APPLY_TILES if measured else gram_tiles.SPARE_PAIR_APPLY_TILES
            tile, columns, inner, warps, stages = gram_tiles.smallest(table, max(self.rows_x, self.rows_y))
        else:
            tile = self._pair_tile(max(self.rows_x, self.rows_y))
            columns, inner, warps, stages = (32, 16, 8, 2) if ieee else (64, 32, 4, 2)
        tiles, blocks = cdiv(max(self.rows_x, self.rows_y), tile), cdiv(max(dx, dy), columns)
        terms = {"gram": small is not None, "cross": factors is not None, "inner": inner}
        config = self._config(tile, 0, columns, 1, self.px, self.py, ox, oy, **terms)
        gram_pairs.pair_apply[(sides * self.groups * tiles * blocks,)](
            self.px, self.py, ox, oy, *gram_args, *cross_args, self.rows_x, self.rows_y, dx, dy,
            first, sides, tiles, blocks, config, **options(warps, self._stages(stages)),
        )  # fmt: skip
