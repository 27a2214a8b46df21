"""The suite by several processes: they compile and check at once, then time one after another.

For machines where compiling takes most of the time, such as a GPU that is rented by the minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import crew
from .case import Case
from .ceilings import Ceilings
from .crew import Shared
from .measure import Prepared, Row, clock, prepare


class Plan(NamedTuple):
    """What every process is told. Times are on the clock of ``time.monotonic``."""

    arguments: Sequence[str]  # of the command line: cases hold functions, so each process makes its own
    places: Sequence[int]  # in the list of cases, in the order in which they are taken
    device: torch.device
    ceilings: Ceilings
    seconds: float
    rounds: int
    only: Sequence[str]
    prepared_by: float
    end: float
    profile: bool
    hold: Path | None  # nothing is timed while this file exists


def run(plan: Plan, jobs: int) -> Iterator[tuple[list[Row], list[Row]]]:
    """Rows of each case as it is timed, and the kernels of its providers where the plan asks for them."""
    yield from crew.run(_work, (plan,), jobs)


def _work(shared: Shared, plan: Plan) -> None:
    from .__main__ import parse
    from .kernels import warm_up

    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are the parallelism
    torch._dynamo.config.recompile_limit = 64  # several cases share a function
    cases = parse(plan.arguments).cases
    held: list[Prepared] = []
    if plan.profile and plan.device.type == "cuda":
        warm_up()
    while (case := _next(plan, cases, shared.taken)) is not None:
        held.append(prepare(case, plan.device, plan.only))
        if plan.device.type == "cuda" and not healthy():
            shared.results.put((held.pop().rows, []))
            held.clear()
            break
    shared.meet(plan.prepared_by, plan.hold)
    for prepared in held:
        with shared.turn:
            if time.monotonic() < plan.end:
                shared.results.put(_timed(plan, prepared))
    shared.results.put(None)


def _next(plan: Plan, cases: Sequence[Case], taken: Any) -> Case | None:
    with taken.get_lock():
        place, taken.value = taken.value, taken.value + 1
    late = time.monotonic() > plan.prepared_by
    return None if late or place >= len(plan.places) else cases[plan.places[place]]


def healthy() -> bool:
    """Whether the device still answers: after an illegal access nothing in this process does."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _timed(plan: Plan, prepared: Prepared) -> tuple[list[Row], list[Row]]:
    from .kernels import kernels

    try:
        rows = clock(prepared, plan.device, plan.ceilings, seconds=plan.seconds, rounds=plan.rounds)
        return rows, kernels(prepared, plan.device) if plan.profile else []
    except Exception as error:  # the next case may work
        note = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return [row | {"status": "not run", "note": note} for row in prepared.rows], []
