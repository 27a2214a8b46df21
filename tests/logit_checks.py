"""Inputs and checks for the backends of the op ``logits``, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import assert_as_accurate
from torch import Tensor

import kdfast
from kdfast.ops.logits import logits
from kdfast.reference import logits as reference
from kdfast.reference.logits import KINDS

IGNORED = -100
# (kind, alpha, beta, temperature): NKD at T != 1 sums twice; both terms of each kind alone are covered by the formulas.
SETTINGS = [(kind, 1.3, 0.7, t) for kind in KINDS for t in (1.0, 4.0)]


def make(shape: tuple[int, ...], kind: str = "plain", device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels; the ways in which logits are hard."""
    generator = torch.Generator().manual_seed(sum(shape))
    s, t = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    y = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    if kind == "mean":
        s, t = s + 100, t - 200
    elif kind == "saturated":  # softmaxes of exactly one 1 in float32, at the target and elsewhere
        s.scatter_(-1, y[..., None], 200.0)
        t.scatter_(-1, ((y + (torch.arange(y.numel()).view(y.shape) % 2)) % shape[-1])[..., None], 300.0)
    elif kind == "converged":
        s = t + 1e-3 * torch.randn(shape, generator=generator)
    elif kind == "rising":  # the running maximum grows in every block
        s, t = s + torch.linspace(0, 80, shape[-1]), t + torch.linspace(0, 40, shape[-1])
    elif kind == "ignored":
        y.view(-1)[::3] = IGNORED
    return s.to(device), t.to(device), y.to(device)


def run(call, s: Tensor, t: Tensor) -> list[Tensor]:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    loss = call(s, t)
    gradients = torch.autograd.grad(loss, (s, t), torch.full_like(loss, 1.7), materialize_grads=True)
    return [loss.detach(), *gradients]


def check(
    backend: str | Callable, s: Tensor, t: Tensor, labels: Tensor | None, setting: tuple, floor: float = 2e-6
) -> None:
    """Value and both gradients of a backend, or of a function of (student, teacher), against the reference in float64.

    Memory that is not written is NaN.
    """
    kind, alpha, beta, temperature = setting
    settings = (KINDS.index(kind), alpha, beta, temperature, IGNORED)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return reference.logits(a, b, labels, *settings)

    def fast(a: Tensor, b: Tensor) -> Tensor:
        if callable(backend):
            return backend(a, b)
        with kdfast.use_backend(backend):
            return logits(a, b, labels, kind=kind, alpha=alpha, beta=beta, temperature=temperature)

    truth, same = run(plain, s.double(), t.double()), run(plain, s, t)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        found = run(fast, s, t)
    finally:
        torch.use_deterministic_algorithms(before)
    step = max(torch.finfo(v.dtype).eps if v.dtype in (torch.float16, torch.bfloat16) else 0 for v in (s, t))
    for name, f, w, e in zip(("loss", "grad_student", "grad_teacher"), found, truth, same, strict=True):
        if not e.isfinite().all():
            e = w  # the reference in the inputs' type may overflow; the op may not
        size = float(w.abs().max())
        allowed = floor * max(1.0, size) if name == "loss" else floor * size + step * size
        if name != "loss":  # where it vanishes by cancellation: probabilities times the mean's share
            allowed += floor * (alpha + beta) / max(1, s.numel() // s.shape[-1])
            if kind == "dist":  # columns whose norms are near 1e-4: only the 1e-8 holds their rounding down
                allowed += 2e-5
        if name == "grad_teacher":  # q (log(q / p) - value)
            allowed += floor * float(truth[0].abs())
        assert_as_accurate(f, w, e, allowed, f"{name} {setting}")
