"""What losses say of inputs and settings that do not fit: the argument, what is needed, what came."""

from __future__ import annotations

import pytest
import torch

from kdfast import (
    CKALoss,
    CRDLoss,
    DKDLoss,
    FGFILoss,
    FitNetLoss,
    GramMMDLoss,
    ICKDLoss,
    MimicLoss,
    NKDLoss,
    NonLocalBlock,
    NormLoss,
    ReviewKDLoss,
    imitation_mask,
)

X, MAP, INDEX = torch.randn(4, 6), torch.randn(2, 3, 8, 8), torch.arange(4)


def crd(*inputs, student_dim=6, **settings):
    loss = CRDLoss(student_dim, 6, 10, feature_dim=8, num_negatives=3, **settings)
    return loss(X, X, *inputs)


CASES = {
    "no levels": (lambda: CKALoss()(None, None), TypeError, "student: need a tensor or a sequence.*NoneType"),
    "levels once": (lambda: CKALoss()([X], iter([X])), TypeError, "teacher: need a tensor or a sequence.*iter"),
    "dkd without labels": (lambda: DKDLoss()(X, X, None), TypeError, "labels: need an integer tensor.*NoneType"),
    "nkd without labels": (lambda: NKDLoss()(X, X, None), TypeError, "labels: need an integer tensor.*NoneType"),
    "crd width": (lambda: crd(INDEX, student_dim=5), ValueError, r"student: need \[B, 5\].*\[4, 6\]"),
    "crd epsilon": (lambda: crd(INDEX, epsilon=-1.0), ValueError, "epsilon.*at least 0.*-1.0"),
    "crd list": (lambda: crd([0, 1, 2, 3]), TypeError, "index: need an integer tensor, got list"),
    "crd floats": (lambda: crd(INDEX.float()), TypeError, r"index: need an integer tensor, got \[4\] float32"),
    "crd bool": (lambda: crd(INDEX, X > 0), TypeError, r"negatives: need an integer tensor, got \[4, 6\] bool"),
    "crd rows": (lambda: crd(INDEX, INDEX[:3, None]), ValueError, r"negatives: need \[4, n\].*\[3, 1\]"),
    "crd none": (lambda: crd(INDEX, INDEX[:, None][:, :0]), ValueError, r"n >= 1.*\[4, 0\]"),
    "crd device": (lambda: crd(INDEX, INDEX[:, None].to("meta")), ValueError, "the device of index.*meta.*cpu"),
    "norm list": (lambda: NormLoss()(X, [1]), ValueError, "teacher: kind='l2' needs .*got list"),
    "norm previous": (
        lambda: NormLoss("sifn")(X, previous_norms=1.0), ValueError, r"previous_norms: need a tensor \[4\].*float"
    ),
    "fgfi no mask": (lambda: FGFILoss()(MAP, MAP, None), TypeError, "mask: need a tensor, got NoneType"),
    "fgfi mask": (lambda: FGFILoss()(MAP, MAP, MAP), ValueError, r"mask: need \[B, H, W\] = \[2, 8, 8\].*\[2, 3"),
    "anchors": (lambda: imitation_mask(MAP.long(), X), TypeError, r"anchors: need a floating.*int64"),
    "boxes": (lambda: imitation_mask(MAP[..., :4], [1]), TypeError, "boxes: need a tensor, got list"),
    "fitnet shape": (lambda: FitNetLoss((3, 8), (3, 8)), ValueError, r"student_shape: need \(C, H, W\), got \(3, 8\)"),
    "fitnet levels": (
        lambda: FitNetLoss([(3, 8, 8)] * 2, [(3, 8, 8)]), ValueError, "student_shape and teacher_shape.*equally many"
    ),
    "fitnet map": (lambda: FitNetLoss((4, 8, 8), (3, 8, 8))(MAP, MAP), ValueError, r"\[B, 4, H, W\].*\[2, 3, 8, 8\]"),
    "fitnet count": (lambda: FitNetLoss((3, 8, 8), (3, 8, 8))([MAP] * 2, [MAP] * 2), ValueError, "need 1 levels.*2"),
    "ickd one": (lambda: ICKDLoss(3), ValueError, "student_channels and teacher_channels: need both.*3 and None"),
    "ickd levels": (lambda: ICKDLoss([3], 3), ValueError, r"need one each, or equally many levels, got \[3\] and 3"),
    "ickd map": (lambda: ICKDLoss(4, 3)(MAP, MAP), ValueError, r"student: need maps \[B, 4, H, W\].*\[2, 3, 8, 8\]"),
    "mimic levels": (lambda: MimicLoss([3, 4], [3]), ValueError, r"equally many levels.*\[3, 4\] and \[3\]"),
    "review student": (lambda: ReviewKDLoss([4], [3])([MAP], [MAP]), ValueError, r"student: need \[B, 4, H, W\].*\[2, 3"),
    "review teacher": (lambda: ReviewKDLoss([3], [4])([MAP], [MAP]), ValueError, r"teacher: need \[B, 4, H, W\].*\[2, 3"),
    "review axes": (lambda: ReviewKDLoss([3], [3])([MAP[..., 0]], [MAP]), ValueError, r"student.*got \[2, 3, 8\]"),
    "review tensor": (lambda: ReviewKDLoss([3], [3])([None], [MAP]), TypeError, "student: need a tensor, got None"),
    "patch": (lambda: GramMMDLoss(patch_size=2.0), ValueError, "patch_size: need a positive int or a pair.*2.0"),
    "block channels": (lambda: NonLocalBlock(0), ValueError, "^in_channels: need an integer above 0, got 0"),
    "block inner": (lambda: NonLocalBlock(4, -1), ValueError, "inter_channels: need an integer above 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_messages(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_levels_may_come_as_any_collection():
    levels = {"P3": X, "P4": X + 1}
    assert CKALoss()(levels.values(), [X + 2, X]) == CKALoss()([X, X + 1], [X + 2, X])


def test_indices_may_be_int32():
    torch.manual_seed(0)
    loss = CRDLoss(6, 6, 10, feature_dim=8, num_negatives=3).eval()
    negatives = torch.randint(10, (4, 3))
    assert loss(X, X, INDEX.int(), negatives.int()) == loss(X, X, INDEX, negatives)
