"""Peak memory of PCKA on whole patches of one image, printed as JSON: {case: bytes beyond the gradient / bytes of both maps}.

A process of its own, since a heap that other tests have used takes up freed memory in other ways: run by test_patch_gram.py.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import kdfast
from benchmarks.memory import peak

AVERAGES, DTYPES, INTER, THREADS = (
    ("channel", "batch", "spatial"),
    ("float32", "bfloat16"),
    (0.0, 1.0),
    (1, 2),
)
CASES = {
    f"{average}-{dtype}-{'inter' if inter else 'intra'}-{threads}": (average, dtype, inter, threads)
    for average, dtype, inter, threads in itertools.product(AVERAGES, DTYPES, INTER, THREADS)
}


def share(average: str, dtype: str, inter: float, threads: int) -> float | None:
    """None where the machine does not say how much memory a process takes."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 256, 96, 160, generator=generator).to(getattr(torch, dtype)) for _ in range(2)
    )
    student.requires_grad_()
    loss = kdfast.PCKALoss(average=average, inter_weight=inter)
    torch.set_num_threads(threads)
    found = peak(lambda: torch.autograd.grad(loss(student, teacher), student), student.device)
    gradient = student.numel() * student.element_size()
    return None if found is None else (found - gradient) / (2 * gradient)


if __name__ == "__main__":
    print(json.dumps({name: share(*case) for name, case in CASES.items()}))
