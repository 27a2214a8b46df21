"""Processes that prepare at once, each what it takes next, and then time one after another."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Shared(NamedTuple):
    """What the processes share. Times are on the clock of ``time.monotonic``, which they share too."""

    jobs: int
    results: Any  # queue; None says that a process has put its last
    taken: Any  # counter: places in the work that are given out
    ready: Any  # counter: processes that have prepared
    turn: Any  # lock of the one that times

    def meet(self, prepared_by: float, hold: Path | None) -> None:
        """Waits until all have prepared or it is late, and nobody holds the machine with the file ``hold``."""
        with self.ready.get_lock():
            self.ready.value += 1
        while (self.ready.value < self.jobs and time.monotonic() < prepared_by) or (hold and hold.exists()):
            time.sleep(0.05)


def run(work: Callable[..., None], arguments: tuple, jobs: int, end: float = math.inf) -> Iterator[Any]:
    """What ``jobs`` processes of ``work(shared, *arguments)`` put into the results, until ``end``."""
    context = torch.multiprocessing.get_context("spawn")
    shared = Shared(jobs, context.Queue(), context.Value("i", 0), context.Value("i", 0), context.Lock())
    workers = [context.Process(target=work, args=(shared, *arguments), daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    working = jobs
    while working and time.monotonic() < end:
        try:
            found = shared.results.get(timeout=1)
        except queue.Empty:
            # A process that died (a kernel that ran over its memory takes the whole process) says nothing any more.
            working = min(working, sum(worker.is_alive() for worker in workers))
            continue
        if found is None:
            working -= 1
        else:
            yield found
    for worker in workers:
        worker.join(timeout=10 if math.isinf(end) else 0)
        worker.kill()
