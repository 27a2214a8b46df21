"""What the CUDA C++ kernels of the ops ``logits`` and ``direction`` take, and where they come before Triton's."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one side up to which launches are taken to cost more than memory: 4 to 16 MB. Not measured.
SMALL = 1 << 22


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
