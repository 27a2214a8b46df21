"""How long a distillation loss takes, forward and backward, with every provider that this machine has."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from _digits import ConvNet, Output, Split
from torch import Tensor, nn

import kdfast

ROUNDS, ROUND_SECONDS = 15, 0.02


class Timing(NamedTuple):
    """Median milliseconds of one call, forward and backward; ``note`` says why where there is none."""

    loss: str
    batch: int
    provider: str
    ms: float | None
    note: str = ""


class Provider(NamedTuple):
    name: str
    backend: str
    loss: nn.Module


def _providers(loss: nn.Module, device: str, compiled: bool) -> tuple[list[Provider], dict]:
    """What can be timed, and the reasons for what cannot."""
    found, missing = [Provider("eager PyTorch", "reference", loss)], {}
    if compiled:
        found.append(Provider("torch.compile", "reference", torch.compile(loss, dynamic=False)))
    available = kdfast.info()["backends"]
    for backend in ("cpu",) if device == "cpu" else ("triton", "cuda"):
        if available[backend] == "available":
            found.append(Provider(f"kdfast ({backend})", backend, loss))
        else:
            missing[f"kdfast ({backend})"] = available[backend]
    return found, missing


def _call(
    provider: Provider, student: Output, teacher: Output, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    # Parameters train with the student. All providers owe their gradients: torch.compile computes them in any case.
    inputs = [*student.stages, student.embedding, student.logits, *provider.loss.parameters()]
    value = provider.loss(student, teacher, labels)
    return value.detach(), torch.autograd.grad(value, inputs, allow_unused=True)


def _agrees(result: tuple, expected: tuple) -> bool:
    pairs = [(result[0], expected[0]), *zip(result[1], expected[1], strict=True)]
    return all(
        (a is None) == (b is None) and (a is None or (a - b).norm().item() <= 1e-3 * b.norm().item() + 1e-6)
        for a, b in pairs
    )


def _seconds(call: Callable[[], object], times: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def _outputs(student: ConvNet, teacher: ConvNet, split: Split, batch: int) -> tuple[Output, Output, Tensor]:
    """What the networks show for ``batch`` images, cut from them, so that only the loss is measured."""
    batch = min(batch, len(split.labels))
    with torch.no_grad():
        s, t = student(split.images[:batch]), teacher(split.images[:batch])
    stages = [x.requires_grad_() for x in s.stages]
    return (
        Output(s.layers, stages, s.embedding.requires_grad_(), s.logits.requires_grad_()),
        t,
        split.labels[:batch],
    )


def time_losses(
    losses: dict[str, nn.Module],
    student: ConvNet,
    teacher: ConvNet,
    split: Split,
    *,
    sizes: tuple[int, ...],
    compiled: bool,
) -> list[Timing]:
    """Time every loss at every batch size: providers in turn, several rounds, the median of the rounds.

    Args:
        losses: name -> loss.

    A provider whose value or gradient differs from eager PyTorch is named in the table and not timed.
    """
    device, timings = split.images.device.type, []
    for title, loss in losses.items():
        for size in dict.fromkeys(min(size, len(split.labels)) for size in sizes):
            arguments = _outputs(student, teacher, split, size)
            providers, missing = _providers(loss, device, compiled)
            expected, repeats, rounds = None, {}, {}
            for provider in providers:
                try:
                    with kdfast.use_backend(provider.backend):
                        result = _call(provider, *arguments)
                        expected = expected or result
                        if not _agrees(result, expected):
                            missing[provider.name] = "differs from eager PyTorch"
                            continue
                        once = _seconds(lambda p=provider, a=arguments: _call(p, *a), 2, device)
                except (
                    Exception
                ) as error:  # no compiler, or a call that a backend cannot do: part of the report
                    missing[provider.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    continue
                repeats[provider.name], rounds[provider.name] = max(1, int(ROUND_SECONDS / once)), []
            for _ in range(ROUNDS):
                for provider in providers:
                    if provider.name in repeats:
                        with kdfast.use_backend(provider.backend):
                            seconds = _seconds(
                                lambda p=provider, a=arguments: _call(p, *a), repeats[provider.name], device
                            )
                        rounds[provider.name].append(1000 * seconds)
            timings += [Timing(title, size, name, median(found)) for name, found in rounds.items()]
            timings += [Timing(title, size, name, None, reason) for name, reason in missing.items()]
    return timings
