"""Op attention_mask: the C++ backend against the float64 reference, over settings, shapes, layouts and dtypes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention_checks import SETTINGS, SHAPES, check, check_pool, compare, layouts, maps
from conftest import needs_extension, same_for_any_threads
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
from kdfast.ops.attention_mask import Settings, attention_mask, attention_pool, masked_distance
from kdfast.reference import attention_mask as reference

pytestmark = needs_extension

PLAIN = {"temperature": 0.5}


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_settings(chosen):
    check("cpu", *maps(2, 5, 3, 7), **chosen)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_shapes(shape, channels_last):
    made = [layouts["channels_last"](v) if channels_last else v for v in maps(*shape)]
    for chosen in (SETTINGS[0], SETTINGS[7], SETTINGS[-1]):
        check("cpu", *made, **chosen)


@pytest.mark.parametrize("layout", layouts)
def test_layouts(layout):
    """Student and teacher in the layout, then each alone."""
    plain, laid = maps(2, 6, 4, 6), [layouts[layout](v) for v in maps(2, 6, 4, 6)]
    for made in (laid, [laid[0], *plain[1:]], [plain[0], *laid[1:]]):
        check("cpu", *made, **SETTINGS[6])
    check_pool("cpu", laid[0], True)


def test_maps_are_read_in_place():
    for layout in ("channels_last", "channel slice", "channels_last slice"):
        x, y, _ = (layouts[layout](v) for v in maps(2, 256, 64, 64))
        with torch.profiler.profile() as found:
            attention_mask(x, y, **PLAIN)
        copies = [e.name for e in found.events() if "copy" in e.name or "clone" in e.name]
        assert not copies, layout


def test_gradient_keeps_the_layout():
    x, y, _ = (layouts["channels_last"](v) for v in maps(2, 6, 4, 6))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(attention_mask(x, y, **PLAIN)[0], x)
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.float64, 1e-14), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes(dtype, floor, channels_last):
    made = maps(2, 37, 5, 11, dtype=dtype)
    made = [layouts["channels_last"](v) if channels_last else v for v in made]
    check("cpu", *made, floor=floor, **SETTINGS[6])
    check_pool("cpu", made[0], True, floor=floor)


def test_mixed_dtypes():
    x, y, z = maps(2, 5, 3, 7)
    x.requires_grad_(), z.requires_grad_()
    loss, *_ = attention_mask(x, y.half(), z.bfloat16(), **PLAIN)
    expected, *_ = attention_mask(x, y.half().float(), z.bfloat16().float(), **PLAIN)
    assert torch.equal(loss, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, z)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_large_values(backend, dtype):
    made = [(6e4 * (2 * torch.rand(2, 16, 9, 9) - 1)).to(dtype) for _ in range(3)]
    made[0].requires_grad_()
    with kdfast.use_backend(backend):
        for chosen in SETTINGS:
            loss, distances, spatial, channel = attention_mask(*made[:2], **chosen)
            (gradient,) = torch.autograd.grad(loss, made[0])
            assert all(v.isfinite().all() for v in (loss, distances, spatial, channel, gradient)), chosen


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    orders=st.tuples(st.permutations(range(4)), st.permutations(range(4))),
    steps=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    chosen=st.sampled_from(SETTINGS),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_random_strides(shape, orders, steps, chosen, seed):
    torch.manual_seed(seed)

    def laid(order, step):
        memory = torch.randn([shape[a] * step for a in order])[(slice(None, None, step),) * 4]
        return memory.permute([order.index(a) for a in range(4)])

    x, y = (laid(order, step) for order, step in zip(orders, steps, strict=True))
    # One element: L_AM is |x - y|, whose pooled twin may cancel exactly; elsewhere nothing is degenerate.
    check("cpu", x, y, laid(orders[0], steps[1]), floor=1e-4 if x[0].numel() == 1 else 5e-6, **chosen)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equal_maps(backend):
    x = maps(2, 5, 3, 7)[0]
    for chosen in SETTINGS:
        s, t = x.clone().requires_grad_(), x.clone().requires_grad_()
        with kdfast.use_backend(backend):
            loss, distances, *_ = attention_mask(s, t, **chosen)
        assert loss == 0 and not distances.any()
        for gradient in torch.autograd.grad(loss, (s, t)):
            assert not gradient.any()


def test_no_images():
    x = torch.randn(0, 4, 3, 5, requires_grad=True)
    loss, *_ = attention_mask(x, x.detach(), **PLAIN)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss == 0 and gradient.shape == x.shape


def test_result_does_not_depend_on_threads():
    x, y, _ = maps(2, 24, 70, 40)
    x.requires_grad_()

    def compute():
        loss, *rest = attention_mask(x, y, **PLAIN)
        return loss, *rest, *torch.autograd.grad(loss, x)

    same_for_any_threads(compute)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("chosen", [SETTINGS[0], SETTINGS[6], SETTINGS[12]], ids=str)  # not detached
def test_gradcheck_and_second_backward(backend, chosen):
    made = [v.requires_grad_() for v in (2 + 0.5 * torch.randn(3, 2, 3, 2, 3, dtype=torch.float64)).unbind()]
    with kdfast.use_backend(backend):

        def call(*inputs):
            loss, _, spatial, channel = attention_mask(*inputs, **chosen)
            return loss, spatial, channel

        for inputs in (made, made[:2]):
            assert torch.autograd.gradcheck(call, inputs)
            assert torch.autograd.gradgradcheck(call, inputs)


def test_gradcheck_of_the_parts():
    x, y = (torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    masks = torch.rand(2, 1, 2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_gradient(lambda v: attention_pool(v, signed=True), x)
        assert check_gradient(lambda a, b: masked_distance(a, b, *masks), (x, y))


def test_second_gradient_of_an_adapted_map():
    """An adapted map is a function of the student: its gradient must not be counted for the student twice."""
    x, y, _ = maps(1, 3, 2, 4, dtype=torch.float64)
    x.requires_grad_()

    def first(v, create_graph):
        loss = attention_mask(v, y, 2 * v, temperature=0.5)[0]
        return torch.autograd.grad(loss, v, create_graph=create_graph)[0]

    torch.testing.assert_close(first(x, True), first(x, False))


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_gradient_through_masks(chosen):
    """The closed form of the backward against autograd through the reference's softmaxes."""
    chosen = chosen | {"detach_mask": False, "transfer_weight": 0.0}
    x, y, _ = maps(2, 5, 3, 7, dtype=torch.float64)
    found = []
    for backend in ("cpu", "reference"):
        s, t = x.clone().requires_grad_(), y.clone().requires_grad_()
        with kdfast.use_backend(backend):
            found.append(torch.autograd.grad(attention_mask(s, t, **chosen)[0], (s, t)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softmax_of_sum", [False, True])
@pytest.mark.parametrize("share", [0.9, 0.999])
def test_gradient_through_masks_of_almost_one_pixel(softmax_of_sum, share):
    """The masks' gradient is the only one of the student: it stays exact where a softmax leaves the other pixels little."""
    x, y, z = maps(2, 3, 4, 5)
    chosen = {
        "temperature": 0.3,
        "transfer_weight": 0.0,
        "detach_mask": False,
        "softmax_of_sum": softmax_of_sum,
    }
    # The exponent of one pixel above the logarithm of all others' sum, in both maps.
    for v in (x, y):
        attention = v.abs().mean(1).flatten(1) / 0.3 * (1 + softmax_of_sum)
        most = attention[:, 1:].logsumexp(1) + math.log(share / (1 - share))
        v[:, :, 0, 0] = 0.3 / (1 + softmax_of_sum) * most[:, None]

    def gradients(dtype):
        inputs = [v.to(dtype).requires_grad_() for v in (x, y)]
        return torch.autograd.grad(attention_mask(*inputs, z.to(dtype), **chosen)[0], inputs)

    for found, truth in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-6 * float(truth.abs().max()))


def test_only_needed_gradients():
    x, y, _ = maps(2, 5, 3, 7)
    x.requires_grad_()
    loss, distances, *_ = attention_mask(x, y, **PLAIN)
    assert not distances.requires_grad
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first) and y.grad is None
    with torch.no_grad():
        assert not attention_mask(x, y, **PLAIN)[0].requires_grad


@pytest.mark.parametrize("signed", [False, True])
def test_pool(signed):
    for v in maps(2, 5, 41, 53):
        check_pool("cpu", v, signed)


def test_masked_distance():
    x, y, _ = maps(2, 5, 41, 53)
    masks = torch.rand(2, 1, 41, 53), torch.rand(2, 5)

    def run(call, dtype):
        a, b = (v.detach().to(dtype).requires_grad_() for v in (x, y))
        value = call(a, b, *(m.to(dtype) for m in masks))
        return dict(zip("vab", (value.detach(), *torch.autograd.grad(value, (a, b))), strict=True))

    plain = reference.masked_distance
    compare(run(masked_distance, x.dtype), run(plain, x.dtype), run(plain, torch.float64), 3e-6)


@pytest.mark.parametrize("through", [False, True])
def test_opcheck(through):
    x, y, z = maps(2, 5, 3, 7)
    chosen = Settings(0.5, 1.0, 1.0, False, True, True, through, True)
    ops = torch.ops.kdfast
    for adapted in (None, z):
        torch.library.opcheck(ops.attention_mask.default, (x, y, adapted, *chosen))
    for variant in (chosen, chosen._replace(pairs=through)):
        loss, terms, *small = ops.attention_mask(x, y, None, *variant)
        given = [v[:, 0] for v in small[:2]]
        torch.library.opcheck(
            ops.attention_mask_backward.default, (x, y, loss, terms, *small, *given, 0, True)
        )
    nothing = (None,) * 7
    torch.library.opcheck(ops.attention_mask_backward.default, (x, *nothing, *given, 1, True))
    torch.library.opcheck(ops.attention_mask_with_gradient.default, (x, y, *chosen[:6]))
    torch.library.opcheck(ops.attention_pool.default, (x, through))
    torch.library.opcheck(ops.masked_distance.default, (x, y, small[2][0], small[3][0]))


def test_reference_op_is_the_same():
    """What runs where no kernel is registered, against the C++ kernels: every output and gradient."""
    from kdfast.ops import attention_mask_ops as op

    x, y, z = maps(2, 5, 3, 7, dtype=torch.float64)
    for adapted in (None, z):
        for signed, through, pairs in itertools.product((False, True), repeat=3):
            if through and not pairs:
                continue
            arguments = (x, y, adapted, 0.5, 0.7, 1.3, False, pairs, signed, through, pairs)
            found, expected = torch.ops.kdfast.attention_mask(*arguments), op._reference(*arguments)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            loss, terms, *small = found
            given = [v[:, -1] for v in small[:2]]
            arguments = (y, x, loss, terms, *small, *given, 1, signed)
            found = torch.ops.kdfast.attention_mask_backward(*arguments)
            torch.testing.assert_close(found, op._reference_backward(*arguments), rtol=1e-12, atol=1e-12)

    for flags in itertools.product((False, True), repeat=3):
        arguments = (x, y, 0.5, 0.7, 1.3, *flags)
        found = torch.ops.kdfast.attention_mask_with_gradient(*arguments)
        for a, b in zip(found, op._reference_with_gradient(*arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_wrong_maps_are_refused():
    x = torch.randn(2, 5, 3, 7)
    settings = (0.5, 1.0, 1.0, False, True, False, False, False)
    with pytest.raises(RuntimeError, match="student and teacher must have one shape, axis 1"):
        torch.ops.kdfast.attention_mask(x, x[:, 1:], None, *settings)
    with pytest.raises(RuntimeError, match="must be a map"):
        torch.ops.kdfast.attention_pool(x[0], False)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.kdfast.attention_pool(x.int(), False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_large_maps(signed, channels_last):
    """The longest chunks of pixels, the last of each image shorter, and gradients on huge pages."""
    made = [layouts["channels_last"](v) if channels_last else v for v in maps(2, 128, 129, 257)]
    assert made[0].nbytes > 32 << 20 and made[0][:, 0].numel() > 16 * 4096
    check("cpu", *made, **SETTINGS[1] | {"signed": signed})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("detach_mask", [False, True])
def test_loss_alone(backend, detach_mask):
    """What the caller asks for beside the loss changes neither it nor its gradient."""
    x, y, _ = maps(2, 5, 3, 7)
    x.requires_grad_()
    found = []
    with kdfast.use_backend(backend):
        for asked in ({"distances": False}, {"pooled": False}, {}):
            values = attention_mask(x, y, **PLAIN, detach_mask=detach_mask, **asked)
            found.append((len(values), values[0], *torch.autograd.grad(values[0], x)))
    assert [count for count, *_ in found] == [1, 2, 4]
    for _, loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][1])
        torch.testing.assert_close(gradient, found[0][2])
