"""The examples run as a user starts them, and write what they promise."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*arguments: str, script: str = "distill_digits.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    short = ("--seeds", "1", "--epochs", "2", "--teacher-epochs", "2", "--train-fraction", "0.1")
    done = run("--out", str(out), *short, "--large-batch", "96", "--no-compile", "--quiet", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "RCKA" in done.stdout
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_accuracy_table(report):
    table = {row["method"]: row for row in rows(report / "accuracy.csv")}
    assert list(table) == ["teacher", "plain student", "KD", "RCKA", "KD++"]
    assert float(table["teacher"]["mean"]) > 50  # two epochs on 1,000 images; guessing gives 10
    for row in table.values():
        assert 0 <= float(row["min"]) <= float(row["mean"]) <= float(row["max"]) <= 100
        assert float(row["ms_per_step"]) > 0
    gain = float(table["RCKA"]["mean"]) - float(table["plain student"]["mean"])
    assert float(table["RCKA"]["gain"]) == pytest.approx(gain, abs=0.02)


def test_loss_time_names_every_provider(report):
    table = rows(report / "loss_time.csv")
    assert {row["batch"] for row in table} == {"64", "96"}
    for loss in ("KD", "RCKA", "KD++"):
        assert {row["provider"] for row in table if row["loss"] == loss} == {"eager PyTorch", "kdfast (cpu)"}
    for row in table:
        assert float(row["ms"]) > 0 if row["ms"] else row["note"]
        assert "differs" not in row["note"]


def test_cka_of_every_pair_of_layers(report):
    table = rows(report / "cka.csv")
    states = {"before training", "after: plain student", "after: KD", "after: RCKA", "after: KD++"}
    pairs = {(row["state"], row["teacher_layer"], row["student_layer"]) for row in table}
    assert {state for state, _, _ in pairs} == states
    assert len(pairs) == len(table) == len(states) * 7 * 4
    assert all(0 <= float(row["cka"]) <= 1 for row in table)


def test_report_links_what_exists(report):
    text = (report / "report.md").read_text()
    for name in ("accuracy.csv", "runs.csv", "loss_time.csv", "cka.csv", "curves.png", "cka.png"):
        assert f"]({name})" in text
        assert (report / name).stat().st_size > 0


def test_every_method_trains(tmp_path):
    methods = ("dkd", "dist", "reviewkd", "fitnet", "sokd", "dkd++", "dist++", "reviewkd++")
    short = ("--seeds", "1", "--epochs", "1", "--teacher-epochs", "1", "--train-fraction", "0.1")
    small = ("--batch-size", "32", "--large-batch", "32", "--no-compile", "--quiet", "--device", "cpu")
    done = run("--out", str(tmp_path), *short, *small, "--loss", *methods)
    assert done.returncode == 0, done.stderr
    timed = [row for row in rows(tmp_path / "loss_time.csv") if row["provider"] == "kdfast (cpu)"]
    titles = [
        "DKD",
        "DIST",
        "ReviewKD",
        "FitNet",
        "DKD++",
        "DIST++",
        "ReviewKD++",
    ]  # SoKD draws: it is not timed
    assert [row["loss"] for row in timed] == titles
    assert all(float(row["ms"]) > 0 for row in timed)


@pytest.mark.parametrize(
    ("arguments", "named"), [(("--loss", "unknown"), "unknown"), (("--train-fraction", "2"), "0.02")]
)
def test_wrong_arguments_are_named(arguments, named):
    done = run(*arguments)
    assert done.returncode == 2
    assert named in done.stderr


def test_attention_masks_are_drawn(tmp_path):
    done = run("--out", str(tmp_path), "--steps", "2", script="attention_masks.py")
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "attention_masks.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and len(drawn) > 50_000
    for temperature in ("0.1", "0.5", "1.0"):  # range of the weights, whose mean is 1
        line = next(line for line in done.stdout.splitlines() if f"T = {temperature}:" in line)
        low, high = map(float, re.search(r"weights ([0-9.]+) to ([0-9.]+)", line).groups())
        assert low < 1 < high
