"""How an op comes to exist: schema, fake and reference in Python; C++ and Triton only add implementations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from .. import _extension  # noqa: F401  (loading the extension registers its CPU and CUDA kernels)

_library = torch.library.Library("kdfast", "FRAGMENT")
_tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)


def define(
    name: str,
    signature: str,
    fake: Callable,
    reference: Callable,
    triton: Callable | None,
    triton_fake: Callable | None = None,
) -> None:
    """Define ``kdfast::name`` (C++ on CPU and CUDA, else the reference) and ``kdfast::name_triton``.

    Args:
        signature: the schema's argument and result part, ``"(Tensor x) -> Tensor"``.
        fake: shapes, dtypes and strides of the results; must hold for every implementation.
        reference: plain PyTorch implementation, used where no kernel is registered.
        triton: implementation by Triton kernels; imports Triton when first called. None: there is no such op.
        triton_fake: where a result that only the backward reads has another layout there.
    """
    ops = [(name, fake, reference)]
    if triton is not None:
        ops.append((f"{name}_triton", triton_fake or fake, triton))
    for op, op_fake, implementation in ops:
        _library.define(op + signature, tags=_tags)
        torch.library.register_fake(f"kdfast::{op}", op_fake, lib=_library)
        _library.impl(op, implementation, "CompositeExplicitAutograd")


def kernel(module: str, name: str) -> Callable:
    """The function ``name`` of ``kdfast.kernels.<module>``, which imports Triton, looked up when it is called."""

    path = f"kdfast.kernels.{module}"

    def call(*args):
        return getattr(sys.modules.get(path) or import_module(path), name)(*args)

    return call


def new_gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Results of a backward op, not yet written: laid out like the inputs, empty where no gradient is needed."""
    like = next(v for v in inputs if v is not None)
    return tuple(
        torch.empty_like(v) if need else like.new_empty(0) for v, need in zip(inputs, needed, strict=True)
    )


def reference_gradients(
    call: Callable, inputs: Sequence[Tensor | None], needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """A backward op by autograd: gradients of ``call(*inputs)``, a tensor or a tuple, as :func:`new_gradients` has them."""
    results = new_gradients(inputs, needed)
    with torch.enable_grad():
        inputs = [
            v if v is None else v.detach().requires_grad_(need)
            for v, need in zip(inputs, needed, strict=True)
        ]
        outputs = call(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    differentiated = [v for v, need in zip(inputs, needed, strict=True) if need]
    if not (used and differentiated):
        return tuple(r.zero_() for r in results)
    outputs, given = zip(*used, strict=True)
    found = iter(torch.autograd.grad(outputs, differentiated, given, materialize_grads=True))
    return tuple(r.copy_(next(found)) if need else r for r, need in zip(results, needed, strict=True))
