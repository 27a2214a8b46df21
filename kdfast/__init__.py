"""kdfast: fast, exact knowledge-distillation losses."""

__version__ = "0.1.0"

from .backend import info, use_backend
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
    "gram_products",
    "info",
    "linear_cka",
    "use_backend",
]
