"""kdfast: fast, exact knowledge-distillation losses."""

import importlib
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from . import _extension

__version__ = "0.1.0"

if _extension.load_error is not None:
    warnings.warn(
        f"kdfast runs its PyTorch reference on the CPU, without its C++ kernels: {_extension.load_error}",
        RuntimeWarning,
        stacklevel=2,
    )

from . import sokd
from .backend import info, use_backend
from .class_means import ClassMeans, compute_class_means
from .losses.affinity import concatenation_affinity, dot_product_affinity, softmax_affinity
from .losses.attention import AttentionGuidedLoss, attention_masks
from .losses.crd import CRDLoss
from .losses.criss_cross import criss_cross_attention
from .losses.direction import (
    DirectionLoss,
    DirectionNormLoss,
    EmbeddingProjector,
    NormLoss,
    direction_norm_loss,
)
from .losses.features import AttentionTransferLoss, FGFILoss, FitNetLoss, ICKDLoss, imitation_mask
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
from .losses.logits import DISTLoss, DKDLoss, KDLoss, NKDLoss
from .losses.non_local import NonLocalBlock, NonLocalLoss
from .losses.pcka import MimicLoss, PatchLoss, PCKALoss
from .losses.review import ReviewKDLoss
from .losses.structured import StructuredKDLoss

if TYPE_CHECKING:
    from . import compat, recipes

__all__ = [
    "AttentionGuidedLoss",
    "AttentionTransferLoss",
    "CKALoss",
    "CRDLoss",
    "ClassMeans",
    "DISTLoss",
    "DKDLoss",
    "DirectionLoss",
    "DirectionNormLoss",
    "EmbeddingProjector",
    "FGFILoss",
    "FitNetLoss",
    "GramMMDLoss",
    "GramProducts",
    "ICKDLoss",
    "KDLoss",
    "LogitCKALoss",
    "MimicLoss",
    "NKDLoss",
    "NonLocalBlock",
    "NonLocalLoss",
    "NormLoss",
    "PCKALoss",
    "PairwiseAffinityLoss",
    "PatchLoss",
    "RCKALoss",
    "ReviewKDLoss",
    "SimilarityPreservingLoss",
    "StructuredKDLoss",
    "attention_masks",
    "compat",
    "compute_class_means",
    "concatenation_affinity",
    "criss_cross_attention",
    "direction_norm_loss",
    "dot_product_affinity",
    "gram_products",
    "imitation_mask",
    "info",
    "linear_cka",
    "recipes",
    "softmax_affinity",
    "sokd",
    "use_backend",
]


def __getattr__(name: str) -> ModuleType:
    """``kdfast.compat`` and ``kdfast.recipes``, imported when they are first used."""
    if name in ("compat", "recipes"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
