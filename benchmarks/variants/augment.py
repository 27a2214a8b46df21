"""Variants of feature_augment and of SoKD's areas."""

from benchmarks.sweep import Variants

ROTATE, SHIFT, CUT, SHUFFLE = (
    "rotate + shear_x",
    "translate_y + noise",
    "cutout + channel_drop",
    "noise + channel_shuffle",
)
SMALL, MIDDLE, LARGE, WIDE = "[64, 256, 8, 8]", "[64, 64, 32, 32]", "[16, 256, 56, 56]", "[2, 256, 100, 168]"
CHAINS = Variants("feature_augment", "kdfast.kernels.feature_augment")
AREAS = Variants("sokd", "kdfast.kernels.masked_error")
add = CHAINS.add

# As committed: all chains small and large.
for chain in (ROTATE, CUT, SHIFT, SHUFFLE):
    for size in (SMALL, LARGE):
        add("committed", f"{chain} {size}")
add("committed", f"{ROTATE} {WIDE}")
add("committed", f"{ROTATE} {MIDDLE}")
add("committed", f"{SHUFFLE} {WIDE}")
for case, dtype, layout in (
    ("areas [64, 128, 16, 16]", "float32", "contiguous"),
    ("areas [2, 256, 100, 168]", "float32", "contiguous"),
    ("areas [2, 256, 100, 168]", "bfloat16", "contiguous"),
    ("areas [64, 128, 16, 16]", "float32", "channels_last"),
):
    AREAS.add("committed", case, dtype=dtype, layout=layout)

# Taps: channels, rows, columns, warps. Fewer channels in a tile: more programs, fewer registers; wide rows: whole lines stored.
for label, tile, steps in (
    ("8 channels 8x8 w4", (8, 8, 8, 4), 1),
    ("16 channels 8x8 w2", (16, 8, 8, 2), 1),
    ("32 channels 8x8 w4", (32, 8, 8, 4), 1),
    ("8 channels 16x8 w4", (8, 16, 8, 4), 4),
    ("16 channels 4x16 w4", (16, 4, 16, 4), 4),
    ("16 channels 4x32 w4", (16, 4, 32, 4), 4),
    ("16 channels 8x8 w4, 1 step", (16, 8, 8, 4), 1),
):
    # A column of 32 is wider than the small map; a single step is what the small map has.
    for size in (SMALL, LARGE) if steps == 1 and tile != (16, 8, 8, 4) else (LARGE,):
        add(label, f"{ROTATE} {size}", TAPS=tile, WINDOW=tile, STEPS=steps)

# Copies: elements, pixels at most, warps.
for label, copy in (("1024 w4", (1024, 256, 4)), ("4096 w8", (4096, 512, 8)), ("4096 w4", (4096, 512, 4))):
    for size in (SMALL, LARGE):
        add(f"copy {label}", f"{CUT} {size}", COPY=copy)

# Noise: registers against work in flight.
for label, noisy in (("512 w4", (512, 256, 4)), ("2048 w4", (2048, 512, 4)), ("2048 w8", (2048, 512, 8))):
    add(f"noise {label}", f"{SHUFFLE} {LARGE}", NOISY=noisy)
for label, tile in (("8 channels 8x8 w4", (8, 8, 8, 4)), ("16 channels 8x8 w8", (16, 8, 8, 8))):
    add(f"taps with noise {label}", f"{SHIFT} {LARGE}", NOISY_TAPS=tile)

# Areas: elements of a tile, warps.
for label, patch in (
    ("1024 w4", {"ELEMENTS": 1024}),
    ("4096 w8", {"ELEMENTS": 4096, "WARPS": 8}),
):
    for case in ("areas [64, 128, 16, 16]", "areas [2, 256, 100, 168]"):
        AREAS.add(label, case, **patch)

VARIANTS = [*CHAINS, *AREAS]
