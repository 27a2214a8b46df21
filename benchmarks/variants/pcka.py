"""Variants of PCKA's resize kernels (kdfast/kernels/resize.py) and of what the op saves."""

from benchmarks.sweep import Variants

PIXELS, CHANNELS = "pixels", "channels"
BASE = {
    (PIXELS, PIXELS): (8, 256, 4),
    (PIXELS, CHANNELS): (32, 64, 4),
    (CHANNELS, PIXELS): (32, 64, 4),
    (CHANNELS, CHANNELS): (64, 32, 4),
}
BASE_ADJOINT = {**BASE, (PIXELS, PIXELS): (8, 128, 4)}
VARIANTS = Variants("pcka", "kdfast.kernels.resize")
add = VARIANTS.add


def tiles(key, forward=None, adjoint=None):
    patch = {}
    if forward:
        patch["TILES"] = {**BASE, key: forward}
    if adjoint:
        patch["ADJOINT_TILES"] = {**BASE_ADJOINT, key: adjoint}
    return patch


PP, PC, CP = (PIXELS, PIXELS), (PIXELS, CHANNELS), (CHANNELS, PIXELS)
P3, PYRAMID2, PYRAMID8 = "P3 channel", "RetinaNet P3..P5, batch 2", "RetinaNet P3..P5, batch 8"

add("committed", P3)
add("committed", P3, dtype="bfloat16")
add("committed", P3, layout="channels_last")
add("committed", "P3 batch")
add("committed", "P3 spatial")
add("committed", "P3 channel, intra + inter")
add("committed", "P5 channel, batch 2")
add("committed", PYRAMID2)
add("committed", PYRAMID8)
for forward, adjoint in (
    ((4, 256, 4), (4, 128, 4)), ((16, 128, 4), (16, 128, 4)), ((8, 128, 4), (8, 256, 4)),
    ((8, 512, 8), (8, 256, 8)), ((4, 512, 4), (4, 256, 4)),
):  # fmt: skip
    add(f"tiles {forward} {adjoint}", P3, **tiles(PP, forward, adjoint))
for forward, adjoint in (((4, 256, 4), (4, 128, 4)), ((16, 256, 8), (16, 128, 4))):
    add(f"tiles {forward} {adjoint}", P3, **tiles(PP, forward, adjoint), dtype="bfloat16")
for forward, adjoint in (((32, 32, 4), (32, 32, 4)), ((64, 64, 8), (32, 64, 8)), ((64, 32, 4), (16, 64, 4))):
    add(f"tiles {forward} {adjoint}", P3, **tiles(CP, forward, adjoint), layout="channels_last")
for forward, adjoint in (((32, 32, 4), (32, 32, 4)), ((32, 128, 8), (64, 64, 8)), ((64, 64, 8), (32, 64, 8))):
    add(f"tiles {forward} {adjoint}", "P3 spatial", **tiles(PC, forward, adjoint))
for forward, adjoint in (((4, 128, 4), (4, 128, 4)), ((4, 64, 2), (4, 64, 2)), ((16, 128, 4), (8, 64, 2))):
    add(f"tiles {forward} {adjoint}", "P5 channel, batch 2", **tiles(PP, forward, adjoint))
add("Grams saved", "P3 channel, intra + inter", **{"kdfast.ops.patch_gram:SAVED_SHARE_GPU": 2.0})
add("Grams not saved", P3, **{"kdfast.ops.patch_gram:SAVED_SHARE_GPU": 0.0})
add("blocks of 32 MB", P3, **{"kdfast.ops.patch_gram:GPU_BLOCK_BYTES": 32 << 20})
add("blocks of 64 MB", PYRAMID8, **{"kdfast.ops.patch_gram:GPU_BLOCK_BYTES": 64 << 20})
add("tiles (4, 256, 4)", PYRAMID8, **tiles(PP, (4, 256, 4), (4, 128, 4)))
