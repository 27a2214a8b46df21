"""The pyramid example at tiny settings: runs as a user starts it, prints every network and provider, draws a figure."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

SCRIPT = Path(__file__).parents[1] / "examples" / "distill_pyramid.py"


def test_every_network_and_provider_is_reported(tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    arguments = ("--steps", "3", "--seeds", "2", "--out", str(figure))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for network in ("teacher", "student alone", r"student \+ PCKA", r"student \+ PCKA \+ mimic"):
        row = re.search(rf"^{network}\s+([\d.]+) %", done.stdout, re.MULTILINE)
        assert row and 0 <= float(row[1]) <= 100, done.stdout
    for provider in ("published loop", "plain PyTorch", "kdfast"):
        row = re.search(rf"^{provider}\s+([\d.]+)\s+(\d+) %", done.stdout, re.MULTILINE)
        assert row and float(row[1]) > 0 and 0 < float(row[2]) <= 100, done.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
