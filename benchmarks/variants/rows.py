"""Variants of logits and direction."""

from benchmarks.sweep import Variants

LOGITS = Variants("logits", "kdfast.kernels.logits")
DIRECTION = Variants("direction", "kdfast.kernels.direction")


def tile(four, two=(2, 2048, 8)):
    return {2: two, 4: four, 8: (1, 512, 8)}


big = "kd [128, 128000]"
LOGITS.add("triton as committed", big)
LOGITS.add("triton 4x1024 w8 2048 programs", big, PROGRAMS=2048)
LOGITS.add("triton 4x512 w4 2048 programs", big, FORWARD_TILE=tile((4, 512, 4)), PROGRAMS=2048)
LOGITS.add("triton 4x512 w4 4096 programs", big, FORWARD_TILE=tile((4, 512, 4)), PROGRAMS=4096)
LOGITS.add("triton 8x512 w4 2048 programs", big, FORWARD_TILE=tile((8, 512, 4)), PROGRAMS=2048)
LOGITS.add("triton 2x1024 w8 2048 programs", big, FORWARD_TILE=tile((2, 1024, 8)), PROGRAMS=2048)
LOGITS.add("triton as committed", big, dtype="bfloat16")
LOGITS.add(
    "triton 2x1024 w4 2048 programs",
    big,
    dtype="bfloat16",
    FORWARD_TILE=tile((4, 1024, 8), (2, 1024, 4)),
    PROGRAMS=2048,
)
LOGITS.add(
    "triton 4x1024 w4 2048 programs",
    big,
    dtype="bfloat16",
    FORWARD_TILE=tile((4, 1024, 8), (4, 1024, 4)),
    PROGRAMS=2048,
)
LOGITS.add("triton backward 2048", big, dtype="bfloat16", BACKWARD_BLOCK=2048)

vocabulary = "kd [256, 32000]"
for dtype in ("float32", "bfloat16"):
    LOGITS.add("triton as committed", vocabulary, dtype=dtype)
    LOGITS.add("cuda as committed", vocabulary, provider="cuda", dtype=dtype)
LOGITS.add("triton 4x512 w4 2048 programs", vocabulary, FORWARD_TILE=tile((4, 512, 4)), PROGRAMS=2048)
LOGITS.add(
    "triton 2x1024 w4 2048 programs",
    vocabulary,
    dtype="bfloat16",
    FORWARD_TILE=tile((4, 1024, 8), (2, 1024, 4)),
    PROGRAMS=2048,
)
LOGITS.add("triton as committed", "kd [64, 128256]")
LOGITS.add("triton as committed", "kd [64, 128256]", dtype="bfloat16")

for case in (
    "kd [64, 100]", "dkd [128, 100]", "dist [128, 100]", "dist [256, 1000]", "kd [256, 1000]", "nkd [256, 1000]",
    "kd [1024, 81]", "dist [1024, 81]",
):  # fmt: skip
    LOGITS.add("cuda as committed", case, provider="cuda")
LOGITS.add("triton as committed", "kd [256, 1000]")
LOGITS.add("triton as committed", "dist [256, 1000]")
small_parts = {
    "kdfast.kernels.logits_dist:" + name: value
    for name, value in (("PART_ROWS", 16), ("TILE_ROWS", 16), ("TILE_COLUMNS", 32))
}
LOGITS.add("triton parts of 16 rows, tiles 16x32", "dist [256, 1000]", **small_parts)
LOGITS.add("triton parts of 16 rows, tiles 16x32", "dist [128, 100]", **small_parts)

dino = "dino [4096, 1024], 1000 classes"
DIRECTION.add("triton as committed", dino)
DIRECTION.add("cuda as committed", dino, provider="cuda")
DIRECTION.add("triton forward tile 512 w1", dino, FORWARD_TILE=512)
DIRECTION.add("triton forward tile 2048 w2", dino, FORWARD_TILE=2048, FORWARD_WARPS=2)
DIRECTION.add("triton forward tile 2048 w4", dino, FORWARD_TILE=2048, FORWARD_WARPS=4)
for case in ("dino [1024, 1024], 81 classes", "dino class-balanced [1024, 1024], 81 classes"):
    DIRECTION.add("cuda as committed", case, provider="cuda")
    DIRECTION.add("triton as committed", case)
DIRECTION.add("cuda as committed", "dino [128, 64], 100 classes", provider="cuda")
DIRECTION.add("cuda as committed", "dino [512, 256], 100 classes", provider="cuda")

VARIANTS = [*LOGITS, *DIRECTION]
