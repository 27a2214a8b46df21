"""What the CUDA C++ kernels of the ops ``logits`` and ``direction`` take, and where they come before Triton's."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one side up to which CUDA comes first: on an H200 it takes up to a tenth more GPU time than Triton at
# 8 million elements, and a quarter to a half of the host's time at every size.
SMALL = 1 << 23


def order(student: Tensor) -> tuple[str, ...]:
    """Backends on a GPU, best first: one C++ call where launches decide, Triton for what is larger."""
    return ("cuda", "triton") if student.numel() <= SMALL else ("triton", "cuda")


def unsupported(student: Tensor, teacher: Tensor | None, centers: Tensor | None = None) -> str | None:
    """Why the CUDA kernels cannot take these tensors, or None when they can. Shapes and strides do not matter."""
    if teacher is not None and teacher.dtype != student.dtype:
        return f"it needs student and teacher of one type, got {student.dtype} and {teacher.dtype}"
    if centers is not None and centers.dtype != student.dtype:
        if centers.dtype != torch.float32 or student.dtype == torch.float64:
            return (
                f"it needs centers of the student's type or float32, got {centers.dtype} and {student.dtype}"
            )
    return None
