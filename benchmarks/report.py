"""Results as CSV, and tables made from the CSV."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .case import KDFAST
from .ceilings import Ceilings

Row = dict[str, Any]

COLUMNS = (
    *("family", "case", "source", "dtype", "layout", "provider", "status"),
    *("median_ms", "p20_ms", "p80_ms", "calls", "wall_ms", "speedup", "wall_speedup"),
    *("gb_per_s", "tflop_per_s", "floor_ms", "floor_share", "extra_mb", "input_mb", "error"),
    *(
        "device",
        "threads",
        "load",
        "torch",
        "triton",
        "commit",
        "copy_gb_per_s",
        "matrix_tflop_per_s",
        "date",
        "note",
    ),
)
_KEY = ("case", "dtype", "layout", "provider")


def machine(device: torch.device, ceilings: Ceilings, commit: str | None = None) -> Row:
    """What every row says of the run: device, versions, commit, ceilings, date. No host name, no path."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit or _commit(),
        "copy_gb_per_s": ceilings.bandwidth() / 1e9,
        "matrix_tflop_per_s": ceilings.matrix_rate(torch.float32) / 1e12,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    name = name[1].strip() if name else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*?(?=\(|$)", " ", name.lower())).strip("-")


def _commit() -> str:
    """The last commit that touched code, with -dirty where code differs from it; results and texts are no code."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent.parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    code = (".", ":!benchmarks/results", ":!*.md")
    try:
        commit = git("log", "-1", "--format=%H", "--", *code)[:12]
        changed = git("status", "--porcelain", "--", *code)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def write(rows: Sequence[Row], folder: Path, suite: Iterable[tuple[str, str, str, str]]) -> list[Path]:
    """One CSV per family. A case that this run did not measure keeps its rows while the suite has it.

    Args:
        suite: (family, case, dtype, layout) of every case that exists, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = {key: i for i, key in enumerate(suite)}
    paths = []
    for family in dict.fromkeys(row["family"] for row in rows):
        path = folder / f"{family}.csv"
        merged = {_key(row): row for row in read(path)} if path.exists() else {}
        new = [_text(row) for row in rows if row["family"] == family]
        renewed = {_key(row)[:3] for row in new}
        kept = [row for key, row in merged.items() if key[:3] not in renewed and _place(row) in order]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted([*kept, *new], key=lambda row: order.get(_place(row), len(order))))
        paths.append(path)
    return paths


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(folder: Path, commit: str) -> set[tuple[str, str, str, str]]:
    """(family, case, dtype, layout) of what ``folder`` holds of this commit."""
    rows = [row for path in folder.glob("*.csv") for row in read(path)]
    return {_place(row) for row in rows if row["commit"] == commit}


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[k] for k in _KEY)


def _place(row: Row) -> tuple[str, ...]:
    return row["family"], row["case"], row["dtype"], row["layout"]


def _text(row: Row) -> Row:
    """Four significant digits: more is noise, and the file should read well."""
    return {
        key: ""
        if (value := row.get(key)) is None
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
        for key in COLUMNS
    }


def label(row: Row) -> str:
    """The case with what is not the common setting."""
    extra = [v for v in (row["dtype"], row["layout"]) if v not in ("float32", "contiguous")]
    return ", ".join([row["case"], *extra])


def by_case(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """case label -> provider -> row, in the order of the file."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(label(row), {})[row["provider"]] = row
    return cases


def provider_names(rows: Sequence[Row]) -> list[str]:
    """Those that ran anywhere: baselines first, kdfast's last."""
    ran = dict.fromkeys(
        row["provider"] for row in rows if row["status"] == "ok" or row["provider"] not in KDFAST
    )
    return sorted(ran, key=lambda name: (name in KDFAST, {"eager": 1, "compile": 2}.get(name, 0)))


def table(rows: Sequence[Row]) -> str:
    """Markdown: milliseconds of each provider, then what the fastest kdfast provider reaches."""
    rows = [_text(row) | {"status": row["status"]} for row in rows]
    cases, names = by_case(rows), provider_names(rows)
    gpu = any(row["provider"] == "triton" for row in rows)
    head = [
        "case",
        *(f"{n} ms" for n in names),
        "speed-up",
        *(["wall speed-up"] if gpu else []),
        "of floor",
        "extra memory (of input)",
    ]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for case, found in cases.items():
        cells = [case, *(_time(found.get(name)) for name in names)]
        best = fastest(found)
        if best is None:
            cells += [""] * (len(head) - len(cells))
        else:
            cells.append(_times(best["speedup"]))
            cells += [_times(best["wall_speedup"])] if gpu else []
            cells.append(f"{float(best['floor_share']):.0%}")
            cells.append(_extra(best))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{float(row['median_ms']):.3g}" if row["median_ms"] else row["status"]


def _extra(row: Row) -> str:
    if not row["extra_mb"]:
        return ""
    extra = float(row["extra_mb"])
    return f"{extra:.1f} MB ({extra / float(row['input_mb']):.0%})"


def _times(text: str) -> str:
    return f"{float(text):.2f}x" if text else ""


def summary(rows: Sequence[Row]) -> str:
    """The table under a line that says where and how it was measured."""
    return f"{setting(rows)}\n\n{table(rows)}"


def write_tables(folder: Path) -> Path:
    """tables.md: the table of every family that ``folder`` has results of."""
    parts = [f"## {path.stem}\n\n{summary(read(path))}" for path in sorted(folder.glob("*.csv"))]
    path = folder / "tables.md"
    path.write_text("# All cases measured here\n\n" + "\n\n".join(parts) + "\n")
    return path


def headlines(folder: Path, names: dict[tuple[str, str], str]) -> dict[str, dict[str, Row]]:
    """What README shows: headline -> provider -> row, in the order of ``names``: (family, case) -> headline."""
    found: dict[str, dict[str, Row]] = {name: {} for name in names.values()}
    for path in folder.glob("*.csv"):
        for row in read(path):
            name = names.get((row["family"], row["case"]))
            if name and row["median_ms"] and (row["dtype"], row["layout"]) == ("float32", "contiguous"):
                found[name][row["provider"]] = row
    return {name: rows for name, rows in found.items() if fastest(rows) is not None}


def headline_table(found: dict[str, dict[str, Row]]) -> str:
    """Markdown: published code, eager, torch.compile and kdfast in milliseconds, and how many times faster kdfast is."""
    lines = [
        "| forward + backward, ms | published code | eager | torch.compile | kdfast | times faster than the best |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in found.items():
        ours = fastest(rows)
        if ours is not None:
            times = [_time(rows.get(p)) or "-" for p in ("naive", "eager", "compile")]
            lines.append(
                f"| {name} | {' | '.join(times)} | {_time(ours)} | {_times(ours['speedup']) or '-'} |"
            )
    return "\n".join(lines)


def fastest(rows: dict[str, Row]) -> Row | None:
    """The fastest of kdfast's backends."""
    ours = [row for name, row in rows.items() if name in KDFAST and row["median_ms"]]
    return min(ours, key=lambda row: float(row["median_ms"]), default=None)


def setting(rows: Sequence[Row]) -> str:
    """Where and how: device, threads, versions, commits, dates, ceilings."""
    one = rows[0]
    commits, dates = (", ".join(dict.fromkeys(row[k] for row in rows)) for k in ("commit", "date"))
    threads = "" if any(row["provider"] == "triton" for row in rows) else f", {one['threads']} threads"
    return (
        f"{one['device']}{threads}, torch {one['torch']}, commit {commits}, {dates}; "
        f"copy {float(one['copy_gb_per_s']):.1f} GB/s, "
        f"float32 product {float(one['matrix_tflop_per_s']):.3g} TFLOP/s."
    )


def update_readme(path: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- /marker -->``."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    content = path.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{path.name}: need one {begin} and one {end}, each on a line of its own")
    before, rest = content.split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def relative(path: Path) -> str:
    """The path as a reader of the repository would write it."""
    return os.path.relpath(path)
