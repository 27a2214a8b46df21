"""Variants of logits and direction."""

L, D, C = "kdfast.kernels.logits", "kdfast.kernels.direction", "kdfast.kernels.logits_dist"
TILES = f"{L}:FORWARD_TILE"
VARIANTS = []


def add(case, provider, label="as committed", dtype="float32", **patch):
    names = {"tile": TILES, "programs": f"{L}:PROGRAMS", "backward": f"{L}:BACKWARD_BLOCK"}
    family = "direction" if case.startswith("dino") else "logits"
    VARIANTS.append(
        {
            "label": f"{provider} {label}", "family": family, "case": case, "dtype": dtype, "layout": "contiguous",
            "provider": provider, "patch": {names.get(k, k): v for k, v in patch.items()},
        }
    )  # fmt: skip


def tile(four, two=(2, 2048, 8)):
    return {2: two, 4: four, 8: (1, 512, 8)}


big = "kd [128, 128000]"
add(big, "triton")
add(big, "triton", "4x1024 w8 2048 programs", programs=2048)
add(big, "triton", "4x512 w4 2048 programs", tile=tile((4, 512, 4)), programs=2048)
add(big, "triton", "4x512 w4 4096 programs", tile=tile((4, 512, 4)), programs=4096)
add(big, "triton", "8x512 w4 2048 programs", tile=tile((8, 512, 4)), programs=2048)
add(big, "triton", "2x1024 w8 2048 programs", tile=tile((2, 1024, 8)), programs=2048)
add(big, "triton", dtype="bfloat16")
add(
    big, "triton", "2x1024 w4 2048 programs", "bfloat16", tile=tile((4, 1024, 8), (2, 1024, 4)), programs=2048
)
add(
    big, "triton", "4x1024 w4 2048 programs", "bfloat16", tile=tile((4, 1024, 8), (4, 1024, 4)), programs=2048
)
add(big, "triton", "backward 2048", "bfloat16", backward=2048)

vocabulary = "kd [256, 32000]"
for dtype in ("float32", "bfloat16"):
    add(vocabulary, "triton", dtype=dtype)
    add(vocabulary, "cuda", dtype=dtype)
add(vocabulary, "triton", "4x512 w4 2048 programs", tile=tile((4, 512, 4)), programs=2048)
add(
    vocabulary,
    "triton",
    "2x1024 w4 2048 programs",
    "bfloat16",
    tile=tile((4, 1024, 8), (2, 1024, 4)),
    programs=2048,
)
add("kd [64, 128256]", "triton")
add("kd [64, 128256]", "triton", dtype="bfloat16")

for case in (
    "kd [64, 100]", "dkd [128, 100]", "dist [128, 100]", "dist [256, 1000]", "kd [256, 1000]", "nkd [256, 1000]",
    "kd [1024, 81]", "dist [1024, 81]",
):  # fmt: skip
    add(case, "cuda")
add("kd [256, 1000]", "triton")
add("dist [256, 1000]", "triton")
small_parts = {f"{C}:PART_ROWS": 16, f"{C}:TILE_ROWS": 16, f"{C}:TILE_COLUMNS": 32}
add("dist [256, 1000]", "triton", "parts of 16 rows, tiles 16x32", **small_parts)
add("dist [128, 100]", "triton", "parts of 16 rows, tiles 16x32", **small_parts)

dino = "dino [4096, 1024], 1000 classes"
add(dino, "triton")
add(dino, "cuda")
add(dino, "triton", "forward tile 512 w1", **{f"{D}:FORWARD_TILE": 512})
add(dino, "triton", "forward tile 2048 w2", **{f"{D}:FORWARD_TILE": 2048, f"{D}:FORWARD_WARPS": 2})
add(dino, "triton", "forward tile 2048 w4", **{f"{D}:FORWARD_TILE": 2048, f"{D}:FORWARD_WARPS": 4})
for case in ("dino [1024, 1024], 81 classes", "dino class-balanced [1024, 1024], 81 classes"):
    add(case, "cuda")
    add(case, "triton")
add("dino [128, 64], 100 classes", "cuda")
add("dino [512, 256], 100 classes", "cuda")
