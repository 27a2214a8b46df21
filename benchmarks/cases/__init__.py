"""The suite: one module per family, each with ``cases() -> list[Case]``; list new ones here."""

from __future__ import annotations

from collections.abc import Sequence

from ..case import Case
from . import (
    affinity,
    attention,
    criss_cross,
    direction,
    feature_augment,
    gram,
    logits,
    pcka,
    sokd,
    structured,
)

FAMILIES = {
    "affinity": affinity,
    "gram": gram,
    "pcka": pcka,
    "attention": attention,
    "criss_cross": criss_cross,
    "direction": direction,
    "feature_augment": feature_augment,
    "logits": logits,
    "structured": structured,
    "sokd": sokd,
}

# (family, case) -> what it is called in README's table and figure; contiguous float32.
HEADLINES = {
    ("pcka", "P3 channel"): "PCKA, FPN level P3, 2x256x100x168",
    ("pcka", "RetinaNet P3..P5, batch 2"): "PCKA, RetinaNet pyramid, batch 2",
    ("gram", "rcka 3 stages + logits, resnet8x4"): "RCKA, resnet8x4, batch 128",
    ("attention", "two_stage [2, 256, 100, 168]"): "attention-guided, 2x256x100x168",
    ("structured", "two_stage P3-P7 dot_product [2, 256]"): "structured KD, FPN P3..P7, batch 2",
    (
        "affinity",
        "concatenation, 4,200 queries, 4,200 keys, 128 wide",
    ): "concatenation non-local, 4,200 positions",
    ("criss_cross", "[2, 256, 64, 64], query 32"): "criss-cross attention, 2x256x64x64",
    ("direction", "dino [1024, 1024], 81 classes"): "dino-loss, box head, 1024x1024",
    ("logits", "kd [256, 32000]"): "KD, 256 tokens, vocabulary 32,000",
    ("logits", "dkd [128, 100]"): "DKD, batch 128, 100 classes",
    ("feature_augment", "rotate + shear_x [16, 256, 56, 56]"): "SoKD augmentation, 16x256x56x56",
    ("sokd", "areas [2, 256, 100, 168]"): "SoKD areas, 2x256x100x168",
}


def select(ops: Sequence[str] | None = None, substrings: Sequence[str] = ("",)) -> list[Case]:
    """The cases of the families or ops named (all by default) whose name holds one of ``substrings``."""
    cases = [case for family in FAMILIES.values() for case in family.cases()]
    known = {case.family for case in cases} | {case.op or case.family for case in cases}
    unknown = set(ops or ()) - known
    if unknown:
        raise ValueError(f"op: got {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
    chosen = [case for case in cases if not ops or case.family in ops or case.op in ops]
    return [case for case in chosen if any(s.lower() in case.name.lower() for s in substrings)]
