"""The CUDA C++ kernels of ``attention_mask`` on the CPU, by tests/cuda_emulator: logic and indexing without a GPU."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
from attention_checks import SETTINGS, compare, layouts, maps, run
from emulated import compile_emulated

from kdfast.kernels.attention_mask_cuda import DTYPES, MAX_BATCH, is_small, unsupported
from kdfast.ops import attention_mask as op
from kdfast.reference import attention_mask as reference

FLOOR = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def structure(name, **types):
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}
    fields = [(field, kinds[kind]) for kind, names in types.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Map = structure("Map", p="data", l="image channel pixel")
Maps = structure("Maps", l="batch channels pixels", i="dtype planar")
Attention = structure(
    "Attention", f="temperature transfer_weight masked_weight", i="of_sum channel_mask signed through pairs"
)
Parts = structure(
    "Parts",
    p="grad_loss terms spatial channel spatial_mask channel_mask grad_spatial grad_channel",
    i="maps given side signed",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = compile_emulated("attention_mask", tmp_path_factory)
    library.kd_attention_workspace.restype = ctypes.c_int64
    return library


def as_map(x):
    """As csrc/cuda/attention_mask_op.cpp reads a map whose pixels lie along one stride."""
    b, c, h, w = x.stride()
    return ctypes.byref(Map(x.data_ptr(), b, c, w if x.shape[3] > 1 else h if x.shape[2] > 1 else 1))


def flat(x):
    one = 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)
    return x if one else x.contiguous()


def sizes(x):
    b, c, h, w = x.shape
    channels_last = x.stride(1) == 1 and h * w > 1 and c > 1
    return ctypes.byref(Maps(b, c, h * w, DTYPES.index(x.dtype), not channels_last))


def poison(*shape):
    return torch.full(shape, float("nan"))


def pointer(v):
    return None if v is None else ctypes.c_void_p(v.data_ptr())


class Emulated:
    """The ops as the C++ side of the CUDA backend calls the kernels."""

    def __init__(self, library):
        self.library = library

    def workspace(self, size, count, kinds):
        return poison(self.library.kd_attention_workspace(size, count, kinds))

    def attention_pool(self, x, signed):
        b, c, h, w = x.shape
        kinds, size = 1 + signed, sizes(x)
        spatial, channel, workspace = (
            poison(kinds, b, 1, h, w),
            poison(kinds, b, c),
            self.workspace(size, 1, kinds),
        )
        source = flat(x)
        arguments = (*map(pointer, (spatial, channel, workspace)), None)
        assert self.library.kd_attention_pool(size, as_map(source), signed, *arguments) == 0
        return spatial, channel

    def attention_mask(self, student, teacher, adapted, *settings):
        s, (b, c, h, w) = reference.Settings(*settings), student.shape
        size, kept = sizes(student), 1 + s.through
        made = [poison(), poison(2, 3), poison(*s.kept, b, 1, h, w), poison(*s.kept, b, c)]
        made += [poison(kept, b, 1, h, w), poison(kept, b, c)]
        sources = [flat(student), flat(teacher), flat(student if adapted is None else adapted)]
        workspace = self.workspace(size, 2, 1 + s.signed)
        pointers = map(pointer, (*made, workspace))
        settings = ctypes.byref(Attention(*s))
        code = self.library.kd_attention_forward(size, *map(as_map, sources), settings, *pointers, None)
        assert code == 0
        return made

    def masked_distance(self, x, y, *masks):
        size, terms = sizes(x), poison(2, 3)
        sources = [flat(x), flat(y)]
        made = (*masks, terms, self.workspace(size, 0, 1))
        assert self.library.kd_masked_distance(size, *map(as_map, sources), *map(pointer, made), None) == 0
        return terms

    def attention_mask_backward(self, x, other, grad_loss, terms, spatial, channel, *rest):
        *small, side, signed = rest
        small = [None if v is None else v.contiguous() for v in small]
        grad_loss = None if grad_loss is None else grad_loss.contiguous()
        count = 0 if spatial is None else spatial.shape[1]
        given = 0 if small[2] is None else small[2].shape[0]
        last = [None, None] if spatial is None else [spatial[-1], channel[-1]]
        pointers = map(pointer, (grad_loss, terms, *last, *small))
        parts = Parts(*(p and p.value for p in pointers), count, given, side, signed)
        out = torch.full_like(x, float("nan"))
        written = flat(out)
        sources = [flat(x), x if other is None else flat(other)]
        others = None if other is None else as_map(sources[1])
        code = self.library.kd_attention_backward(
            sizes(x), as_map(sources[0]), others, as_map(written), ctypes.byref(parts), None
        )
        assert code == 0
        return out if written is out else out.copy_(written)


@pytest.fixture
def emulated(library, monkeypatch):
    """kdfast's autograd functions over the emulated kernels."""
    ops = Emulated(library)
    monkeypatch.setattr(op, "op_of", lambda name, triton: getattr(ops, name))
    monkeypatch.setattr(op.backend, "choose", lambda *_: "cuda")
    return ops


def check(made, adapted=True, pooled=True, **settings):
    inputs, count = [*made[:2], made[2] if adapted else None], 4 if pooled else 2

    def call(*inputs):
        return op.attention_mask(*inputs, **settings, pooled=pooled)[:count]

    def plain(*inputs):
        return reference.attention_mask(*inputs, **settings)[:count]

    expected, truth = run(plain, inputs), run(plain, inputs, torch.float64)
    compare(run(call, inputs), expected, truth, FLOOR[made[0].dtype])


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_settings(emulated, chosen):
    made = maps(2, 5, 3, 7)
    for adapted, pooled in ((True, True), (False, False)):
        check(made, adapted, pooled, **chosen)


# One pixel; one channel; whole vectors; several chunks of pixels, the last with few; more rows than warps.
@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 1), (2, 1, 3, 5), (2, 8, 4, 8), (1, 3, 17, 19), (1, 140, 9, 8), (3, 4, 1, 2)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_shapes(emulated, shape, channels_last):
    made = [layouts["channels_last"](v) if channels_last else v for v in maps(*shape)]
    for chosen in (SETTINGS[0], SETTINGS[6], SETTINGS[-3]):
        check(made, False, False, **chosen)
    check(made, **SETTINGS[6])


@pytest.mark.parametrize("layout", layouts)
def test_layouts(emulated, layout):
    plain, laid = maps(2, 6, 4, 6), [layouts[layout](v) for v in maps(2, 6, 4, 6)]
    for made in (laid, [laid[0], *plain[1:]], [plain[0], *laid[1:]]):
        check(made, **SETTINGS[6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_half(emulated, dtype, channels_last):
    made = maps(2, 24, 4, 10, dtype=dtype)
    check([layouts["channels_last"](v) if channels_last else v for v in made], **SETTINGS[6])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "channel slice"])
def test_pool(emulated, signed, layout):
    x = layouts[layout](maps(2, 6, 11, 13)[0]).requires_grad_()
    results = []
    for call, v in (
        (lambda v: op.attention_pool(v, signed=signed), x),
        (lambda v: reference.attention_pool(v, signed), x),
    ):
        spatial, channel = call(v)
        (gradient,) = torch.autograd.grad(spatial.sin().sum() + channel.cos().sum(), v)
        results.append((spatial, channel, gradient))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_masked_distance(emulated):
    x, y, _ = maps(2, 5, 13, 11)
    masks = torch.rand(2, 1, 13, 11), torch.rand(2, 5)
    for v in (x, y):
        v.requires_grad_()
    found, expected = op.masked_distance(x, y, *masks), reference.masked_distance(x, y, *masks)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(v, (x, y)) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_equal_maps_and_nan(emulated):
    x = maps(2, 5, 3, 7)[0]
    for chosen in (SETTINGS[6], SETTINGS[-3]):
        s = x.clone().requires_grad_()
        loss, distances = op.attention_mask(s, x, **chosen, pooled=False)[:2]
        assert loss == 0 and not distances.any()
        assert not torch.autograd.grad(loss, s)[0].any()
    x[0, 1, 2, 3] = float("nan")
    assert op.attention_mask(x, maps(2, 5, 3, 7)[1], **SETTINGS[6])[0].isnan()


def test_what_the_backend_takes():
    x = torch.empty(2, 256, 25, 42)
    assert is_small(x) and not is_small(torch.empty(2, 256, 50, 84))
    assert all(unsupported(x.to(dtype)) is None for dtype in DTYPES)
    assert "float64" in unsupported(x.double())
    assert "0" in unsupported(x[:0])
    assert str(MAX_BATCH) in unsupported(torch.empty(1, 1, 1, 1).expand(MAX_BATCH + 1, 1, 1, 1))
