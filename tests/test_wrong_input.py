"""What losses say of inputs and settings that do not fit: the argument, what is needed, what came."""

from __future__ import annotations

import copy

import pytest
import torch

from kdfast import (
    AttentionGuidedLoss,
    CKALoss,
    ClassMeans,
    CRDLoss,
    DirectionLoss,
    DKDLoss,
    EmbeddingProjector,
    FGFILoss,
    FitNetLoss,
    GramMMDLoss,
    ICKDLoss,
    MimicLoss,
    NKDLoss,
    NonLocalBlock,
    NonLocalLoss,
    NormLoss,
    ReviewKDLoss,
    imitation_mask,
)
from kdfast.sokd import (
    DistinctiveAreas,
    FeatureAugmentation,
    SoKDLoss,
    areas_to_mask,
    masked_area_error,
)

X, MAP, INDEX = torch.randn(4, 6), torch.randn(2, 3, 8, 8), torch.arange(4)
BOXES = torch.tensor([[[0, 0, 1, 1]]])


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
    "direction without labels": (lambda: DirectionLoss(X)(X, X), TypeError, r"labels: need integers.*\[4, 6\] float32"),
    "norm list": (lambda: NormLoss()(X, [1]), ValueError, "teacher: kind='l2' needs .*got list"),
    "norm previous": (
        lambda: NormLoss("sifn")(X, previous_norms=1.0), ValueError, r"previous_norms: need a tensor \[4\].*float"
    ),
    "fgfi no mask": (lambda: FGFILoss()(MAP, MAP, None), TypeError, "mask: need a tensor, got NoneType"),
    "fgfi mask": (lambda: FGFILoss()(MAP, MAP, MAP), ValueError, r"mask: need \[B, H, W\] = \[2, 8, 8\].*\[2, 3"),
    "anchors": (lambda: imitation_mask(MAP.long(), X), TypeError, r"anchors: need a floating.*int64"),
    "anchor boxes": (lambda: imitation_mask(MAP[..., :4], [1]), TypeError, "boxes: need a tensor, got list"),
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
    "block type": (lambda: NonLocalBlock(3)(MAP.double()), ValueError, r"x: need float32, the type of.*float64"),
    "block device": (lambda: NonLocalBlock(3)(MAP.to("meta")), ValueError, r"x: need a tensor on cpu.*on meta"),
    "non-local student": (lambda: NonLocalLoss(3)(MAP[0], MAP), ValueError, r"student: need a map \[B, 3, H, W\]"),
    "non-local teacher": (lambda: NonLocalLoss(3)(MAP, MAP[0]), ValueError, r"teacher: need a map \[B, 3, H, W\]"),
    "adaptation": (
        lambda: AttentionGuidedLoss(3)(MAP.half(), MAP), ValueError, "student: need float32.*got.*float16.*autocast"
    ),
    "projector": (lambda: EmbeddingProjector(6, 4)(None), TypeError, "input: need a tensor, got NoneType"),
    "projector axes": (lambda: EmbeddingProjector(6, 4)(MAP), ValueError, r"input: need \[B, 6\], got \[2, 3, 8, 8\]"),
    "projector type": (lambda: EmbeddingProjector(6, 4)(X.double()), ValueError, "input: need float32.*float64"),
    "fitnet type": (lambda: FitNetLoss((3, 8, 8), (3, 8, 8))(MAP.half(), MAP), ValueError, "student: need float32"),
    "review type": (lambda: ReviewKDLoss([3], [3])([MAP.half()], [MAP]), ValueError, "student: need float32"),
    "areas type": (lambda: DistinctiveAreas(3)(MAP, MAP.half()), ValueError, "teacher: need float32"),
    "areas width": (lambda: DistinctiveAreas(4)(MAP, MAP), ValueError, r"need maps \[B, 4, H, W\], got \[2, 3, 8, 8\]"),
    "boxes": (lambda: areas_to_mask([[0, 0, 1, 1]], 4, 4), TypeError, "boxes: need an integer tensor, got list"),
    "height": (lambda: areas_to_mask(BOXES, -1, 4), ValueError, "height: need an integer of at least 0, got -1"),
    "width": (lambda: areas_to_mask(BOXES, 4, 4.5), ValueError, "width: need an integer of at least 0, got 4.5"),
    "area mask": (lambda: masked_area_error(MAP, MAP, None), TypeError, "mask: need a real tensor, got NoneType"),
    "area device": (
        lambda: masked_area_error(MAP, MAP, MAP[:, :1].to("meta")), ValueError, r"mask: need.*on cpu, got.*on meta"
    ),
    "augment": (lambda: FeatureAugmentation().augment(None), TypeError, "teacher: need a tensor or a seq.*NoneType"),
    "class means": (
        lambda: ClassMeans(5, 6).update(X, INDEX * 1j), TypeError, r"labels: need an integer tensor.*complex"
    ),
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


OTHER = torch.randn(2, 4, 8, 8)
PLAIN = {"student_shape": (3, 8, 8), "teacher_shape": (3, 8, 8)}
STATES = {
    "fitnet teacher": (lambda: FitNetLoss((3, 8, 8), (3, 8, 8)), (MAP, OTHER)),
    "fitnet size": (lambda: FitNetLoss((3, 8, 8), (3, 4, 4)), (MAP, MAP)),
    "ickd teacher": (lambda: ICKDLoss(3, 3), (MAP, OTHER)),
    "review second level": (lambda: ReviewKDLoss([3, 3], [3, 3]), ([MAP, MAP], [MAP, OTHER])),
    "non-local teacher": (lambda: NonLocalLoss(3, key_stride=1), (MAP, OTHER)),
    "non-local second level": (lambda: NonLocalLoss([3, 3], key_stride=1), ([MAP, MAP], [MAP, OTHER])),
    "non-local sizes": (lambda: NonLocalLoss(3, key_stride=1), (MAP, MAP[..., 1:])),
    "projector": (lambda: EmbeddingProjector(6, 4), (X[:, :5],)),
    "crd": (lambda: CRDLoss(6, 6, 10, feature_dim=8, num_negatives=3), (X, X, INDEX + 10)),
    "augment": (FeatureAugmentation, (MAP[0],)),
    "sokd teacher": (lambda: SoKDLoss(**PLAIN), (MAP, OTHER)),
    "sokd type": (lambda: SoKDLoss(**PLAIN), (MAP, MAP.half())),
    "sokd index": (lambda: SoKDLoss("crd", **PLAIN, options={"num_samples": 9}), (MAP, MAP, INDEX)),
    "sokd review": (
        lambda: SoKDLoss("reviewkd", student_shape=[(3, 8, 8)], teacher_shape=[(3, 8, 8)]), ([MAP], [OTHER])
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_wrong_input_moves_no_state(case):
    """Batch norms, memories and policies are as before: whoever catches the error goes on with the next batch."""
    make, inputs = STATES[case]
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises((ValueError, TypeError, IndexError)):
        module(*inputs)
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
        else:
            assert str(value) == str(before[name]), name


def test_search_loss_of_wrong_maps_draws_nothing():
    policy = FeatureAugmentation()
    before = policy.get_generator_state().clone()
    with pytest.raises(ValueError, match="need one shape"):
        policy.search_loss(MAP, OTHER)
    assert torch.equal(policy.get_generator_state(), before)


def test_an_overflow_does_not_stay_in_the_memory():
    """Rows of a batch that is not finite keep their memory; the next batches may draw them as negatives."""
    torch.manual_seed(0)
    loss = CRDLoss(6, 6, 10, feature_dim=8, num_negatives=3)
    broken = X.clone()
    broken[1] = float("inf")
    loss(broken, X, INDEX)
    assert loss.memory.isfinite().all()
    assert loss(X, X, INDEX, INDEX[:, None]).isfinite()
