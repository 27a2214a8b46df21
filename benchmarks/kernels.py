"""Which kernels a step launches, and how long each takes: where to look when a case is slow."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from .case import KDFAST
from .measure import Prepared, Row, step

STEPS = 5
Kernel = tuple[str, float, int]  # name, microseconds in all, launches in all


def profiler(device: torch.device) -> profile:
    gpu = device.type == "cuda"
    return profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU])


def warm_up() -> None:
    """The first profile of a process takes seconds to begin."""
    with profiler(torch.device("cuda")):
        torch.ones(1, device="cuda")
        torch.cuda.synchronize()


def mark() -> None:
    torch.cuda._sleep(1000)


def between_marks(found: profile) -> list[list[Kernel]]:
    """The kernels after each mark but the last, the longest first."""
    events = sorted(found.events(), key=lambda e: e.time_range.start)
    groups: list[dict[str, list[float]]] = []
    for event in events:
        if "spin_kernel" in event.name:
            groups.append({})
        elif groups and event.self_device_time_total > 0:
            groups[-1].setdefault(event.name, []).append(event.self_device_time_total)
    return [
        sorted(((name, sum(us), len(us)) for name, us in group.items()), key=lambda kernel: -kernel[1])
        for group in groups[:-1]
    ]


def kernels(prepared: Prepared, device: torch.device) -> list[Row]:
    """One row for each kernel (on the CPU: operator) of kdfast's providers and of torch.compile, the longest first.

    Microseconds and launches of one step.
    """
    gpu = device.type == "cuda"
    found = []
    for provider, row in prepared.timed:
        if provider.name not in (*KDFAST, "compile"):  # a published loop launches thousands
            continue
        with provider.context():
            step(provider.fn, prepared.inputs)
        with provider.context(), profiler(device) as profiled:
            for _ in range(STEPS):
                step(provider.fn, prepared.inputs)
            if gpu:
                torch.cuda.synchronize()
        events = profiled.key_averages()
        spent = [(e.self_device_time_total if gpu else e.self_cpu_time_total, e) for e in events]
        for us, event in sorted(spent, key=lambda pair: -pair[0]):
            if us:
                found.append(
                    {key: row[key] for key in ("family", "case", "dtype", "layout", "provider")}
                    | {"kernel": event.key[:80], "launches": event.count / STEPS, "us": round(us / STEPS, 2)}
                )
    return found
