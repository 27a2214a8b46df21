"""Which kernels a step launches, and how long each takes: where to look when a case is slow."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from .case import KDFAST
from .measure import Prepared, Row, step

STEPS = 5


def kernels(prepared: Prepared, device: torch.device) -> list[Row]:
    """One row for each kernel (on the CPU: operator) of kdfast's providers and of torch.compile, the longest first.

    Microseconds and launches of one step.
    """
    gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    found = []
    for provider, row in prepared.timed:
        if provider.name not in (*KDFAST, "compile"):  # a published loop launches thousands
            continue
        with provider.context():
            step(provider.fn, prepared.inputs)
        with provider.context(), profile(activities=[activity]) as profiler:
            for _ in range(STEPS):
                step(provider.fn, prepared.inputs)
            if gpu:
                torch.cuda.synchronize()
        events = profiler.key_averages()
        spent = [(e.self_device_time_total if gpu else e.self_cpu_time_total, e) for e in events]
        for us, event in sorted(spent, key=lambda pair: -pair[0]):
            found.append(
                {key: row[key] for key in ("family", "case", "dtype", "layout", "provider")}
                | {"kernel": event.key[:80], "launches": event.count / STEPS, "us": round(us / STEPS, 2)}
            )
    return found
