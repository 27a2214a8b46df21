"""What every public loss promises, whatever its formula: types, devices, empty batches, checkpoints, copies."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast import sokd
from kdfast.compat import mmrazor


def rows(n=6, d=12):
    return torch.randn(n, d)


def maps(c=8, h=12, w=12, b=3):
    return torch.randn(b, c, h, w)


def labels(n=6, k=5):
    return torch.arange(n) % k


class FBKD(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = mmrazor.FBKDStudentConnector(8), mmrazor.FBKDTeacherConnector(8)
        self.loss = mmrazor.FBKDLoss()

    def forward(self, student, teacher):
        return self.loss(self.student(student), self.teacher(teacher))


means = torch.arange(60.0).view(5, 12).cos()
memory = {"num_samples": 20, "num_negatives": 4}
LOSSES = {
    "cka": (lambda: kdfast.CKALoss(), lambda: (rows(), rows(6, 7))),
    "cka of few features": (lambda: kdfast.CKALoss(), lambda: (rows(40, 3), rows(40, 4))),
    "cka row": (lambda: kdfast.CKALoss(centered=False, row_norm="row"), lambda: (rows(), rows(6, 7))),
    "logit cka": (lambda: kdfast.LogitCKALoss(), lambda: (rows(), rows())),
    "logit cka soft": (lambda: kdfast.LogitCKALoss(temperature=2.0), lambda: (rows(), rows())),
    "rcka": (lambda: kdfast.RCKALoss(), lambda: (maps(b=6), maps(5, b=6), rows(), rows())),
    "mmd": (lambda: kdfast.GramMMDLoss(), lambda: (rows(), rows(6, 7))),
    "mmd author": (lambda: kdfast.GramMMDLoss(kind="author"), lambda: (rows(), rows(6, 7))),
    "sp": (lambda: kdfast.SimilarityPreservingLoss(), lambda: (rows(), rows(6, 7))),
    "pairs": (lambda: kdfast.PairwiseAffinityLoss(), lambda: (maps(), maps(4))),
    "pcka": (lambda: kdfast.PCKALoss(patch_size=5, inter_weight=1.0), lambda: (maps(), maps())),
    "patch kd": (lambda: kdfast.PatchLoss("kd", patch_size=4), lambda: (maps(), maps())),
    "patch at": (lambda: kdfast.PatchLoss("at", patch_size=4), lambda: (maps(), maps())),
    "patch dist": (lambda: kdfast.PatchLoss("dist", patch_size=4), lambda: (maps(), maps())),
    "mimic": (lambda: kdfast.MimicLoss(8, 6), lambda: (maps(), maps(6))),
    "attention": (lambda: kdfast.AttentionGuidedLoss(), lambda: (maps(), maps())),
    "attention adapted": (lambda: kdfast.AttentionGuidedLoss(8), lambda: (maps(), maps())),
    "attention widths": (lambda: kdfast.AttentionGuidedLoss((8, 6)), lambda: (maps(), maps(6))),
    "non-local": (lambda: kdfast.NonLocalLoss(8, key_stride=2), lambda: (maps(), maps())),
    "structured": (lambda: kdfast.StructuredKDLoss(8, key_stride=2), lambda: (maps(), maps())),
    "dino": (lambda: kdfast.DirectionNormLoss(means), lambda: (rows(), rows(), labels())),
    "cosine": (lambda: kdfast.DirectionLoss(means), lambda: (rows(), labels())),
    "infonce": (lambda: kdfast.DirectionLoss(means, kind="infonce"), lambda: (rows(), labels())),
    "l2": (lambda: kdfast.NormLoss(), lambda: (rows(), rows())),
    "sifn": (lambda: kdfast.NormLoss("sifn"), lambda: (rows(),)),
    "kd": (lambda: kdfast.KDLoss(), lambda: (rows(), rows())),
    "dkd": (lambda: kdfast.DKDLoss(), lambda: (rows(), rows(), labels())),
    "nkd": (lambda: kdfast.NKDLoss(), lambda: (rows(), rows(), labels())),
    "dist": (lambda: kdfast.DISTLoss(), lambda: (rows(), rows())),
    "fitnet": (lambda: kdfast.FitNetLoss((8, 12, 12), (6, 12, 12)), lambda: (maps(), maps(6))),
    "at": (lambda: kdfast.AttentionTransferLoss(), lambda: (maps(), maps(6, 6, 6))),
    "ickd": (lambda: kdfast.ICKDLoss(8, 6), lambda: (maps(), maps(6))),
    "reviewkd": (lambda: kdfast.ReviewKDLoss([8], [6]), lambda: ([maps()], [maps(6)])),
    "crd": (lambda: kdfast.CRDLoss(12, 7, feature_dim=8, **memory), lambda: (rows(), rows(6, 7), labels(6, 20))),
    "fgfi": (lambda: kdfast.FGFILoss(8, 6), lambda: (maps(), maps(6), torch.ones(3, 12, 12))),
    "areas": (lambda: sokd.DistinctiveAreas(8), lambda: (maps(), maps())),
    "fbkd": (FBKD, lambda: (maps(), maps())),
}  # fmt: skip


def made(name, dtype=torch.float32, device="cpu"):
    """The loss and its inputs of a name, the same ones every time."""
    torch.manual_seed(0)
    make, draw = LOSSES[name]
    return make().to(device, dtype), inputs_to(draw(), dtype, device)


def inputs_to(values, dtype, device="cpu", grad=True):
    if isinstance(values, (list, tuple)):
        return [inputs_to(v, dtype, device, grad) for v in values]
    if not values.is_floating_point():
        return values.to(device)
    return values.detach().to(device, dtype).requires_grad_(grad)


def flat(values):
    return [values] if isinstance(values, torch.Tensor) else [t for v in values for t in flat(v)]


def call(loss, inputs):
    torch.manual_seed(1)  # CRD draws negatives
    return loss(*inputs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_module_in_another_type(name, dtype):
    truth = float(call(*made(name)).detach())
    loss, inputs = made(name, dtype)
    value = call(loss, inputs)
    assert value.dtype == torch.float32 or name == "fbkd"  # drop-ins return what published code returns
    assert value.dim() == 0 and abs(float(value.detach()) - truth) <= 0.1 * max(1, abs(truth))
    value.backward()
    for x in flat(inputs):
        if x.requires_grad and x.grad is not None:
            assert x.grad.dtype == dtype and x.grad.isfinite().all()
    if dtype == torch.float64:  # no float32 on the way
        gradient = flat(inputs)[0].grad
        assert not torch.equal(gradient, gradient.float().double())


@pytest.mark.parametrize("name", LOSSES)
def test_meta_tensors(name):
    """As PyTorch's own modules, for shapes and memory without data."""
    loss, inputs = made(name, device="meta")
    value = call(loss, inputs)
    assert value.is_meta and value.shape == ()
    value.backward()
    assert flat(inputs)[0].grad.shape == flat(inputs)[0].shape


@pytest.mark.parametrize(
    "name", ["cka", "pcka", "attention", "attention adapted", "structured", "kd", "dino", "areas"]
)
def test_activation_checkpoints(name):
    """A backward may read what its forward saved only once, or a checkpoint that recomputes it raises."""
    loss, inputs = made(name)
    again, same = made(name)
    call(loss, inputs).backward()
    torch.manual_seed(1)
    checkpoint(again, *same, use_reentrant=False).backward()
    for x, y in zip(flat(inputs), flat(same), strict=True):
        if x.grad is not None:
            torch.testing.assert_close(y.grad, x.grad)


def test_checkpoint_with_gradients_through_masks():
    s, t = (maps().requires_grad_() for _ in range(2))
    loss = kdfast.AttentionGuidedLoss(detach_mask=False)
    truth = torch.autograd.grad(loss(s, t), (s, t))
    found = torch.autograd.grad(checkpoint(loss, s, t, use_reentrant=False), (s, t))
    torch.testing.assert_close(found, truth)


def batch(values, size):
    return [batch(v, size) for v in values] if isinstance(values, list) else values[:size]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_empty_batch(name, backend):
    """A detector's step may have no proposals: a value that is finite, gradients that are zeros, or a named refusal."""
    loss, inputs = made(name)
    loss.eval()
    inputs = inputs_to(batch(inputs, 0), torch.float32)
    with kdfast.use_backend(backend):
        if name in ("pcka", "patch kd", "patch at", "patch dist", "mimic"):
            with pytest.raises(ValueError, match="must not be empty"):
                call(loss, inputs)
            return
        value = call(loss, inputs)
        assert value.isfinite() and value >= 0
        if value.requires_grad:
            value.backward()
    for x in flat(inputs):
        assert x.grad is None or x.grad.shape == x.shape
