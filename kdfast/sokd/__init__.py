"""Student-oriented refinement of the teacher (SoKD; Shen et al., ACM MM 2024)."""

from .areas import AreaMaps, DistinctiveAreas, areas_to_mask, decode_areas, masked_area_error
from .augmentation import OPERATIONS, FeatureAugmentation
from .bilevel import SETTINGS, PolicySearch, SearchSettings, TrainingSettings
from .loss import SoKDLoss

__all__ = [
    "OPERATIONS",
    "SETTINGS",
    "AreaMaps",
    "DistinctiveAreas",
    "FeatureAugmentation",
    "PolicySearch",
    "SearchSettings",
    "SoKDLoss",
    "TrainingSettings",
    "areas_to_mask",
    "decode_areas",
    "masked_area_error",
]
