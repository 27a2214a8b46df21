"""DirectNormLoss with the names, arguments and values of the published KD++ code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..class_means import ClassMeans
from ..losses.direction import direction_norm_loss


class DirectNormLoss(nn.Module):
    """Batch mean of 1 - <s, e_c> / max(|s|, |t|), times ``nd_loss_factor``.

    ``T_EMB`` is the parsed JSON ``{"class": [D floats]}`` (keys in any order) or a tensor [K, D]; a mapping is turned
    into a tensor once, not at every call: pass a new object where the means change. A class that the mapping lacks,
    which fails there, and a mean of length 0, NaN there, leave their samples out here.
    """

    def __init__(self, num_class: int = 100, nd_loss_factor: float = 1.0) -> None:
        super().__init__()
        self.num_class, self.nd_loss_factor = num_class, nd_loss_factor
        self._parsed: object = None
        self._means: Tensor | None = None

    def forward(
        self, s_emb: Tensor, t_emb: Tensor, T_EMB: Tensor | Mapping[str, Sequence[float]], labels: Tensor
    ) -> Tensor:
        means = self._class_means(T_EMB, s_emb.device)
        return direction_norm_loss(s_emb, t_emb, means, labels, weight=self.nd_loss_factor)

    def _class_means(self, means: Tensor | Mapping[str, Sequence[float]], device: torch.device) -> Tensor:
        if isinstance(means, Tensor):
            return means.to(device)
        if self._parsed is not means or self._means is None or self._means.device != device:
            found = ClassMeans.from_published(
                means, num_classes=max(self.num_class, 1 + max(map(int, means)))
            )
            self._parsed, self._means = means, found.compute().to(device)
        return self._means
