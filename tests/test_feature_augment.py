"""The op ``feature_augment``: each operation against plain PyTorch, chains against one operation after the other."""

from __future__ import annotations

import math

import pytest
import torch
from augment_checks import CHAINS, check
from conftest import needs_extension, same_for_any_threads
from torch.nn import functional as F

from kdfast.ops.feature_augment import feature_augment
from kdfast.reference.feature_augment import NAMES, normal, philox, plan

SHAPE = (2, 6, 9, 7)


def augmented(x, *chain):
    return feature_augment(x, plan(x.shape, chain))


def maps(*shape: int, dtype=torch.float64):
    return torch.randn(shape or SHAPE, dtype=dtype)


def sampled(x, theta):
    """affine_grid and grid_sample, in their own coordinates from -1 to 1."""
    grid = F.affine_grid(
        torch.tensor(theta, dtype=x.dtype).expand(len(x), 2, 3), x.shape, align_corners=False
    )
    return F.grid_sample(x, grid, align_corners=False)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (1, 6)])
def test_geometry(size):
    x, (h, w) = maps(2, 3, *size), size
    found = {
        "shear_x": ([[1, -0.2 * h / w, 0], [0, 1, 0]], 0.2),
        "shear_y": ([[1, 0, 0], [-0.2 * w / h, 1, 0]], 0.2),
        "translate_x": ([[1, 0, -2 * 0.3], [0, 1, 0]], 0.3),
        "translate_y": ([[1, 0, 0], [0, 1, -2 * 0.3]], 0.3),
    }
    c, s = math.cos(math.radians(25)), math.sin(math.radians(25))
    found["rotate"] = ([[c, -s * h / w, 0], [s * w / h, c, 0]], 25.0)
    for name, (theta, value) in found.items():
        torch.testing.assert_close(augmented(x, (name, value, 0)), sampled(x, theta))


def test_directions():
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 4, 6] = 1  # right of the centre
    assert augmented(x, ("rotate", 90.0, 0))[0, 0, 2, 4] == pytest.approx(1)  # counter-clockwise: above it
    assert augmented(x, ("translate_x", 1 / 9, 0))[0, 0, 4, 7] == pytest.approx(1)
    assert augmented(x, ("translate_y", 1 / 9, 0))[0, 0, 5, 6] == pytest.approx(1)
    whole = torch.ones(1, 1, 4, 8)
    assert augmented(whole, ("translate_x", 0.25, 0))[0, 0].sum(0).tolist() == [0, 0, 4, 4, 4, 4, 4, 4]


def test_neighbouring_geometry_is_interpolated_once():
    x = maps(1, 2, 12, 12)
    there_and_back = augmented(x, ("rotate", 17.0, 0), ("rotate", -17.0, 0))
    torch.testing.assert_close(there_and_back, x)
    torch.testing.assert_close(
        augmented(x, ("rotate", 10.0, 0), ("rotate", 20.0, 0)), augmented(x, ("rotate", 30.0, 0))
    )
    # A shift by whole pixels needs no interpolation: where nothing leaves the map, one after the other is the same.
    x[..., :4], x[..., -4:], x[..., :4, :], x[..., -4:, :] = 0, 0, 0, 0
    shift = ("translate_x", 2 / 12, 0)
    torch.testing.assert_close(
        augmented(x, shift, ("rotate", 20.0, 0)), augmented(augmented(x, shift), ("rotate", 20.0, 0))
    )


def test_pointwise_operations_one_after_the_other():
    x = maps()
    steps = [
        ("noise", 0.3, 1),
        ("channel_shuffle", 0.0, 2),
        ("cutout", 0.6, 3),
        ("channel_drop", 0.4, 4),
        ("rotate", 9.0, 5),
    ]
    expected = x
    for step in steps:
        expected = augmented(expected, step)
    torch.testing.assert_close(augmented(x, *steps), expected)


def test_cutout():
    x = torch.ones(1, 2, 20, 30)
    boxes = [augmented(x, ("cutout", 0.3, seed))[0, 0] == 0 for seed in range(50)]
    for box in boxes:
        rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
        assert len(rows) <= 7 and len(columns) <= 10  # 6 and 9, rounded at both ends, cut off at the edges
        assert box.sum() == len(rows) * len(columns) and len(rows) == rows[-1] - rows[0] + 1
    assert torch.stack(boxes).float().mean() > 0.04  # of 0.09, less what lies outside
    assert len({tuple(b.flatten().tolist()) for b in boxes}) > 40


def test_channels():
    x = maps(1, 400, 2, 2)
    shuffled = augmented(x, ("channel_shuffle", 0.0, 3))
    assert not torch.equal(shuffled, x)
    torch.testing.assert_close(shuffled.flatten().sort()[0], x.flatten().sort()[0])
    kept = augmented(x, ("channel_drop", 0.3, 4))
    gone = (kept == 0).all((2, 3))[0]
    assert 0.2 < gone.float().mean() < 0.4
    assert torch.equal(kept[:, ~gone], x[:, ~gone])  # without rescaling
    assert torch.equal(augmented(x, ("channel_drop", 0.0, 4)), x)


def test_philox_known_answers():
    """Test vectors published with the generator (Salmon et al., SC 2011)."""
    zero, ones = torch.tensor([0]), torch.tensor([0xFFFFFFFF])
    answers = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox([zero] * 4, (0, 0))] == answers
    answers = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert [int(w) for w in philox([ones] * 4, (0xFFFFFFFF, 0xFFFFFFFF))] == answers


def test_noise_is_normal_and_independent():
    n = normal((200, 1000), 3, 4, torch.device("cpu")).flatten()
    assert abs(float(n.mean())) < 0.01 and abs(float(n.var()) - 1) < 0.02
    assert abs(float((n**4).mean()) - 3) < 0.1 and 4 < float(n.abs().max()) < 6
    for lag in (1, 2, 3, 4):
        assert abs(float((n[lag:] * n[:-lag]).mean())) < 0.01
    other = normal((200, 1000), 3, 5, torch.device("cpu")).flatten()
    assert abs(float((n * other).mean())) < 0.01


@needs_extension
@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (1, 4, 7, 11), (3, 2, 1, 6), (1, 1, 33, 17), (0, 3, 4, 4)])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "+".join(name for name, *_ in chain) or "nothing")
def test_cpu(chain, shape):
    check("cpu", shape, chain)
    check("cpu", shape, chain, torch.float64, floor=1e-12)


# Channels are resampled 16 at a time, and pixels: whole groups of both, and groups with a rest.
@needs_extension
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (2, 37, 5, 9), (1, 20, 1, 3), (1, 33, 24, 24)])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "+".join(name for name, *_ in chain) or "nothing")
def test_groups_of_channels(chain, shape):
    check("cpu", shape, chain)
    check("cpu", shape, chain, torch.bfloat16, floor=2e-2)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    for chain in CHAINS:
        check("cpu", (2, 3, 6, 7), chain, dtype, floor=2e-3)


COPIES = (
    [("cutout", 0.5, 3)],
    [("channel_drop", 0.4, 7)],
    [("cutout", 0.5, 3), ("channel_drop", 0.4, 7), ("cutout", 0.3, 1)],
    [("channel_shuffle", 0.0, 7)],
    [("channel_drop", 0.4, 7), ("channel_shuffle", 0.0, 3), ("cutout", 0.5, 3)],
)


@needs_extension
@pytest.mark.parametrize("chain", COPIES, ids=lambda chain: "+".join(name for name, *_ in chain))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_copies(chain, dtype):
    """Without warp and noise rows are copied under a mask: exactly, whatever their length and layout."""
    for shape in ((2, 5, 7, 7), (1, 3, 2, 3), (2, 40, 8, 8), (1, 2, 30, 33), (3, 4, 1, 1)):
        check("cpu", shape, chain, dtype, floor=0.0)
        check("cpu", shape, chain, dtype, floor=0.0, memory_format=torch.channels_last)
        check("cpu", shape, chain, dtype, floor=0.0, sliced=True)


@needs_extension
def test_large_copies():
    """From 12 MB on results are written past the cache, where rows are whole vectors; and where they are not."""
    for width in (160, 161):
        check("cpu", (2, 64, 160, width), COPIES[2], floor=0.0)
        check("cpu", (2, 64, 160, width), COPIES[4], floor=0.0)


@needs_extension
def test_infinity_stays_where_it_is():
    """A tap of weight 0, a cut or a dropped channel does not turn an infinity elsewhere into NaN."""
    x = torch.ones(1, 20, 6, 6)
    x[:, :, 0, 0] = math.inf
    y = augmented(x, ("translate_x", 2 / 6, 0))
    assert y[..., 3:].isfinite().all() and (y[..., 0, 2] == math.inf).all() and not y[..., :2].any()
    y = augmented(torch.full((1, 20, 6, 6), math.inf), ("channel_drop", 0.5, 1), ("cutout", 0.5, 2))
    assert ((y == 0) | (y == math.inf)).all() and (y == 0).any()


@needs_extension
def test_layouts():
    for chain in CHAINS:
        check("cpu", (2, 4, 6, 5), chain, memory_format=torch.channels_last)
        check("cpu", (2, 4, 6, 5), chain, sliced=True)


@needs_extension
def test_same_bits_for_the_same_plan_and_any_number_of_threads():
    x, chain = maps(4, 64, 16, 16, dtype=torch.float32), [("noise", 0.3, 1), ("rotate", 20.0, 2)]
    (expected,) = same_for_any_threads(lambda: [augmented(x, *chain)])
    assert not torch.equal(augmented(x, ("noise", 0.3, 2), chain[1]), expected)


@needs_extension
def test_gradients():
    x = maps(1, 3, 4, 5).requires_grad_()
    for chain in CHAINS:
        steps = plan(x.shape, chain)
        assert torch.autograd.gradcheck(lambda v, s=steps: feature_augment(v, s), x)
        assert torch.autograd.gradgradcheck(lambda v, s=steps: feature_augment(v, s).square(), x)


@needs_extension
def test_op_contract():
    x, (steps, channels) = (
        maps(2, 3, 4, 5, dtype=torch.float32),
        plan((2, 3, 4, 5), [("rotate", 9.0, 1), ("noise", 0.1, 2)]),
    )
    for op in (torch.ops.kdfast.feature_augment, torch.ops.kdfast.feature_augment_backward):
        torch.library.opcheck(
            op.default,
            (x, torch.tensor(steps, dtype=torch.float64), channels),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiles_without_graph_breaks():
    x = maps(2, 3, 6, 5, dtype=torch.float32).requires_grad_()
    steps = plan(x.shape, [("rotate", 9.0, 1), ("channel_drop", 0.5, 2)])
    compiled = torch.compile(lambda v: feature_augment(v, steps).square().sum(), fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(feature_augment(x, steps).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"chain: got operation 'blur', need one of"):
        plan(SHAPE, [("blur", 1.0, 0)])
    assert len(NAMES) == 9
    steps = plan(SHAPE, [("noise", 0.1, 0)])
    for wrong in (maps(2, 5, 9, 7), maps(6, 9, 7), torch.ones(SHAPE, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"x: need floating point maps \[B, 6, H, W\], got \["):
            feature_augment(wrong, steps)
