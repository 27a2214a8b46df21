"""Figures made from the CSV of one family on one device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import Row, by_case, fastest, provider_names

COLOURS = {
    "naive": "#b8b8b8",
    "eager": "#7f7f7f",
    "compile": "#e0a458",
    "cpu": "#2f6690",
    "triton": "#2f6690",
    "cuda": "#16425b",
}
HEADLINE = {"naive": "published code", "eager": "eager PyTorch", "compile": "torch.compile"}
MARKERS = {"naive": "x", "eager": "s", "compile": "D", "cpu": "o", "triton": "o", "cuda": "^"}


def draw(rows: Sequence[Row], folder: Path, family: str) -> list[Path]:
    """time-<family>.png: time relative to eager; floor-<family>.png: share of the floor."""
    timed = [row for row in rows if row["median_ms"]]
    if not timed:
        return []
    return [_times(timed, folder / f"{family}-time.png"), _floor(timed, folder / f"{family}-floor.png")]


def _times(rows: Sequence[Row], path: Path) -> Path:
    import numpy as np

    cases = {case: found for case, found in by_case(rows).items() if "eager" in found}
    names = [name for name in provider_names(rows) if name != "eager"]
    figure, axes = _figure(rows, list(cases), height=0.11 * len(names) + 0.16)
    places, thickness = np.arange(len(cases)), 0.8 / len(names)
    for i, name in enumerate(names):
        at, ratios = [], []
        for place, found in zip(places, cases.values(), strict=True):
            if name in found:
                at.append(place + (i - (len(names) - 1) / 2) * thickness)
                ratios.append(float(found[name]["median_ms"]) / float(found["eager"]["median_ms"]))
        # Bars start at eager's time: to the left is faster, to the right is slower.
        axes.barh(
            at, np.array(ratios) - 1, thickness * 0.92, left=1, label=_name(name), color=_colour(name, i)
        )
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    coarse = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000)
    fine = (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8)
    ticks = [t for t in coarse if _within(t, axes.get_xlim())]
    if len(ticks) < 3:
        ticks = sorted({*ticks, *(t for t in fine if _within(t, axes.get_xlim()))})
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("time of forward + backward relative to eager (left is faster)")
    return _save(figure, axes, path)


def _floor(rows: Sequence[Row], path: Path) -> Path:
    cases = by_case(rows)
    figure, axes = _figure(rows, list(cases), height=0.26)
    for i, name in enumerate(provider_names(rows)):
        points = [
            (100 * float(f[name]["floor_share"]), at) for at, f in enumerate(cases.values()) if name in f
        ]
        if points:
            shares, at = zip(*points, strict=True)
            marker = MARKERS.get(name, "v")
            axes.plot(shares, at, marker, label=_name(name), color=_colour(name, i), markersize=5)
    axes.set_xlim(0, max(100, axes.get_xlim()[1]))
    axes.axvline(100, color="black", linewidth=0.8)
    one = rows[0]
    axes.set_xlabel(
        "% of the floor: time that the formula's bytes and operations take at the measured copy bandwidth\n"
        f"({float(one['copy_gb_per_s']):.0f} GB/s from memory) and matrix rate "
        f"({float(one['matrix_tflop_per_s']):.3g} TFLOP/s in float32), over the time measured"
    )
    return _save(figure, axes, path)


def draw_headlines(headlines: dict[str, dict[str, Row]], folder: Path) -> list[Path]:
    """headlines.png: how many times as long published code, eager PyTorch and torch.compile take."""
    import numpy as np

    cases = {name: (found, fastest(found)) for name, found in headlines.items()}
    if not cases:
        return []
    providers, rows = ("naive", "eager", "compile"), [ours for _, ours in cases.values()]
    figure, axes = _figure(rows, list(cases), height=0.55)
    thickness = 0.26
    for i, provider in enumerate(providers):
        at, ratios = [], []
        for place, (found, ours) in enumerate(cases.values()):
            if provider in found:
                at.append(place + (i - 1) * thickness)
                ratios.append(float(found[provider]["median_ms"]) / float(ours["median_ms"]))
        axes.barh(
            at,
            np.array(ratios) - 1,
            thickness * 0.9,
            left=1,
            label=HEADLINE[provider],
            color=_colour(provider, i),
        )
        for y, ratio in zip(at, ratios, strict=True):
            axes.text(max(ratio, 1) * 1.04, y, f"{ratio:.3g}x", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as long as kdfast, forward + backward (logarithmic)")
    axes.margins(x=0.12)
    return [_save(figure, axes, folder / "headlines.png")]


def draw_roofline(rows: Sequence[Row], folder: Path) -> list[Path]:
    """roofline.png: what every float32 case reaches, by operations per byte that its formula needs."""
    rows = [
        r for r in rows if r["median_ms"] and r["dtype"] == "float32" and float(r["tflop_per_s"] or 0) > 0
    ]
    if not rows:
        return []
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    intensities = []
    for i, name in enumerate(provider_names(rows)):
        found = [row for row in rows if row["provider"] == name]
        rates = [1e3 * float(row["tflop_per_s"]) for row in found]  # GFLOP/s
        at = [rate / float(row["gb_per_s"]) for rate, row in zip(rates, found, strict=True)]
        intensities += at
        marker = MARKERS.get(name, "v")
        axes.plot(at, rates, marker, label=_name(name), color=_colour(name, i), markersize=4, alpha=0.8)
    bandwidth, peak = (float(rows[-1][k]) for k in ("copy_gb_per_s", "matrix_tflop_per_s"))
    x = np.geomspace(min(intensities) / 1.5, max(intensities) * 1.5, 200)
    axes.plot(x, np.minimum(bandwidth * x, 1e3 * peak), color="black", linewidth=1, label="ceilings")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of the formula, forward + backward")
    axes.set_ylabel("GFLOP/s reached (operations of the formula over time)")
    axes.set_title(
        f"{rows[-1]['device']}: copy {bandwidth:.0f} GB/s, float32 product {peak:.3g} TFLOP/s; data in cache can pass",
        fontsize=9,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    return [_save(figure, axes, folder / "roofline.png")]


def _figure(rows: Sequence[Row], labels: list[str], height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + height * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(
        f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}", fontsize=9, loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure, axes, path: Path) -> Path:
    axes.tick_params(axis="y", length=0)
    axes.xaxis.label.set_size(9)
    figure.legend(loc="outside upper right", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _name(provider: str) -> str:
    return f"kdfast {provider}" if provider in ("cpu", "triton", "cuda") else provider


def _colour(provider: str, index: int) -> str:
    return COLOURS.get(provider, ("#8d6a9f", "#6b9080", "#a44a3f")[index % 3])
