"""``python -m benchmarks``: measure the suite, or part of it; write CSV and figures; print the tables."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import jobs, plots, report
from .case import KDFAST, Case
from .cases import HEADLINES, select
from .ceilings import Ceilings
from .measure import Row, measure

ROOT = Path(__file__).parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--op", nargs="+", metavar="NAME", help="families or ops to measure (all)")
    parser.add_argument(
        "--case",
        nargs="+",
        default=("",),
        metavar="SUBSTRING",
        help="only cases whose name holds one of these",
    )
    parser.add_argument(
        "--provider", nargs="+", default=(), metavar="NAME", help="only these providers (all)"
    )
    parser.add_argument("--quick", action="store_true", help="about 1 s of timing per case, 3 rounds")
    parser.add_argument("--resume", action="store_true", help="leave out cases that DIR has of this commit")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after these")
    parser.add_argument("--seconds", type=float, metavar="S", help="of timing per case, instead of those")
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="processes that compile and check before one of them times",
    )
    parser.add_argument(
        "--prepare", type=float, default=0.6, metavar="SHARE", help="of the minutes, for --jobs (%(default)s)"
    )
    parser.add_argument(
        "--hold", type=Path, metavar="FILE", help="time nothing while FILE exists (with --jobs)"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="CSV", help="write the kernels of each step (with --jobs)"
    )
    parser.add_argument("--rounds", type=int, help="how often the providers take turns (7)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="DIR", help="%(default)s")
    parser.add_argument("--readme", action="store_true", help="rewrite this device's table in README.md")
    parser.add_argument("--commit", help="what was measured, where the folder is no git checkout")
    parser.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: need at least 1, got {options.rounds}")
    try:
        options.cases = select(options.op, options.case)
    except ValueError as error:
        parser.error(str(error))
    if not options.cases:
        parser.error(f"--case: no case holds {' or '.join(options.case)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for case in options.cases:
            print(f"{case.family}: {case.name} ({case.dtype_name}, {case.layout}); {case.source}")
        return 0
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of the compiler's own code
    if os.getloadavg()[0] > 0.5:
        print(
            f"load average {os.getloadavg()[0]:.1f}: other programs will disturb the times", file=sys.stderr
        )
    device = torch.device(options.device)
    ceilings = Ceilings(device)
    facts = report.machine(device, ceilings, options.commit)
    folder = options.out / report.slug(facts["device"])
    suite = [case.key for case in select()]
    known = report.measured(folder, facts["commit"]) if options.resume else set()
    cases = _by_rank([case for case in options.cases if case.key not in known])
    rows: list[Row] = []
    done = 0
    with tqdm(total=len(cases), unit="case", disable=None) as bar:
        for found in _measured(options, arguments, cases, device, ceilings):
            bar.update()
            done += 1
            rows += [facts | row for row in found]
            report.write(rows, folder, suite)  # after every case: a run that is stopped keeps what it has
    left = len(cases) - done
    files = [folder / f"{family}.csv" for family in dict.fromkeys(case.family for case in options.cases)]
    written = [path for path in files if path.exists()]
    for path in list(written):
        stored = report.read(path)
        print(f"\n{report.summary(stored)}")
        written += plots.draw(stored, folder, path.stem)
    everything = [row for path in sorted(folder.glob("*.csv")) for row in report.read(path)]
    headlines = report.headlines(folder, HEADLINES)
    written += [report.write_tables(folder), *plots.draw_roofline(everything, folder)]
    written += plots.draw_headlines(headlines, folder)
    failed = [row for row in rows if row["status"] != "ok" or row.get("note")]
    for row in failed:
        print(f"{row['status']}: {report.label(row)}, {row['provider']}: {row['note']}")
    if left:
        print(f"\nout of time: {left} cases were not measured; the same command with --resume takes them up")
    print("\nwritten:", *(report.relative(path) for path in written))
    if options.readme:
        rows_shown = [row for providers in headlines.values() for row in providers.values()]
        text = f"{report.headline_table(headlines)}\n\n{report.setting(rows_shown)}"
        report.update_readme(ROOT.parent / "README.md", f"benchmarks:{options.device}", text)
    return int(any(row["status"] == "wrong" and row["provider"] in KDFAST for row in failed))


def _by_rank(cases: list[Case]) -> list[Case]:
    """What README shows first, then the families in turn: a run that ends early has some of each."""
    place: dict[str, int] = {}
    ranked = []
    for case in cases:
        place[case.family] = place.get(case.family, 0) + 1
        shown = (case.family, case.name) in HEADLINES and case.key[2:] == ("float32", "contiguous")
        ranked.append((not shown, place[case.family]))
    return [case for _, case in sorted(zip(ranked, cases, strict=True), key=lambda pair: pair[0])]


def _measured(
    options: argparse.Namespace,
    arguments: list[str] | None,
    cases: list[Case],
    device: torch.device,
    ceilings: Ceilings,
) -> Iterator[list[Row]]:
    """The rows of each case that there was time for."""
    seconds, rounds = (1.0, 3) if options.quick else (5.0, 7)
    seconds, rounds = options.seconds or seconds, options.rounds or rounds
    start, limit = time.monotonic(), 60 * options.minutes
    if not options.jobs:
        for case in cases:
            if time.monotonic() <= start + limit:
                yield measure(case, device, ceilings, seconds=seconds, rounds=rounds, only=options.provider)
        return
    for dtype in {case.dtype for case in cases}:
        ceilings.floor(1, 1, 1, dtype)  # measured before the processes share the device
    plan = jobs.Plan(
        sys.argv[1:] if arguments is None else arguments, [options.cases.index(case) for case in cases],
        device, ceilings, seconds, rounds, options.provider, start + options.prepare * limit, start + limit,
        options.profile is not None, options.hold,
    )  # fmt: skip
    profiled: list[Row] = []
    for found, kernels in jobs.run(plan, options.jobs):
        yield found
        profiled += kernels
        if profiled:
            with options.profile.open("w", newline="") as file:
                writer = csv.DictWriter(file, profiled[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(profiled)


if __name__ == "__main__":
    sys.exit(main())
