"""Tables (CSV and Markdown) and figures of a distillation experiment."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import matplotlib
import torch
from _timing import Timing

import kdfast

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from distill_digits import Run

COLOURS = ("#4d4d4d", "#c8703a", "#2b6c9e", "#5b8f3a", "#8a5a9e", "#b59a2c")
Rows = list[list[str]]


def _spread(values: Sequence[float]) -> str:
    """Sample standard deviation; one value has none."""
    return f"{stdev(values):.2f}" if len(values) > 1 else ""


def _write_csv(path: Path, header: list[str], rows: Rows) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def _markdown(header: list[str], rows: Rows) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def accuracy_rows(runs: dict[str, list[Run]]) -> tuple[list[str], Rows]:
    """One row per method: test accuracy in %, gain over the plain student of the same seed, step time."""
    header = ["method", "seeds", "mean", "std", "min", "max", "gain", "gain_std", "ms_per_step"]
    rows, plain = [], runs.get("plain student")
    for title, found in runs.items():
        test = [run.test for run in found]
        gain, gain_std = "", ""
        if plain is not None and title not in ("teacher", "plain student"):
            gains = [run.test - base.test for run, base in zip(found, plain, strict=True)]
            gain, gain_std = f"{mean(gains):+.2f}", _spread(gains)
        numbers = [f"{mean(test):.2f}", _spread(test), f"{min(test):.2f}", f"{max(test):.2f}"]
        rows.append(
            [title, str(len(found)), *numbers, gain, gain_std, f"{mean(r.step_ms for r in found):.2f}"]
        )
    return header, rows


def timing_rows(timings: list[Timing]) -> tuple[list[str], Rows]:
    """One row per loss, batch and provider: median ms of forward and backward, and ratio to eager."""
    header = ["loss", "batch", "provider", "ms", "times_eager", "note"]
    eager = {(t.loss, t.batch): t.ms for t in timings if t.provider == "eager PyTorch"}
    rows = []
    for t in timings:
        base = eager.get((t.loss, t.batch))
        ratio = f"{base / t.ms:.2f}" if base and t.ms else ""
        rows.append([t.loss, str(t.batch), t.provider, f"{t.ms:.3f}" if t.ms else "", ratio, t.note])
    return header, rows


def _plot_curves(path: Path, runs: dict[str, list[Run]]) -> None:
    """Validation accuracy and training cross-entropy: mean over seeds, band from least to most."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    students = {title: found for title, found in runs.items() if title != "teacher"}
    for colour, (title, found) in zip(COLOURS * len(students), students.items(), strict=False):
        for axis, values in (
            (left, torch.tensor([r.validation for r in found])),
            (right, torch.tensor([r.cross_entropy for r in found])),
        ):
            epochs = range(1, values.shape[1] + 1)
            axis.plot(epochs, values.mean(0), color=colour, label=title, linewidth=1.6)
            axis.fill_between(epochs, values.amin(0), values.amax(0), color=colour, alpha=0.12, linewidth=0)
    level = mean(run.validation[-1] for run in runs["teacher"])
    left.axhline(level, color="black", linestyle=":", linewidth=1, label=f"teacher ({level:.1f} %)")
    left.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(None, 101))
    right.set(xlabel="epoch", ylabel="training cross-entropy", yscale="log")
    left.legend(frameon=False, loc="lower right")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_cka(path: Path, panels: dict[str, torch.Tensor]) -> None:
    """Heat maps: the teacher's layers upwards, the student's to the right."""
    count = len(panels)
    figure, axes = plt.subplots(
        1, count, figsize=(2.4 * count + 1.4, 3.9), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        rows, columns = values.shape
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto")
        for i in range(rows):
            for j in range(columns):
                value = float(values[i, j])
                colour = "black" if value > 0.6 else "white"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(
            range(columns), [f"conv {j + 1}" for j in range(columns - 1)] + ["logits"], fontsize=8
        )
        axis.set_yticks(range(rows), [f"conv {i + 1}" for i in range(rows - 1)] + ["logits"], fontsize=8)
        axis.set_xlabel("student layer")
    axes[0, 0].set_ylabel("teacher layer")
    figure.colorbar(image, ax=axes[0].tolist(), label="linear CKA", shrink=0.85)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(args: argparse.Namespace, runs: dict[str, list[Run]], timings: list[Timing]) -> str:
    """Write everything into ``args.out``; returns the tables, to print."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    accuracy, timing = accuracy_rows(runs), timing_rows(timings)
    _write_csv(out / "accuracy.csv", *accuracy)
    _write_csv(out / "loss_time.csv", *timing)
    seeds = [[title, str(r.seed), f"{r.test:.4f}"] for title, found in runs.items() for r in found]
    _write_csv(out / "runs.csv", ["method", "seed", "test_accuracy"], seeds)
    students = {title: found for title, found in runs.items() if title != "teacher"}
    panels = {"before training": torch.stack([r.cka_before for r in next(iter(students.values()))]).mean(0)}
    panels |= {
        f"after: {title}": torch.stack([r.cka for r in found]).mean(0) for title, found in students.items()
    }
    cka = [
        [title, str(i + 1), str(j + 1), f"{values[i, j]:.4f}"]
        for title, values in panels.items()
        for i in range(values.shape[0])
        for j in range(values.shape[1])
    ]
    _write_csv(out / "cka.csv", ["state", "teacher_layer", "student_layer", "cka"], cka)
    _plot_curves(out / "curves.png", runs)
    _plot_cka(out / "cka.png", panels)
    tables = (
        f"Test accuracy in %, {args.seeds} seeds (gain: over the plain student of the same seed):\n\n"
        f"{_markdown(*accuracy)}\n\n"
        f"Distillation loss, forward and backward, median ms (times_eager: eager's time over this one's):\n\n"
        f"{_markdown(*timing)}"
    )
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    (out / "report.md").write_text(
        f"""# Distilling handwritten digits

{tables}

Numbers: [accuracy.csv](accuracy.csv), [runs.csv](runs.csv) (every seed), [loss_time.csv](loss_time.csv),
[cka.csv](cka.csv).

![Training curves](curves.png)

Mean over seeds; the band reaches from the lowest to the highest seed.

![CKA between every teacher and every student layer](cka.png)

Mean over seeds, on test images, centred linear CKA by `kdfast.linear_cka`.

## Setting
- Teacher: six convolutions, 32 to 128 channels, 1,000 labelled images, {args.teacher_epochs} epochs.
- Student: three convolutions, 4 to 16 channels, {args.train_fraction:.0%} of these images, drawn for every seed;
  {args.epochs} epochs, batches of {args.batch_size}.
- Accuracy on 540 test images, taken once, after the last epoch. 257 others served to choose the default settings.
- A seed sets teacher, student, images and their order; all methods start from the same student.
- The time of a training step includes the teacher's forward pass where there is one.
- {device}, {torch.get_num_threads()} CPU threads (one for training), load {os.getloadavg()[0]:.1f} at the end;
  torch {torch.__version__}, kdfast {kdfast.__version__}. Times of a machine that is busy with other work say little.
"""
    )
    return f"{tables}\n\nReport: {out / 'report.md'}"
