"""Tile sizes of the Triton kernels of the op ``gram``, by the rows that they hold."""

from __future__ import annotations

# Two row tiles that hold so many rows, where products are not made in pieces
ROW_TILES = {16: (16, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (64, 64)}
# Where they are: two row tiles, columns, warps, stages. Measured on an H200 with Triton 3.6;
# elsewhere (older tensor cores read operands from registers, other compilers allocate them otherwise), SPARE_*.
WHOLE_TILES = {
    16: (16, 0, 128, 4, 3),
    32: (32, 0, 128, 4, 3),
    64: (64, 0, 64, 4, 3),
    80: (64, 16, 64, 4, 3),
    96: (64, 32, 64, 4, 3),
    128: (128, 0, 64, 8, 3),
}
APPLY_TILES = {
    16: (16, 0, 128, 4, 3),
    32: (32, 0, 128, 4, 3),
    64: (64, 0, 64, 4, 3),
    80: (64, 16, 64, 4, 2),
    96: (64, 32, 64, 4, 2),
    128: (128, 0, 64, 8, 2),
}
SPARE_WHOLE_TILES = {
    16: (16, 0, 64, 4, 2),
    32: (32, 0, 64, 4, 2),
    64: (64, 0, 32, 4, 2),
    80: (64, 16, 32, 8, 2),
    96: (64, 32, 32, 8, 2),
    128: (128, 0, 32, 8, 2),
}
SPARE_APPLY_TILES = SPARE_WHOLE_TILES
# Products of more rows: rows of a tile, columns of a step, warps, stages
PAIR_TILES = {16: (16, 128, 4, 3), 32: (32, 64, 4, 3), 64: (64, 64, 4, 3), 128: (128, 32, 8, 3)}
SPARE_PAIR_TILES = {16: (16, 64, 4, 2), 32: (32, 32, 4, 2), 64: (64, 32, 8, 2)}
# Small matrices times a view of more rows: rows and columns of a tile, contracted elements of a step, warps, stages
PAIR_APPLY_TILES = {
    16: (16, 128, 16, 4, 3),
    32: (32, 128, 32, 4, 3),
    64: (64, 64, 64, 4, 3),
    128: (128, 128, 32, 8, 3),
}
SPARE_PAIR_APPLY_TILES = {16: (16, 64, 16, 4, 2), 32: (32, 64, 32, 4, 2), 64: (64, 64, 16, 8, 2)}


def smallest(table: dict[int, tuple], rows: int) -> tuple:
    """The entry of the smallest tile that holds the rows, or of the largest."""
    return table[next((size for size in table if size >= rows), max(table))]
