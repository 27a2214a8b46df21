"""Structured knowledge distillation: attention transfer, attention masks and non-local relations together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ._common import Levels, Loss, check_choice
from .attention import PRESETS, AttentionGuidedLoss, Channels
from .non_local import Kind, NonLocalLoss

Preset = Literal["two_stage", "one_stage", "paper_two_stage", "paper_one_stage"]

# gamma, the factor on L_NLD; alpha, beta and the rest are AttentionGuidedLoss's presets of the same names.
NON_LOCAL_WEIGHTS = {
    "two_stage": 7e-5,
    "one_stage": 4.2e-4,
    "paper_two_stage": 7e-5,
    "paper_one_stage": 4e-4,
}


class StructuredKDLoss(Loss):
    """alpha L_AT + beta L_AM + gamma L_NLD, what is added to a detector's own loss (Eq. 6).

    Args:
        channels: of the maps: an int, or (student, teacher), for one level; a list of such, one per level, for
            several. Two ints in a tuple are (student, teacher).
        preset: weights, temperature, channel mask and pooling: of the published code for ``"two_stage"`` and
            ``"one_stage"`` detectors, or of the paper's text (``"paper_..."``), which swaps alpha and beta and the two
            temperatures, and compares means of |A|.
        kind, key_stride: of the non-local blocks; see :class:`NonLocalLoss`.
        adapt: adapt the student before it is compared, in all terms (Sec. IV-G); needed where widths differ.
        weight: factor on the value.
        attention: further arguments of :class:`AttentionGuidedLoss`, over those of the preset.

    Shape: student [B, C, H, W], teacher [B, C', H, W], or sequences of such levels. Differentiable in both, and in
    the adaptation layers and non-local blocks: give ``parameters()`` of this module to the optimiser. Norms are not
    squared and run over the whole batch, as published.

    Attributes:
        components: ``{"L_AT", "L_AM", "L_NLD"}``, the three terms of the last value, with all their factors, detached:
            they sum to it. They stay on their device; empty before the first call.

    Raises:
        ValueError, TypeError: an unknown preset or kind; maps that do not fit together or ``channels``.

    Source: Zhang & Ma, Structured Knowledge Distillation for Accurate and Efficient Object Detection, TPAMI 2023.
    """

    def __init__(
        self,
        channels: Channels | Sequence[Channels],
        *,
        preset: Preset = "two_stage",
        kind: Kind = "dot_product",
        key_stride: int | Sequence[int] | None = None,
        adapt: bool = True,
        weight: float = 1.0,
        **attention: Any,
    ) -> None:
        super().__init__(weight)
        check_choice("preset", preset, tuple(PRESETS))
        self.attention = AttentionGuidedLoss.preset(preset, channels, adapt=adapt, **attention)
        self.non_local = NonLocalLoss(
            channels, kind=kind, key_stride=key_stride, adapt=adapt, weight=NON_LOCAL_WEIGHTS[preset]
        )
        self._components: dict[str, Tensor] = {}

    @property
    def components(self) -> dict[str, Tensor]:
        return self._components

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        attention, transfer, masked = self.attention.terms(student, teacher)
        relations = self.non_local(student, teacher)
        terms = {"L_AT": transfer, "L_AM": masked, "L_NLD": relations.detach()}
        self._components = {name: self.weight * term.float() for name, term in terms.items()}
        return self.weight * (attention.float() + relations)
