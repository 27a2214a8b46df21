"""Checks every provider of a case against float64, then times the right ones in turns."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import memory
from .case import KDFAST, Case, Provider, providers
from .ceilings import Ceilings

Row = dict[str, Any]

# Errors below this pass whatever eager's own error is; relative to the largest element.
FLOOR = 4 * torch.finfo(torch.float32).eps
# What kdfast's kernels are compared with may add up float32 in any order: n terms one after another leave about
# sqrt(n) eps where eager's cascades leave log(n) eps, and eager's error in one scalar may be small by luck. This is
# n = 2**14, a thirtieth of what TF32 products lose.
ANY_ORDER = 128 * torch.finfo(torch.float32).eps
MOST_COPIES, MOST_CALLS = 16, 8  # of the inputs in one CUDA graph, and in a row of calls from the host
SHARE_OF_MEMORY = 0.6
PAUSE = 20_000_000  # cycles of the device, about 10 ms


def step(fn: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """One training step's share of the loss: its value and fresh gradients.

    Where ``fn`` returns a map, the last of ``inputs`` is the gradient that comes back to it.
    """
    value = fn(*inputs)
    upstream = inputs[-1] if value.dim() else None
    return [value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad], upstream)]


class Prepared(NamedTuple):
    """A case whose providers were compiled and checked; ``timed`` are those that were right, with their rows."""

    case: Case
    inputs: list[Tensor]
    rows: list[Row]
    timed: list[tuple[Provider, Row]]


def prepare(case: Case, device: torch.device, only: Sequence[str] = ()) -> Prepared:
    """Runs every provider once and holds it against float64.

    Args:
        only: names of providers; all by default. Eager is always checked, since it sets the tolerance.
    """
    inputs = case.inputs(device)
    rows, timed = [], []
    try:
        truth, bounds = _truth(case, inputs, device)
    except _CannotRun as error:
        rows = [_row(case, p, status="not run", note=str(error)) for p in providers(case, device, only)]
        return Prepared(case, inputs, rows, timed)
    for provider in providers(case, device, only):
        row = _row(case, provider, input_mb=sum(map(_nbytes, inputs)) / 1e6)
        rows.append(row)
        try:
            _check(provider, inputs, truth, _allowed(provider, bounds), device, row)
            if row["status"] == "ok":
                timed.append((provider, row))
        except Exception as error:  # whatever a provider dies of belongs into its row, not into the whole run
            row.update(status="not run", note=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return Prepared(case, inputs, rows, timed)


def clock(
    prepared: Prepared, device: torch.device, ceilings: Ceilings, *, seconds: float, rounds: int
) -> list[Row]:
    """Memory and time of what was right: the rows of the case, one per provider, without the machine's description.

    Args:
        seconds: time spent on timing, shared by the providers; each is called at least once per round.
        rounds: how often the providers take turns.
    """
    case, inputs, rows, timed = prepared
    load = round(os.getloadavg()[0], 2)
    for row in rows:
        row["load"] = load
    if timed:
        _memory(timed, inputs, device)
        (_time_gpu if device.type == "cuda" else _time_cpu)(timed, inputs, seconds, rounds)
    _derive(case, rows, inputs, ceilings)
    return rows


def measure(
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    *,
    seconds: float,
    rounds: int,
    only: Sequence[str] = (),
) -> list[Row]:
    """:func:`prepare`, then :func:`clock`."""
    torch._dynamo.reset()  # every case compiles anew: recompilations are limited per function
    return clock(prepare(case, device, only), device, ceilings, seconds=seconds, rounds=rounds)


class _CannotRun(Exception):
    pass


def _row(case: Case, provider: Provider, **values: Any) -> Row:
    return {
        "family": case.family,
        "case": case.name,
        "source": case.source,
        "dtype": case.dtype_name,
        "layout": case.layout,
        "provider": provider.name,
        "status": "ok",
        **values,
    }


def _fits(nbytes: int, device: torch.device) -> None:
    free = memory.available(device)
    if free is not None and nbytes > SHARE_OF_MEMORY * free:
        raise _CannotRun(f"needs about {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def _truth(case: Case, inputs: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], list[float]]:
    """Value and gradients in float64, and the error each may have: twice that of eager, or of the case's own truth."""
    loss = case.truth or case.loss
    eager = Provider("eager", loss, "reference")
    _fits(2 * (0 if case.truth else case.memory) + 4 * sum(map(_nbytes, inputs)), device)
    exact = [_double(x) for x in inputs]
    with eager.context():
        truth = step(loss, exact)
        errors = _errors(step(loss, inputs), truth)
    floor = FLOOR * case.conditioning
    results = (
        [truth[0].to(inputs[0].dtype)] if truth[0].dim() else []
    )  # a map is rounded to its type, a loss is float32
    results += [x for x in inputs if x.requires_grad]
    rounding = [floor + torch.finfo(x.dtype).eps for x in results]
    rounding = rounding if truth[0].dim() else [FLOOR, *rounding]
    return truth, [2 * error + floor for error, floor in zip(errors, rounding, strict=True)]


def _allowed(provider: Provider, bounds: Sequence[float]) -> list[float]:
    """Errors of value and gradients with which a provider is timed; ``bounds``: those allowed to kdfast."""
    if provider.name in KDFAST:
        return list(bounds)
    return [max(bound + ANY_ORDER, provider.tolerance or 0.0) for bound in bounds]


def _double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def _check(
    provider: Provider,
    inputs: Sequence[Tensor],
    truth: Sequence[Tensor],
    allowed: Sequence[float],
    device: torch.device,
    row: Row,
) -> None:
    if provider.unavailable:
        row.update(status="not run", note=provider.unavailable)
        return
    _fits(provider.memory, device)
    with provider.context():
        errors = _errors(step(provider.fn, inputs), truth)
    row["error"] = max(errors)
    for name, error, bound in zip(
        ["value", *(f"gradient {i}" for i in range(1, len(errors)))], errors, allowed, strict=True
    ):
        if not error <= bound:  # NaN is refused too
            row.update(status="wrong", note=f"{name}: relative error {error:.2e}, allowed {bound:.2e}")
            return


def _errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Largest difference of each tensor, relative to the largest magnitude of the truth."""
    errors = []
    for f, t in zip(found, truth, strict=True):
        if f.shape != t.shape:
            errors.append(math.inf)
            continue
        scale = t.abs().max().item() if t.numel() else 0.0
        difference = (f.double() - t).abs().max().item() if t.numel() else 0.0
        errors.append(difference / scale if scale else difference)
    return errors


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _memory(timed: list[tuple[Provider, Row]], inputs: Sequence[Tensor], device: torch.device) -> None:
    """Peak of a step beyond the gradients, which every provider must allocate."""
    gradients = sum(_nbytes(x) for x in inputs if x.requires_grad)
    for provider, row in timed:
        with provider.context():
            grown = memory.peak(lambda fn=provider.fn: step(fn, inputs), device)
        row["extra_mb"] = None if grown is None else max(grown - gradients, 0) / 1e6


def _time_cpu(
    timed: list[tuple[Provider, Row]], inputs: Sequence[Tensor], seconds: float, rounds: int
) -> None:
    samples: dict[str, list[float]] = {provider.name: [] for provider, _ in timed}
    for _ in range(rounds):
        for provider, _row in timed:
            with provider.context():
                step(provider.fn, inputs)  # brings back what the provider before drove out of the caches
                samples[provider.name] += _wall(provider.fn, inputs, seconds / rounds / len(timed))
    for provider, row in timed:
        _summarise(row, samples[provider.name])
        row["wall_ms"] = row["median_ms"]


def _wall(fn: Callable[..., Tensor], inputs: Sequence[Tensor], seconds: float) -> list[float]:
    samples, end = [], time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        step(fn, inputs)
        now = time.perf_counter()
        samples.append(now - start)
        if now >= end:
            return samples


def _time_gpu(timed: list[tuple[Provider, Row]], inputs: list[Tensor], seconds: float, rounds: int) -> None:
    """Kernel time from CUDA graphs that walk through copies of the inputs, and wall time of eager calls.

    The copies fill twice the L2 cache if MOST_COPIES of them can; smaller inputs stay in it, as in
    training.
    """
    sets = _copies(inputs)
    copies = len(sets)
    graphs, kernel, wall = {}, {}, {}
    for provider, row in timed:
        kernel[provider.name], wall[provider.name] = [], []
        try:
            with provider.context():
                graphs[provider.name] = _graph(provider.fn, sets)
        except Exception as error:  # it copies from the host, or waits for the device
            row["note"] = f"timed without a CUDA graph: {type(error).__name__}: {error}".splitlines()[0][:200]
    share = seconds / rounds / max(len(timed), 1) / 2
    for _ in range(rounds):
        for provider, _row in timed:
            if provider.name in graphs:
                kernel[provider.name] += [t / copies for t in _replay(graphs[provider.name][0], share)]
            with provider.context():
                if provider.name not in graphs:
                    kernel[provider.name] += _queued(provider.fn, sets[:MOST_CALLS], share)
                wall[provider.name] += _wall_gpu(provider.fn, sets[:MOST_CALLS], share)
    for provider, row in timed:
        row["wall_ms"] = statistics.median(wall[provider.name]) * 1e3
        if kernel[provider.name]:
            _summarise(row, kernel[provider.name])


def _copies(inputs: list[Tensor]) -> list[list[Tensor]]:
    size = sum(map(_nbytes, inputs))
    cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    copies = min(max(2, -(-2 * cache // size)), MOST_COPIES)
    return [inputs] + [
        [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs] for _ in range(copies - 1)
    ]


def _graph(fn: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list]:
    """One step on every set of inputs; the results are kept, so that each step writes memory of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(fn, sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [step(fn, inputs) for inputs in sets]
    return graph, results


def _replay(graph: torch.cuda.CUDAGraph, seconds: float) -> list[float]:
    graph.replay()
    torch.cuda.synchronize()
    samples, end = [], time.perf_counter() + seconds
    while True:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1e3)
        if time.perf_counter() >= end:
            return samples


def _queued(fn: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]], seconds: float) -> list[float]:
    """Seconds per call of work queued behind a pause: the host is ahead, unless the call waits for the device."""
    samples, end = [], time.perf_counter() + seconds
    while True:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE)
        start.record()
        for inputs in sets:
            step(fn, inputs)
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1e3 / len(sets))
        if time.perf_counter() >= end:
            return samples


def _wall_gpu(fn: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]], seconds: float) -> list[float]:
    """Seconds per call of runs over all sets with one synchronisation at the end, as in a training loop."""
    samples, end = [], time.perf_counter() + seconds
    step(fn, sets[0])
    while True:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for inputs in sets:
            step(fn, inputs)
        torch.cuda.synchronize()
        now = time.perf_counter()
        samples.append((now - start) / len(sets))
        if now >= end:
            return samples


def _summarise(row: Row, samples: list[float]) -> None:
    low, *_, high = (
        statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 2
    )
    row.update(
        median_ms=statistics.median(samples) * 1e3, p20_ms=low * 1e3, p80_ms=high * 1e3, calls=len(samples)
    )


def _derive(case: Case, rows: list[Row], inputs: Sequence[Tensor], ceilings: Ceilings) -> None:
    """Speed-ups over the best provider that is not kdfast's, rates, and shares of the floor."""
    gradients = (x for x in inputs if x.requires_grad)
    working_set = sum(map(_nbytes, inputs)) + sum(map(_nbytes, gradients))
    floor = ceilings.floor(case.bytes, case.flops, working_set, case.dtype)
    for key, ratio in (("median_ms", "speedup"), ("wall_ms", "wall_speedup")):
        others = [row[key] for row in rows if key in row and row["provider"] not in KDFAST]
        for row in rows:
            if key in row and others:
                row[ratio] = min(others) / row[key]
    for row in rows:
        row["floor_ms"] = floor * 1e3
        if "median_ms" in row:
            took = row["median_ms"] / 1e3
            row.update(
                gb_per_s=case.bytes / took / 1e9,
                tflop_per_s=case.flops / took / 1e12,
                floor_share=floor / took,
            )
