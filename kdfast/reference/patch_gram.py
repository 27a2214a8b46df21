"""Grams of the patches of maps in plain PyTorch: resize, cut, compare (Zhou et al., PCKA, Eq. 8).

A map [B, C, H, W] is resized to ``rows * patch_h`` by ``columns * patch_w`` pixels and cut into N = rows * columns
patches. Patch matrices [groups, N, D] have one row per patch; what is averaged over names the groups:

    channel   C groups,  features (B, u, v)       (PCKA's choice)
    batch     B groups,  features (C, u, v)
    spatial   one group per pixel (u, v) of a patch, features (B, C)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from . import gram as reference

AVERAGES = ("channel", "batch", "spatial")


class Grid(NamedTuple):
    """How a map is cut: patches of ``patch_h`` x ``patch_w`` pixels, ``rows`` x ``columns`` of them.

    A map of another size is resized bilinearly (``align_corners=False``), or else padded with zeros and cropped at its
    lower and right edges. ``average`` is an index into :data:`AVERAGES`.
    """

    patch_h: int
    patch_w: int
    rows: int
    columns: int
    bilinear: bool
    average: int

    @property
    def size(self) -> tuple[int, int]:
        return self.rows * self.patch_h, self.columns * self.patch_w

    def fits(self, x: Tensor) -> bool:
        """Whether the map needs no resize."""
        return tuple(x.shape[2:]) == self.size

    def matrices(self, x: Tensor) -> tuple[int, int, int]:
        """Groups, rows and features of the patch matrices of a map [B, C, H, W]."""
        groups = (x.shape[1], x.shape[0], self.patch_h * self.patch_w)[self.average]
        features = (x.shape[0], x.shape[1], 1)[self.average] * self.patch_h * self.patch_w
        if self.average == AVERAGES.index("spatial"):
            features = x.shape[0] * x.shape[1]
        return groups, self.rows * self.columns, features


def resized_dtype(x: Tensor, grid: Grid) -> torch.dtype:
    """The type of accumulation where a resize mixes values, else the map's."""
    return x.dtype if x.dtype == torch.float64 or not grid.bilinear or grid.fits(x) else torch.float32


def resize(x: Tensor, grid: Grid) -> Tensor:
    """The map at the size of the grid, of :func:`resized_dtype`."""
    if grid.fits(x):
        return x
    height, width = grid.size
    if not grid.bilinear:
        return pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
    return interpolate(
        x.to(resized_dtype(x, grid)), size=(height, width), mode="bilinear", align_corners=False
    )


def patches(x: Tensor, grid: Grid) -> Tensor:
    """A map of the grid's size as a view [G, R1, R2, F1, F2, F3] for the gram op; only ``spatial`` copies."""
    x = x.unflatten(2, (grid.rows, grid.patch_h)).unflatten(
        4, (grid.columns, grid.patch_w)
    )  # [B, C, i, u, j, v]
    if grid.average == AVERAGES.index("channel"):
        return x.permute(1, 2, 4, 0, 3, 5)
    if grid.average == AVERAGES.index("batch"):
        return x.permute(0, 2, 4, 1, 3, 5)
    return x.permute(3, 5, 2, 4, 0, 1).flatten(0, 1).unsqueeze(5)


def view(x: Tensor, grid: Grid, transposed: bool = False) -> Tensor:
    """Patch matrices of a map of any size, as a view for the gram op."""
    x = patches(resize(x, grid), grid)
    return x.flatten(3).flatten(1, 2).mT[:, :, None, None, None] if transposed else x


def patch_gram(
    x: Tensor,
    y: Tensor,
    grid: Grid,
    compare: int = 0,
    centered: bool = True,
    cosine: bool = False,
    inter: bool = False,
    feature_side: bool = False,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Products [T, 3, G] and distances [T, G] of the patch matrices of two maps; see :func:`.gram.gram`.

    Args:
        x: [B, C, H, W]; y: [B, C, H', W'] (C may differ where it is no group and ``inter`` is off).
        transposed: exchange the rows and features of the patch matrices first.
    """
    views = (view(v, grid, transposed) for v in (x, y))
    return reference.gram(*views, compare, centered, cosine, inter, feature_side)
