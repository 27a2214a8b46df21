"""The suite: one module per family, each with ``cases() -> list[Case]``; list new ones here."""

from __future__ import annotations

from ..case import Case
from . import attention, direction, gram, logits, pcka, sokd

FAMILIES = {
    "gram": gram,
    "pcka": pcka,
    "attention": attention,
    "direction": direction,
    "logits": logits,
    "sokd": sokd,
}


def select(ops: list[str] | None = None, substring: str = "") -> list[Case]:
    """The cases of the families or ops named (all by default) whose name holds ``substring``."""
    cases = [case for family in FAMILIES.values() for case in family.cases()]
    known = {case.family for case in cases} | {case.op or case.family for case in cases}
    unknown = set(ops or ()) - known
    if unknown:
        raise ValueError(f"op: got {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
    chosen = [case for case in cases if not ops or case.family in ops or case.op in ops]
    return [case for case in chosen if substring.lower() in case.name.lower()]
