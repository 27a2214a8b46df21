"""What the CUDA C++ kernels of the op ``attention_mask`` take, and which maps are small: there launches decide."""

from __future__ import annotations

import torch
from torch import Tensor

# csrc/cuda/attention_mask_op.cpp checks the same limit.
MAX_BATCH = 65535
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Up to here the host's time counts, which is less for launches by C++, though Triton has one fewer and reads the maps
# once less: strides 32 and 64 of two images.
# Not measured.
SMALL_ELEMENTS = 1 << 20


def unsupported(x: Tensor) -> str | None:
    """Why the CUDA kernels cannot take maps like ``x`` [B, C, H, W], or None when they can."""
    if x.dtype not in DTYPES:
        return f"it takes float32, float16 or bfloat16 maps, got {x.dtype}"
    if not 0 < x.shape[0] <= MAX_BATCH:
        return f"it takes 1 to {MAX_BATCH} images, got {x.shape[0]}"
    return None


def is_small(x: Tensor) -> bool:
    return x.numel() <= SMALL_ELEMENTS
