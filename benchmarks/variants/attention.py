"""Variants of the attention family."""

from benchmarks.sweep import Variants

VARIANTS = Variants("attention", "kdfast.kernels.attention_mask")
add = VARIANTS.add

BIG, MID = "two_stage [8, 256, 200, 336]", "two_stage [2, 256, 50, 84]"
SMALL, LEVEL = "two_stage [2, 256, 13, 21]", "two_stage [2, 256, 100, 168]"
ONE = "one_stage [2, 256, 100, 168]"

for case in (BIG, MID, SMALL, ONE):
    add("as committed", case)
add("as committed", LEVEL)
add("as committed", "paper_two_stage [2, 256, 50, 84]")
add("as committed", LEVEL, dtype="bfloat16")
add("as committed", LEVEL, layout="channels_last")
add("as committed", BIG, layout="channels_last")
add("as committed", "two_stage [8, 256, 50, 84]", dtype="bfloat16", layout="channels_last")
for case in (BIG, ONE):
    add("4096 elements, 4 warps", case, ELEMENTS=4096)
    add("4096 elements, 8 warps", case, ELEMENTS=4096, PER_THREAD=16)
    add("8192 elements, 16 warps", case, PER_THREAD=16)
    add("4 steps", case, STEPS=4)
add("16384 elements, 16 warps", BIG, ELEMENTS=16384)
add("rows 256, 8 warps in masks", BIG, ROWS=256, MASK_WARPS=8)
for case in (MID, SMALL):
    add("16 values per thread", case, PER_THREAD=16)
    add("masks: chunks of 512, 4 warps", case, CHUNK=512, MASK_WARPS=4)
    add("small masks: block 256", case, BLOCK=256, CHUNK=256, ROWS=64)
add("twice the programs", MID, PROGRAMS=528)
add("4096 elements", MID, ELEMENTS=4096)
add("at least 16 pixels", SMALL, LEAST_PIXELS=16, PER_THREAD=16)
add("8 values per thread", SMALL, PER_THREAD=8)
add("8 warps of 16", LEVEL, dtype="bfloat16", PER_THREAD=16)
add("bf16 16384 elements", LEVEL, dtype="bfloat16", ELEMENTS=16384)
add("16 values per thread", LEVEL, layout="channels_last", PER_THREAD=16)
add("4096 elements", LEVEL, layout="channels_last", ELEMENTS=4096)
add("gradient 16 pixels", LEVEL, layout="channels_last", GRADIENT_PIXELS_CHANNELS_LAST=16)
add("gradient 128 pixels", LEVEL, layout="channels_last", GRADIENT_PIXELS_CHANNELS_LAST=128)
add("cuda", MID, provider="cuda")
add("cuda", SMALL, provider="cuda")
add("cuda", "two_stage [2, 256, 25, 42]", provider="cuda")
add("as committed", "two_stage [2, 256, 25, 42]")
