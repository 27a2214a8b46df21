"""examples/distill_sokd.py runs as a user starts it, and writes what it promises."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

SCRIPT = Path(__file__).parents[1] / "examples" / "distill_sokd.py"


def test_example(tmp_path):
    short = ("--seeds", "1", "--epochs", "2", "--search-epochs", "1", "--teacher-epochs", "1", "--quiet")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path), *short, "--train-fraction", "0.1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "sokd_accuracy.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["teacher", "plain student", "FitNet", "SoKD"]
    assert all(0 <= float(row["mean"]) <= 100 for row in rows.values())
    assert (tmp_path / "sokd_policy.txt").read_text().startswith("frozen")
    assert (tmp_path / "sokd_areas.png").stat().st_size > 10_000
