"""Inputs and checks for the backends of the op ``direction``, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdfast import use_backend
from kdfast.ops.direction import direction
from kdfast.reference import direction as reference


def inputs(
    rows: int,
    columns: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    mean: float = 0.0,
    labelled: bool = True,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Both branches of Eq. 5 to 7, an ignored row, a class that is absent from the batch."""
    generator = torch.Generator().manual_seed(rows + columns)
    student, teacher = (torch.randn(rows, columns, generator=generator) + mean for _ in range(2))
    student[::2] *= 3
    centers = torch.randn(classes if labelled else rows, columns, generator=generator) + mean
    labels = None
    if labelled:
        labels = torch.randint(0, max(1, classes - 1), (rows,), generator=generator).to(device)
        if rows > 2:
            labels[rows // 2] = -100
    return student.to(device, dtype), teacher.to(device, dtype), centers.to(device, dtype), labels


def run(call, student: Tensor, teacher: Tensor | None, centers: Tensor, dtype: torch.dtype | None = None):
    """Loss and gradients of student and teacher, upstream gradient 2.5."""
    sides = [v if v is None else v.detach().to(dtype or v.dtype).requires_grad_() for v in (student, teacher)]
    loss = call(*sides, centers.to(dtype or centers.dtype))
    return [
        loss.detach(),
        *torch.autograd.grad(loss, [v for v in sides if v is not None], loss.new_tensor(2.5)),
    ]


def check(
    backend: str | Callable,
    student: Tensor,
    teacher: Tensor | None,
    centers: Tensor,
    labels: Tensor | None,
    *,
    balanced: bool = False,
    floor: float = 1e-6,
) -> None:
    """A backend, or a function of (student, teacher, centers), against the reference in float64.

    Memory that is not written is NaN.
    """

    def plain(s, t, c):
        return reference.direction(s, t, c, labels, balanced=balanced)

    def fast(s, t, c):
        if callable(backend):
            return backend(s, t, c)
        with use_backend(backend):
            return direction(s, t, c, labels, balanced=balanced)

    truth = run(plain, student, teacher, centers, torch.float64)
    same = run(plain, student, teacher, centers)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        found = run(fast, student, teacher, centers)
    finally:
        torch.use_deterministic_algorithms(before)
    for name, f, e, t in zip(("loss", "grad_student", "grad_teacher"), found, same, truth, strict=False):
        assert f.dtype == e.dtype and f.shape == e.shape, name
        size = float(t.abs().max()) if t.numel() else 0.0
        if name != "loss":  # the terms of a gradient that cancel have the size 1 / |s|
            norms = student.double().norm(dim=1)
            size = max(size, 2.5 / len(student) / float(norms[norms > 0].min()))
        error = float((f.double() - t).abs().max()) if t.numel() else 0.0
        allowed = 2 * float((e.double() - t).abs().max()) if t.numel() else 0.0
        allowed += floor * (max(size, 1) if name == "loss" else size)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, largest value {size:.3g}"
