"""Op ``result``: memory for what PyTorch's products write, kept by the C++ backend for the next result of its size."""

from __future__ import annotations

import torch
from torch import Tensor

from ._define import define


def _empty(like, size):
    return like.new_empty(size)


define("result", "(Tensor like, SymInt[] size) -> Tensor", _empty, _empty, None)
_result = torch.ops.kdfast.result.default


def result(like: Tensor, *size: int) -> Tensor:
    """A new contiguous tensor, not yet written, of ``like``'s type and device."""
    return _result(like, size)
