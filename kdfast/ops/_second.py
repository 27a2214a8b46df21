"""Second derivatives: a backward that is itself to be differentiated goes through the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wanted() -> bool:
    """Whether this backward runs under ``create_graph=True``."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients(
    call: Callable, inputs: Sequence[Tensor | None], needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``call(*inputs)``, a tensor or a tuple, that can be differentiated; None where not needed."""
    with torch.enable_grad():
        # Aliases: one input may be computed from another, or be it, whose gradient must not come along that way too.
        inputs = [None if v is None else v.view_as(v) for v in inputs]
        outputs = call(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    outputs, given = zip(*used, strict=True)
    differentiated = [v for v, need in zip(inputs, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(outputs, differentiated, given, create_graph=True, materialize_grads=True)
    )
    return [next(found) if need else None for need in needed]
