"""How an op comes to exist: schema, fake and reference in Python; C++ and Triton only add implementations."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _extension  # noqa: F401  (loading the extension registers its CPU and CUDA kernels)

_library = torch.library.Library("kdfast", "FRAGMENT")
_tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)


def define(
    name: str,
    signature: str,
    fake: Callable,
    reference: Callable,
    triton: Callable,
    triton_fake: Callable | None = None,
) -> None:
    """Define ``kdfast::name`` (C++ on CPU and CUDA, else the reference) and ``kdfast::name_triton``.

    Args:
        signature: the schema's argument and result part, ``"(Tensor x) -> Tensor"``.
        fake: shapes, dtypes and strides of the results; must hold for every implementation.
        reference: plain PyTorch implementation, used where no kernel is registered.
        triton: implementation by Triton kernels; imports Triton when first called.
        triton_fake: where a result that only the backward reads has another layout there.
    """
    for op, op_fake in ((name, fake), (f"{name}_triton", triton_fake or fake)):
        _library.define(op + signature, tags=_tags)
        torch.library.register_fake(f"kdfast::{op}", op_fake, lib=_library)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(f"{name}_triton", triton, "CompositeExplicitAutograd")
