"""Variants of criss_cross, affinity and the dot product."""

from benchmarks.sweep import Variants
from kdfast.kernels.criss_cross import MAX, Tiles

CRISS_CROSS = Variants("criss_cross", "kdfast.kernels.criss_cross")
AFFINITY = Variants("affinity", "kdfast.kernels.affinity")
criss = CRISS_CROSS.add


def aff(label, n, m, kind="concatenation", **patch):
    AFFINITY.add(label, f"{kind}, {n:,} queries, {m:,} keys, 128 wide", **patch)


def both(forward, *backward, name="tf32x3", **more):
    """Tables with one entry each; backward: (for lines to 64, for longer)."""
    tables = {}
    if forward:
        tables["FORWARD"] = {name: {MAX: Tiles(*forward)}}
    if backward:
        tables["BACKWARD"] = {name: {64: Tiles(*backward[0]), MAX: Tiles(*backward[-1])}}
    return {**tables, **more}


S64, BIG, P4 = "[2, 256, 64, 64], query 32", "[2, 512, 97, 97], query 64", "[2, 256, 50, 84], query 32"
P5, P6, SMALL = "[2, 256, 25, 42], query 32", "[2, 256, 13, 21], query 32", "[2, 64, 32, 32], query 8"
criss("as committed", S64)
criss("as committed", S64, layout="channels_last")
criss("as committed", S64, dtype="bfloat16")
criss("as committed", BIG)
criss("as committed", P4)
criss("as committed", P5)
criss("as committed", P6)
criss("as committed", SMALL)

criss("forward 64x64 128 channels", S64, **both((64, 0, 64, 32, 128, 4, 2)))
criss("forward 64x64 32 channels", S64, **both((64, 0, 64, 32, 32, 4, 2)))
criss("forward 64x32", S64, **both((64, 0, 32, 32, 64, 4, 2)))
criss("forward 32x32, mma.sync", S64, **both((32, 0, 32, 32, 64, 4, 2)))
criss("backward inner 32, 32 channels", S64, **both(None, (64, 64, 64, 32, 32, 4, 2)))
criss("backward 8 warps", S64, **both(None, (64, 64, 64, 32, 64, 8, 2)))
criss("backward other 16", S64, **both(None, (64, 64, 16, 32, 64, 4, 2)))
criss("backward not whole 64x32", S64, **both(None, (64, 0, 32, 16, 64, 4, 2)))
criss("backward not whole 32x32, mma.sync", S64, **both(None, (32, 0, 32, 16, 32, 4, 2)))
criss("backward 3 stages", S64, **both(None, (64, 64, 64, 16, 64, 4, 3)))
criss("prepare 64 pixels", S64, PIXELS=64)
criss("prepare 32 channels", S64, CHANNELS=32)
criss("one term", S64, TERMS=1, dtype="bfloat16")
criss(
    "128 channels",
    S64,
    **both((64, 0, 64, 64, 128, 4, 2), (64, 64, 64, 64, 128, 4, 2), name="half"),
    dtype="bfloat16",
)
criss("weights in TF32", S64, TERMS=0, dtype="bfloat16")
criss("whole 128x16, 32 wide", BIG, **both(None, (128, 128, 16, 32, 64, 8, 2), WIDE=32))
criss("32x32, mma.sync", BIG, **both((32, 0, 32, 32, 64, 4, 2), (32, 0, 32, 16, 32, 4, 2)))
criss("64x16", BIG, **both((64, 0, 16, 32, 128, 4, 2), (64, 0, 16, 32, 64, 4, 2)))
criss("whole 128x16", P4, **both(None, (64, 64, 64, 16, 64, 4, 2), (128, 128, 16, 32, 64, 8, 2)))
criss("32 channels", P5, **both((64, 0, 64, 32, 32, 4, 2), (64, 64, 64, 32, 32, 4, 2)))
criss("32 channels", P6, **both((32, 0, 32, 32, 32, 4, 2), (32, 32, 32, 32, 32, 4, 2)))
criss("2 warps", P6, **both((32, 0, 32, 32, 32, 2, 2), (32, 32, 32, 32, 32, 2, 2)))

for n, m in ((4200, 4200), (1050, 1050), (16800, 16800), (67200, 67200), (4200, 1050)):
    aff("as committed", n, m)
for n, m in ((4200, 4200), (67200, 67200)):
    for columns in (64, 128):
        aff(f"{columns} columns", n, m, COLUMNS=columns)
    aff("64 columns, 4 warps", n, m, COLUMNS=64, WARPS=4)
    aff("ieee", n, m, FLOAT32="ieee")
    aff("128 columns, 16 queries", n, m, COLUMNS=128, QUERIES=16)
for n in (4200, 67200):
    aff("as committed", n, n, "dot product")

VARIANTS = [*CRISS_CROSS, *AFFINITY]
