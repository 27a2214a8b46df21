"""``python -m benchmarks.sweep FILE...``: time variants of kernels (tile sizes, warps, ...) on a GPU, to choose from.

Each FILE defines ``VARIANTS``, a list that :class:`Variants` fills. Variants are compiled and held against float64 by all
processes at once, then timed one after another: GPU time by CUDA graphs, wall time, and the time of each kernel.
"""

from __future__ import annotations

import argparse
import csv
import os
import runpy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import crew, measure
from .case import Case, providers
from .cases import select
from .crew import Shared
from .jobs import healthy
from .kernels import between_marks, mark, profiler, warm_up

DEVICE = torch.device("cuda")
GRAPH_SECONDS, WALL_SECONDS, PROFILED_STEPS = 0.03, 0.02, 3
COLUMNS = (
    "family",
    "case",
    "dtype",
    "layout",
    "provider",
    "label",
    "gpu_us",
    "wall_us",
    "error",
    "allowed",
    "note",
    "kernels",
)
# label, family, case, dtype, layout, provider; patch: "module:name" to the value that the name has during the call
Variant = dict[str, Any]


class Variants(list[Variant]):
    """Variants of a family's cases, most of which change names of one module."""

    def __init__(self, family: str, module: str) -> None:
        self.family, self.module = family, module

    def add(
        self, label: str, case: str, *,
        dtype: str = "float32", layout: str = "contiguous", provider: str = "triton", family: str | None = None,
        **patch: Any,
    ) -> None:  # fmt: skip
        """``patch``: values of the module's names, or of ``"module:name"`` elsewhere."""
        places = {k if ":" in k else f"{self.module}:{k}": v for k, v in patch.items()}
        family = family or self.family
        found = {"label": label, "family": family, "case": case, "dtype": dtype, "layout": layout}
        self.append(found | {"provider": provider, "patch": places})


@contextmanager
def patched(patch: dict[str, Any]) -> Iterator[None]:
    places = [(import_module(module), name, value) for (module, name), value in _split(patch)]
    before = [getattr(module, name) for module, name, _ in places]  # AttributeError: there is no such name
    try:
        for module, name, value in places:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _split(patch: dict[str, Any]) -> list[tuple[tuple[str, str], Any]]:
    return [(tuple(place.split(":")), value) for place, value in patch.items()]


def variants(files: Sequence[Path]) -> list[Variant]:
    return [variant for file in files for variant in runpy.run_path(str(file))["VARIANTS"]]


def _key(variant: Variant) -> tuple[str, str, str, str]:
    return tuple(variant[name] for name in ("family", "case", "dtype", "layout"))


def _grouped(found: Sequence[Variant]) -> dict[tuple[str, str, str, str], list[Variant]]:
    groups: dict[tuple[str, str, str, str], list[Variant]] = {}
    for variant in found:
        groups.setdefault(_key(variant), []).append(variant)
    return groups


class Held:
    """A variant that was right or wrong, compiled, with its inputs."""

    def __init__(self, case: Case, variant: Variant, inputs: list[list[Tensor]]) -> None:
        (self.provider,) = providers(case, DEVICE, [variant["provider"]])
        self.variant, self.inputs, self.row = variant, inputs, {c: variant[c] for c in COLUMNS[:6]}
        self.ok = False

    @contextmanager
    def context(self) -> Iterator[None]:
        with patched(self.variant["patch"]), self.provider.context():
            yield

    def check(self, truth: list[Tensor], bounds: list[float]) -> None:
        if self.provider.unavailable:
            self.row["note"] = self.provider.unavailable
            return
        with self.context():
            errors = measure._errors(measure.step(self.provider.fn, self.inputs[0]), truth)
            worst = max(range(len(errors)), key=lambda i: errors[i] / bounds[i])
            self.row |= {"error": f"{errors[worst]:.2e}", "allowed": f"{bounds[worst]:.2e}"}
            if not all(e <= b for e, b in zip(errors, bounds, strict=True)):
                self.row["note"] = "wrong"
        self.ok = True  # a wrong one is timed too: an error a little too large says what is to be had

    def clock(self) -> None:
        with self.context():
            graph, results = measure._graph(self.provider.fn, self.inputs)
            times = measure._replay(graph, GRAPH_SECONDS)
            wall = measure._wall_gpu(self.provider.fn, self.inputs[: measure.MOST_CALLS], WALL_SECONDS)
        self.row["gpu_us"] = round(statistics.median(times) / len(self.inputs) * 1e6, 2)
        self.row["wall_us"] = round(statistics.median(wall) * 1e6, 1)

    def steps(self) -> None:
        with self.context():
            for _ in range(PROFILED_STEPS):
                measure.step(self.provider.fn, self.inputs[0])


def _work(shared: Shared, files: Sequence[Path], hold: Path | None, prepared_by: float, end: float) -> None:
    groups = _grouped(variants(files))
    cases = {case.key: case for case in select()}
    held: list[Held] = []
    warm_up()
    for i, (key, group) in enumerate(groups.items()):
        with shared.taken.get_lock():
            if i < shared.taken.value or time.monotonic() > prepared_by:
                continue
            shared.taken.value = i + 1
        inputs = cases[key].inputs(DEVICE)
        truth, bounds = measure._truth(cases[key], inputs, DEVICE)
        sets = measure._copies(inputs)
        for variant in group:
            one = Held(cases[key], variant, sets)
            try:
                one.check(truth, bounds)
            except Exception as error:
                one.row["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                one.row["note"] += "" if healthy() else " (and the device no longer answers)"
            held.append(one)
            if one.row.get("note", "").endswith("answers)"):
                break
        del truth
        if not healthy():  # nothing more works in this process; the others take what is left
            for one in held:
                shared.results.put(one.row)
            held.clear()
            break
    shared.meet(prepared_by, hold)
    with shared.turn:
        if not held:
            return shared.results.put(None)
        timed = [one for one in held if one.ok and time.monotonic() < end]
        for one in timed:
            try:
                one.clock()
            except Exception as error:
                one.row["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        with profiler(DEVICE) as profile:
            for one in timed:
                mark()
                one.steps()
            mark()
            torch.cuda.synchronize()
        for one, kernels in zip(timed, between_marks(profile), strict=False):
            one.row["kernels"] = "; ".join(
                f"{name[:40]} {us / PROFILED_STEPS:.1f} x{count / PROFILED_STEPS:g}"
                for name, us, count in kernels[:12]
            )
    for one in held:
        shared.results.put(one.row)
    shared.results.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument(
        "--prepare", type=float, default=0.65, metavar="SHARE", help="of the minutes, to compile and check"
    )
    parser.add_argument("--hold", type=Path, metavar="FILE", help="time nothing while FILE exists")
    options = parser.parse_args()
    start = time.monotonic()
    prepared_by, end = start + 60 * options.minutes * options.prepare, start + 60 * options.minutes
    arguments = (options.files, options.hold, prepared_by, end)
    rows = []
    for row in crew.run(_work, arguments, options.jobs, end + 10):
        rows.append(row)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                sorted(rows, key=lambda r: (r["family"], r["case"], r["dtype"], r["layout"], r["provider"]))
            )
    print(f"{len(rows)} of {len(variants(options.files))} variants in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
