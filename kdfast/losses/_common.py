"""What every family's losses share: levels, weights and argument checks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ..reference._common import autocast_device

Levels = Tensor | Sequence[Tensor]


class Loss(nn.Module):
    """A distillation loss: ``forward(student, teacher)`` returns a float32 scalar >= 0, times ``weight``."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def extra_repr(self) -> str:
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{k}={v!r}" for k, v in settings.items())


def describe(x: object) -> str:
    """What came, for error messages: shape, dtype and device of a tensor, the type of anything else."""
    if isinstance(x, Tensor):
        return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    return type(x).__name__


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where it is: squares of half precision leave its range."""
    return x if x.dtype == torch.float64 else x.float()


def check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: need a tensor, got {describe(x)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: need a floating point tensor, got {describe(x)}")


def check_integers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: need an integer tensor, got {describe(x)}")


def check_pair(student: Tensor, teacher: Tensor, min_dim: int = 2) -> None:
    """Float tensors of at least ``min_dim`` axes on one device, with equally many samples (rows)."""
    check_float("student", student)
    check_float("teacher", teacher)
    if student.device != teacher.device:
        problem = "must be on one device"
    elif student.dim() < min_dim or teacher.dim() < min_dim:
        problem = f"need at least {min_dim} axes"
    elif student.shape[0] != teacher.shape[0]:
        problem = "must have equally many samples (axis 0)"
    else:
        return
    raise ValueError(
        f"student and teacher {problem}, got student {describe(student)}, teacher {describe(teacher)}"
    )


def check_fits(name: str, x: Tensor, weight: Tensor) -> None:
    """x is on the device of a module's layers and in their type; autocast makes types agree."""
    if x.device != weight.device:
        raise ValueError(
            f"{name}: need a tensor on {weight.device}, where this module's layers are, got {describe(x)}"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(autocast_device(x)):
        raise ValueError(
            f"{name}: need {str(weight.dtype).removeprefix('torch.')}, the type of this module's layers, got "
            f"{describe(x)}; convert one of them, or use autocast"
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, need one of {tuple(choices)}")


def levels(student: Levels, teacher: Levels) -> list[tuple[Tensor, Tensor]]:
    """Pairs of maps, one per level; a single tensor is one level."""
    if isinstance(student, Tensor) != isinstance(teacher, Tensor):
        raise TypeError(
            f"student and teacher must both be tensors or both be sequences of tensors, "
            f"got student {describe(student)}, teacher {describe(teacher)}"
        )
    if isinstance(student, Tensor):
        return [(student, teacher)]
    for name, maps in (("student", student), ("teacher", teacher)):
        if not isinstance(maps, Collection):
            raise TypeError(f"{name}: need a tensor or a sequence of tensors, got {describe(maps)}")
    if len(student) != len(teacher) or not len(student):
        raise ValueError(
            f"student and teacher need equally many levels, at least one: got {len(student)} and {len(teacher)}"
        )
    return list(zip(student, teacher, strict=True))


def nothing(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of an empty batch, where a mean is NaN: a float32 0 on the graph of both."""
    return student.flatten()[:0].sum(dtype=torch.float32) + teacher.flatten()[:0].sum(dtype=torch.float32)


def total(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def plus(value: Tensor, weight: float, term: Tensor) -> Tensor:
    """``value + weight * term``; in eager mode one op, since at small sizes ops cost more than arithmetic."""
    if weight == 1:
        return value + term
    if torch.compiler.is_compiling():  # a factor that changes in every epoch must not be compiled anew
        return value + weight * term
    return torch.add(value, term, alpha=weight)
