"""Variants of the op gram: precision, tiles, splits."""

from benchmarks.sweep import Variants
from kdfast.kernels.gram_tiles import APPLY_TILES as A
from kdfast.kernels.gram_tiles import PAIR_APPLY_TILES as APPLY
from kdfast.kernels.gram_tiles import PAIR_TILES as PAIR
from kdfast.kernels.gram_tiles import WHOLE_TILES as W

CHOICES = Variants("gram", "kdfast.kernels.gram")
TILES = Variants("gram", "kdfast.kernels.gram_tiles")
add, tiles = CHOICES.add, TILES.add

A128, CKA64, BIG = "cka resnet8x4 [128, 256, 8, 8]", "cka [64, 50000]", "cka resnet50 [256, 2048, 7, 7]"
P3, P3N = "P3 channel", "P3 channel, no resize"
for case in (
    A128,
    BIG,
    CKA64,
    "cka resnet8x4 [128, 64, 32, 32]",
    "cka resnet18 [256, 512, 7, 7]",
    "cka analysis [4096, 512]",
    "sp resnet8x4 [128, 256, 8, 8]",
    "pairwise [8, 512, 32, 32]",
    "logit cka [1024, 1000]",
    "logit cka [128, 100]",
    "rcka 3 stages + logits, resnet8x4",
):
    add("bf16x6", case)
add("bf16x6", P3N, family="pcka")
add("bf16x6", P3, family="pcka")
add("bf16x6", P3, family="pcka", dtype="bfloat16")
add("bf16x6", "P3 spatial", family="pcka")
add("bf16x3", "cka [128, 65536]", dtype="bfloat16")
add("bf16x6", "cka [128, 64, 32, 32]", layout="channels_last")
add("tf32 for halves", "cka [128, 65536]", ROUNDED="tf32", dtype="bfloat16")
add("cuda C++", "logit cka [128, 100]", provider="cuda")

# Precision: Triton's own three TF32 products, and the old FMA path (baselines)
add("tf32x3", A128, EXACT="tf32x3")
add("tf32x3", P3N, EXACT="tf32x3", family="pcka")
add("ieee", A128, EXACT="ieee")

# 128 rows: columns of a step; apply's columns and stages; splits
tiles(
    "whole 128x32",
    A128,
    WHOLE_TILES={**W, 128: (128, 0, 32, 8, 3)},
    APPLY_TILES={**A, 128: (128, 0, 32, 8, 2)},
)
add("steps 1", A128, MIN_STEPS=1)
add("steps 2", A128, MIN_STEPS=2)
add("splits 128", CKA64, MAX_SPLITS=128)
add("splits 192", CKA64, MAX_SPLITS=192)
tiles(
    "whole 64x32",
    CKA64,
    WHOLE_TILES={**W, 64: (64, 0, 32, 4, 3)},
    APPLY_TILES={**A, 64: (64, 0, 32, 4, 3)},
)
tiles(
    "8 warps",
    P3N,
    WHOLE_TILES={**W, 64: (64, 0, 64, 8, 3)},
    APPLY_TILES={**A, 64: (64, 0, 64, 8, 3)},
    family="pcka",
)
tiles(
    "77 rows: 64+16, 32 columns",
    P3,
    WHOLE_TILES={**W, 80: (64, 16, 32, 4, 3)},
    APPLY_TILES={**A, 80: (64, 16, 32, 4, 2)},
    family="pcka",
)
tiles(
    "77 rows: 128",
    P3,
    WHOLE_TILES={**W, 80: (128, 0, 64, 8, 3)},
    APPLY_TILES={**A, 80: (128, 0, 64, 8, 2)},
    family="pcka",
)

# More rows: tiles
tiles("pair 128x32 s4", BIG, PAIR_TILES={**PAIR, 128: (128, 32, 8, 4)})
tiles("pair 64x64, 4 warps", BIG, PAIR_TILES={64: (64, 64, 4, 3)})
tiles("apply 128x128x64 s2", BIG, PAIR_APPLY_TILES={**APPLY, 128: (128, 128, 64, 8, 2)})
tiles("apply 128x64x64 s2", BIG, PAIR_APPLY_TILES={**APPLY, 128: (128, 64, 64, 8, 2)})
tiles(
    "apply 64x64x64",
    "logit cka [1024, 1000]",
    PAIR_TILES={64: (64, 64, 4, 3)},
    PAIR_APPLY_TILES={64: (64, 64, 64, 4, 3)},
)

VARIANTS = [*CHOICES, *TILES]
