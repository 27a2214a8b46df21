"""kdfast: fast, exact knowledge-distillation losses."""

import warnings

from . import _extension

__version__ = "0.1.0"

if _extension.load_error is not None:
    warnings.warn(
        f"kdfast runs its PyTorch reference on the CPU, without its C++ kernels: {_extension.load_error}",
        RuntimeWarning,
        stacklevel=2,
    )

from .backend import info, use_backend
from .losses.attention import AttentionGuidedLoss, attention_masks
from .losses.gram import (
    CKALoss,
    GramMMDLoss,
    GramProducts,
    LogitCKALoss,
    PairwiseAffinityLoss,
    RCKALoss,
    SimilarityPreservingLoss,
    gram_products,
    linear_cka,
)
from .losses.pcka import MimicLoss, PatchLoss, PCKALoss

__all__ = [
    "AttentionGuidedLoss",
    "CKALoss",
    "GramMMDLoss",
    "GramProducts",
    "LogitCKALoss",
    "MimicLoss",
    "PCKALoss",
    "PairwiseAffinityLoss",
    "PatchLoss",
    "RCKALoss",
    "SimilarityPreservingLoss",
    "attention_masks",
    "gram_products",
    "info",
    "linear_cka",
    "use_backend",
]
