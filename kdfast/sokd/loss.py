"""SoKD around a base loss: what the base compares with is the refined teacher, where it compares the distinctive areas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..losses._common import Levels, Loss, check_choice, check_fits, levels, total, wide
from ..losses.crd import CRDLoss, check_indices
from ..losses.features import AttentionTransferLoss, ConvAdapter, check_adapter, check_maps
from ..losses.review import ReviewKDLoss
from .areas import DistinctiveAreas, Multiplicity
from .augmentation import FeatureAugmentation

Base = Literal["fitnet", "at", "crd", "reviewkd"]
BASES = ("fitnet", "at", "crd", "reviewkd")
Shapes = Sequence[int] | Sequence[Sequence[int]]


def _shape_list(name: str, shapes: Shapes) -> list[tuple[int, int, int]]:
    """(C, H, W) of every level; a channel count alone, of an embedding, is (C, 1, 1)."""
    listed = list(shapes) if isinstance(shapes, Sequence) else []
    if len(listed) == 3 and all(isinstance(v, int) for v in listed):
        listed = [listed]
    found = [(v, 1, 1) if isinstance(v, int) else tuple(v) for v in listed]
    if not found or any(len(v) != 3 or not all(isinstance(n, int) and n > 0 for n in v) for v in found):
        raise ValueError(f"{name}: need (C, H, W), or a list of such, one per level; got {shapes!r}")
    return found


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, C, H, W] times a mask [B, 1, h, w], read at the resolution of x."""
    return wide(x) * _at(mask, x)


def _at(mask: Tensor, x: Tensor) -> Tensor:
    return mask if mask.shape[2:] == x.shape[2:] else F.interpolate(mask, x.shape[2:], mode="nearest")


def _pooled(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, C, H, W] over a mask's pixels [B, C]; 0 where the mask is empty."""
    weight = _at(mask, x).flatten(1)  # [B, H W]
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
    return torch.bmm(wide(x).flatten(2), weight.to(wide(x).dtype)[:, :, None])[:, :, 0]


class SoKDLoss(Loss):
    """Student-oriented refinement of a base loss: weight (base_weight L_base + detection_weight L_D), per level.

    With the refined teacher map s(F_t) of :class:`FeatureAugmentation` and the areas' mask m of
    :class:`DistinctiveAreas` (of the adapted student map and s(F_t)), L_base is

    =============  =====================================================================================
    ``"fitnet"``   L_DA (Eq. 13), in place of the mean squared error over the whole map
    ``"at"``       attention transfer of m * F_s and m * s(F_t)
    ``"crd"``      contrast of the means of F_s and s(F_t) over m; one level
    ``"reviewkd"`` ReviewKD with s(F_t) in place of every teacher map; it has no areas, and no L_D
    =============  =====================================================================================

    Args:
        base: the loss to be refined.
        student_shape, teacher_shape: (C, H, W) of the maps, or a list, one per level; for ``"reviewkd"`` an embedding's
            entry may be its width alone. They size the adapters (:class:`ConvAdapter`) and the heads of the areas.
        augmentation: the policy; by default a new :class:`FeatureAugmentation`. Several losses may share one.
        options: further arguments of the base: of :class:`CRDLoss` (``num_samples`` is needed),
            :class:`AttentionTransferLoss` or :class:`ReviewKDLoss`; none for ``"fitnet"``.
        areas, multiplicity: see :class:`DistinctiveAreas`; ``area_options`` are its further arguments.
        base_weight, detection_weight: the paper's β (for ``"fitnet"``) and α, whose values it does not give; published
            code has 1 and 1, its tuned settings 1000 and 1000.
        weight: factor on the value.

    Call: ``(student, teacher, *inputs)`` with maps [B, C, H, W] or a sequence of levels; ``inputs`` go on to the base:
    ``index[, negatives]`` for ``"crd"``. The teacher is a target: it gets no gradient, nor does the policy, unless
    ``through_policy=True``, which second-order search needs. Every call in training mode draws anew from the policy;
    in evaluation mode the teacher is compared as it is.

    Source: Shen et al., ACM MM 2024, Secs. 3.2 to 3.4; plug-ins beyond FitNet and ReviewKD are not specified there.
    """

    def __init__(
        self,
        base: Base = "fitnet",
        *,
        student_shape: Shapes,
        teacher_shape: Shapes,
        augmentation: FeatureAugmentation | None = None,
        options: dict[str, Any] | None = None,
        areas: int = 8,
        multiplicity: Multiplicity = "sum",
        area_options: dict[str, Any] | None = None,
        base_weight: float = 1.0,
        detection_weight: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_choice("base", base, BASES)
        student = _shape_list("student_shape", student_shape)
        teacher = _shape_list("teacher_shape", teacher_shape)
        if len(student) != len(teacher):
            raise ValueError(
                f"student_shape and teacher_shape: need equally many levels, got {len(student)} and {len(teacher)}"
            )
        if base == "crd" and len(student) != 1:
            raise ValueError(f"student_shape: 'crd' compares one level, got {len(student)}")
        options = dict(options or {})
        if base == "fitnet" and options:
            raise ValueError(f"options: 'fitnet' takes none, got {sorted(options)}")
        if base == "crd" and "num_samples" not in options:
            raise ValueError("options: 'crd' needs num_samples, the size of the training set")
        self.base, self.base_weight, self.detection_weight = base, base_weight, detection_weight
        self.augmentation = FeatureAugmentation() if augmentation is None else augmentation
        widths = [[shape[0] for shape in shapes] for shapes in (student, teacher)]
        self.base_loss: nn.Module | None = None
        if base == "at":
            self.base_loss = AttentionTransferLoss(**options)
        elif base == "crd":
            self.base_loss = CRDLoss(widths[0][0], widths[1][0], **options)
        elif base == "reviewkd":
            self.base_loss = ReviewKDLoss(*widths, **options)
        self.adapters, self.areas = nn.ModuleList(), nn.ModuleList()
        if base != "reviewkd":
            self.adapters.extend(ConvAdapter(s, t) for s, t in zip(student, teacher, strict=True))
            settings = {"areas": areas, "multiplicity": multiplicity, **(area_options or {})}
            self.areas.extend(DistinctiveAreas(width, **settings) for width in widths[1])

    @property
    def components(self) -> list[dict[str, Tensor]]:
        """Of every level of the last call, detached: see :attr:`DistinctiveAreas.components`."""
        return [area.components for area in self.areas]

    def student_parameters(self) -> list[nn.Parameter]:
        """What trains with the student: adapters, heads of the areas and the base's modules, without the policy."""
        policy = {id(p) for p in self.augmentation.parameters()}
        return [p for p in self.parameters() if id(p) not in policy]

    def forward(
        self, student: Levels, teacher: Levels, *inputs: Tensor, through_policy: bool = False
    ) -> Tensor:
        pairs = self._pairs(student, teacher)
        if self.base == "crd":
            check_indices(pairs[0][0].shape[0], *inputs)
        refined = [t for _, t in pairs]
        if self.training:
            with torch.set_grad_enabled(through_policy and torch.is_grad_enabled()):
                refined = self.augmentation.augment(refined)
        if not through_policy:
            refined = [t.detach() for t in refined]
        if self.base == "reviewkd":
            loss = self.base_weight * self.base_loss([s for s, _ in pairs], refined)
        else:
            terms = [
                self._level(i, s, t, inputs) for i, ((s, _), t) in enumerate(zip(pairs, refined, strict=True))
            ]
            loss = total(terms)
        return self.weight * loss.float()

    def _level(self, level: int, student: Tensor, teacher: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        area, adapted = self.areas[level], self.adapters[level](student)
        detection, mask = area.detect(adapted, teacher)
        if self.base == "fitnet":
            value = area.area_loss(adapted, teacher, mask)
        elif self.base == "at":
            value = self.base_loss(_masked(student, mask), _masked(teacher, mask))
        else:
            value = self.base_loss(_pooled(student, mask), _pooled(teacher, mask), *inputs)
        area.components["area"] = value.detach()
        return self.base_weight * value + self.detection_weight * detection

    def search_loss(self, student: Levels, teacher: Levels, *, detach_student: bool = True) -> Tensor:
        """L_aug (Eq. 14) of the adapted student: what the policy minimises; see :meth:`FeatureAugmentation.search_loss`.

        Summed over levels. For ``"reviewkd"``, whose student maps exist only fused, it is half the loss itself.

        Args:
            detach_student: only the policy learns, as in the paper; adapters and student get no gradient.
        """
        pairs = self._pairs(student, teacher)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_student):
            if self.base != "reviewkd":
                compared = [adapt(s) for adapt, (s, _) in zip(self.adapters, pairs, strict=True)]
        if self.base != "reviewkd":
            return self.augmentation.search_loss(
                compared, [t for _, t in pairs], detach_student=detach_student
            )
        refined = self.augmentation.augment([t.detach() for _, t in pairs])
        given = [s.detach() if detach_student else s for s, _ in pairs]
        return 0.5 * self.base_loss(given, refined).float()

    def _pairs(self, student: Levels, teacher: Levels) -> list[tuple[Tensor, Tensor]]:
        pairs = levels(student, teacher)
        if self.base == "reviewkd":
            return self.base_loss.check([s for s, _ in pairs], [t for _, t in pairs])
        made = len(self.adapters)
        if len(pairs) != made:
            raise ValueError(f"student: {made} levels were configured, got {len(pairs)}")
        for adapt, (s, t) in zip(self.adapters, pairs, strict=True):  # before the policy and batch norms move
            check_maps(s, t)
            check_adapter(adapt, s, t)
            check_fits("teacher", t, adapt[0].weight)
        return pairs
