"""Drop-ins for the CKA losses of github.com/Klayand/PCKA (mmrazor registry): same arguments, keywords and values.

All are -weight * CKA, uncentred, and do not detach the teacher. ``student_logits`` and ``teacher_logits`` (the
published names) are feature maps [B, C, H, W]. Quirks kept on purpose: the inter term, switched on by a true
``inter_weight``, is multiplied by ``intra_weight``; ``with_l2_norm`` divides the rows of the Grams only;
``ce_weight`` is never used; ``combined_KD`` adds a KL divergence over the axis of the patches, divided by the number
of groups. Kept out: one patch crashes there, and a channel of zeros gives NaN; here their CKA is 1 and 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, kl_div, log_softmax

from ..losses._common import check_pair, wide
from ..losses._patches import grid_of, view
from ..losses.gram import LogitCKALoss
from ..losses.pcka import PCKALoss
from ._dist import DISTLoss
from ._fbkd import FBKDLoss, FBKDStudentConnector, FBKDTeacherConnector

__all__ = [
    "CKA_Yolo",
    "CenterKernelAlignmentRKD",
    "CenterKernelAlignmentRKD_batch",
    "CenterKernelAlignmentRKD_hw",
    "CenterKernelAlignmentSeg",
    "DISTLoss",
    "FBKDLoss",
    "FBKDStudentConnector",
    "FBKDTeacherConnector",
]


class _Published(nn.Module):
    """The published arguments, and -weight * CKA from a loss that is 1 - CKA."""

    def __init__(
        self,
        ce_weight: float = 1.0,
        intra_weight: float = 15,
        inter_weight: float | None = None,
        combined_KD: bool = False,
        temperature: float | None = None,
        with_l2_norm: bool = False,
    ) -> None:
        super().__init__()
        self.ce_weight, self.intra_weight, self.inter_weight = ce_weight, intra_weight, inter_weight
        self.combined_KD, self.temperature, self.with_l2_norm = combined_KD, temperature, with_l2_norm

    def _settings(self) -> dict:
        return {
            "intra_weight": self.intra_weight,
            "inter_weight": self.intra_weight if self.inter_weight else 0.0,
            "centered": False,
            "row_norm": "row" if self.with_l2_norm else "none",
        }

    def _similarity(self, distance: Tensor) -> Tensor:
        """-weight * CKA, intra plus inter, of the sum of their weighted distances."""
        return distance - self.intra_weight * (2 if self.inter_weight else 1)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL over axis 1, summed, divided by the size of axis 0; the teacher is detached."""
        target = log_softmax(wide(teacher.detach()) / self.temperature, 1)
        found = log_softmax(wide(student) / self.temperature, 1)
        return self.temperature**2 * kl_div(found, target, reduction="batchmean", log_target=True)


class _PatchCKA(_Published):
    _average = "channel"

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        loss = PCKALoss(average=self._average, **self._settings())
        total = self._similarity(loss(student_logits, teacher_logits))
        if self.combined_KD:
            grid = grid_of(student_logits, teacher_logits, (16, 16), "bilinear", self._average)
            student, teacher = (
                view(v, grid).flatten(3).flatten(1, 2) for v in (student_logits, teacher_logits)
            )
            total = total + self._divergence(student, teacher)  # [G, N, D]
        return total


class CenterKernelAlignmentRKD(_PatchCKA):
    """-intra_weight * mean CKA over channels of 16 x 16 patches (published PCKA).

    Maps [B, C, H, W] are resized bilinearly to multiples of 16; rows are patches, features images x pixels.

    Args:
        ce_weight: unused, as there.
        intra_weight: factor on both terms.
        inter_weight: any true value adds the CKA of the transposed matrices, times ``intra_weight`` (quirk kept).
        combined_KD: add the KL divergence of the patches (softmax over the N patches, times temperature², divided by
            the number of groups; quirk kept).
        temperature: of ``combined_KD``.
        with_l2_norm: divide row i of each Gram by sqrt(K_ii).
    """


class CenterKernelAlignmentRKD_batch(_PatchCKA):
    """As :class:`CenterKernelAlignmentRKD`, averaged over images: features are channels x pixels of a patch."""

    _average = "batch"


class CenterKernelAlignmentRKD_hw(_PatchCKA):
    """As :class:`CenterKernelAlignmentRKD`, averaged over the pixels of a patch: features are images x channels."""

    _average = "spatial"


class CenterKernelAlignmentSeg(_Published):
    """-intra_weight * CKA of segmentation logits: rows are images, features all values of an image.

    Arguments as :class:`CenterKernelAlignmentRKD`, with rows normalised by default, and

        soften: softmax over all values of an image / temperature, in the intra term only (quirk kept).

    The inter term compares the values' columns through N x N products. ``combined_KD`` takes its softmax over all
    values of an image.
    """

    def __init__(
        self,
        ce_weight: float = 1.0,
        intra_weight: float = 15,
        inter_weight: float | None = None,
        combined_KD: bool = False,
        temperature: float | None = None,
        with_l2_norm: bool = True,
        soften: bool = False,
    ) -> None:
        super().__init__(ce_weight, intra_weight, inter_weight, combined_KD, temperature, with_l2_norm)
        self.soften = soften

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        check_pair(student_logits, teacher_logits)
        student, teacher = student_logits.flatten(1), teacher_logits.flatten(1)
        settings = self._settings()
        if self.soften:
            intra = LogitCKALoss(**(settings | {"inter_weight": 0.0}), temperature=self.temperature)
            distance = intra(student, teacher)
            if self.inter_weight:
                distance = distance + LogitCKALoss(**(settings | {"intra_weight": 0.0}))(student, teacher)
        else:
            distance = LogitCKALoss(**settings)(student, teacher)
        total = self._similarity(distance)
        return total + self._divergence(student, teacher) if self.combined_KD else total


class CKA_Yolo(_Published):
    """-intra_weight * CKA of 64 random mixtures of the channels, on 16 x 16 patches of a random mixture of the images.

    Maps higher than 20 pixels go through a 4 x 4 convolution of stride 2 to 64 channels, others keep their channels (at
    least 64 are needed, the first 64 are used). Quirks kept: both random weights are drawn anew at every call, as there
    (the same seed gives the same weights); the sum over 64 groups is divided by the number of input channels;
    ``combined_KD`` has no effect.
    """

    groups = 64

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        channels, height = student_logits.shape[1:3]
        if teacher_logits.shape[1] != channels or (height <= 20 and channels < self.groups):
            raise ValueError(
                f"student_logits and teacher_logits need equally many channels, and {self.groups} where H <= 20, "
                f"got {list(student_logits.shape)} and {list(teacher_logits.shape)}"
            )
        student, teacher = wide(student_logits), wide(teacher_logits)
        if height > 20:
            nn.Conv2d(channels, self.groups, 4, stride=2, bias=False)  # its weights are replaced there
            noise = torch.randn(channels, self.groups, 4, 4) * 0.25
            kernel = noise.view(self.groups, channels, 4, 4).to(student)
            student, teacher = (conv2d(v, kernel, stride=2) for v in (student, teacher))
        mixture = nn.Conv2d(student.shape[0], 1, 1).to(student).requires_grad_(False)
        # The mixture of images and the resize commute: one image is resized instead of all.
        student, teacher = (
            mixture(v[:, : self.groups].transpose(0, 1)).transpose(0, 1) for v in (student, teacher)
        )
        loss = PCKALoss(**self._settings())(student, teacher)
        return self._similarity(loss) * (self.groups / channels)
