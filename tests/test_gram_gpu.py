"""The Triton kernels of ``gram`` on a GPU: types, precisions, sizes that need every path, streams and
graphs."""

from __future__ import annotations

import pytest
import torch
from gram_checks import check, normal, patches, view

from kdfast import use_backend
from kdfast.ops.gram import gram
from kdfast.reference.gram import COMPARISONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# TF32 keeps 11 significant bits; float16 and bfloat16 inputs are multiplied in it.
FLOOR = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-3}


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(view(normal(*shape, seed=seed, dtype=dtype, device="cuda")) for seed in (0, 1))


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 17, 24, 48, 64, 77, 90, 128, 129, 273, 513])
def test_rows(n, dtype):
    check("triton", *pair(3, n, 1030, dtype=dtype), floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("compare", COMPARISONS)
def test_comparisons(compare, centered, dtype):
    check("triton", *pair(3, 45, 515, dtype=dtype), compare=compare, centered=centered, floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(2, 77, 300), (1, 200, 100), (3, 5, 40)])
def test_inter(shape, centered, dtype):
    check("triton", *pair(*shape, dtype=dtype), inter=True, centered=centered, floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("compare", ["cka", "cka_row", "difference"])
def test_feature_side(compare, dtype):
    check("triton", *pair(2, 3000, 70, dtype=dtype), compare=compare, floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("centered", [True, False])
def test_large_half_precision_inputs(centered, dtype):
    x, y = pair(2, 77, 5000, dtype=dtype)
    check("triton", x.clamp(-3, 3) * 333, y.clamp(-3, 3) * 333, centered=centered, floor=FLOOR[dtype])


def test_large_mean():
    x, y = pair(4, 77, 1000)
    check("triton", x + 100, y + 100)
    x, y = pair(1, 200, 1000)
    check("triton", x + 100, y + 100)


def test_tf32_follows_the_global_setting():
    x, y = pair(2, 77, 5000)
    torch.set_float32_matmul_precision("high")
    try:
        check("triton", x, y, floor=3e-3)
        with use_backend("triton"):
            rounded = gram(x, y)[0]
    finally:
        torch.set_float32_matmul_precision("highest")
    with use_backend("triton"):
        exact = gram(x, y)[0]
    assert not torch.equal(exact, rounded)
    check("triton", x, y)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inter", [False, True])
def test_patches_of_a_map(inter, dtype, memory_format):
    """A level of a feature pyramid: 7 x 11 patches of 16 x 16, channels are groups."""
    maps = [normal(2, 16, 112, 176, seed=s, dtype=dtype, device="cuda") for s in (0, 1)]
    maps = [patches(v.contiguous(memory_format=memory_format), 16, 16) for v in maps]
    check("triton", *maps, inter=inter, floor=FLOOR[dtype])


def test_same_bits_every_time():
    x, y = pair(2, 77, 50000)
    results = []
    for _ in range(3):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        with use_backend("triton"):
            products, distance = gram(a, b)
        results.append((products, distance, *torch.autograd.grad(distance.sum(), (a, b))))
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


def _step(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    with use_backend("triton"):
        distance = gram(x, y)[1]
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    return distance.detach(), gradient


def test_side_stream():
    x, y = pair(4, 77, 4096)
    expected = _step(x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = x + 0  # ready only after the sleep: a launch on another stream would read it too early
        found = _step(late, y)
    torch.cuda.current_stream().wait_stream(stream)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("n", [77, 200, 600])
def test_graph_capture(n):
    x, y = pair(2, n, 2048)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step(x, y)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _step(x, y)
    x.copy_(normal(*x.flatten(1).shape, seed=7).view(x.shape))
    graph.replay()
    torch.cuda.synchronize()
    for f, e in zip(found, _step(x, y), strict=True):
        assert torch.equal(f, e)


def test_offsets_beyond_32_bits():
    elements = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 12 * elements:
        pytest.skip("needs 26 GB of free GPU memory")
    big = torch.empty(elements, dtype=torch.bfloat16, device="cuda")
    # The second group, and the last of 3 rows, lie more than 2^31 elements from the start.
    x = big.as_strided((2, 3, 1, 500, 1, 1), (2**30 + 1024, 2**29 + 256, 1, 1, 1, 1))
    x.copy_(view(normal(2, 3, 500, dtype=torch.bfloat16, device="cuda")))
    y = view(normal(2, 3, 500, seed=1, dtype=torch.bfloat16, device="cuda"))
    with use_backend("triton"):
        products, distance = gram(x, y)
        expected = gram(x.clone(memory_format=torch.contiguous_format), y)
    assert torch.equal(products, expected[0])
    assert torch.equal(distance, expected[1])


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, y = pair(2, 20, 300)
    expected = _step(x, y)
    found = _step(x.to("cuda:1"), y.to("cuda:1"))
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f.cpu(), e.cpu())
