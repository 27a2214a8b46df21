"""The CUDA C++ kernels of ``gram``: what they take (anywhere), and their results on a GPU."""

from __future__ import annotations

import pytest
import torch
from gram_checks import check, normal, view

from kdfast import backend, use_backend
from kdfast.kernels.gram_cuda import unsupported
from kdfast.ops.gram import gram

needs_cuda = pytest.mark.skipif(backend.why_not("cuda") is not None, reason=str(backend.why_not("cuda")))
# The last rounding of a gradient in half precision; sums are float32.
FLOOR = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CKA = 0


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(view(normal(*shape, seed=seed, dtype=dtype, device="cuda")) for seed in (0, 1))


def test_takes_logits_in_any_even_layout():
    x = view(normal(1, 128, 100))
    for v in (
        x,
        x[:, ::2],
        x[..., ::3, :, :],
        view(normal(1, 100, 128).mT),
        x.bfloat16(),
        x[:, :1].expand_as(x),
    ):
        assert unsupported(v, v, CKA, False, False) is None


@pytest.mark.parametrize(
    ("views", "flags", "reason"),
    [
        (lambda x: (x, x), (1, False, False), "compare='cka'"),
        (lambda x: (x, x), (CKA, True, False), "cosine"),
        (lambda x: (x, x), (CKA, False, True), "Gram side"),
        (lambda x: (x, x.half()), (CKA, False, False), "one type"),
        (lambda x: (x.double(), x.double()), (CKA, False, False), "float64"),
        (lambda x: (x[:, :0], x[:, :0]), (CKA, False, False), "elements"),
        (lambda x: (x.expand(65, *x.shape[1:]),) * 2, (CKA, False, False), "65 groups"),
        (lambda x: (x, x.expand(1, 8, 200, 10, 1, 1)), (CKA, False, False), "elements|rows of y"),
        (
            lambda x: (torch.zeros(1, 4, 1, 3, 5, 4)[:, :, :, :, :4],) * 2,
            (CKA, False, False),
            "features of x",
        ),
    ],
)
def test_refuses_with_the_reason(views, flags, reason):
    got = unsupported(*views(view(normal(1, 8, 10))), *flags)
    assert got is not None
    assert any(part in got for part in reason.split("|")), got


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("inter", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 10),
        (1, 2, 10),
        (1, 3, 7),
        (3, 5, 129),
        (1, 33, 100),
        (1, 128, 1000),
        (1, 129, 200),
        (1, 1000, 1024),
    ],
)
def test_sizes(shape, inter, centered, dtype):
    check("cuda", *pair(*shape, dtype=dtype), inter=inter, centered=centered, floor=FLOOR[dtype])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("inter", [True, False])
def test_large_mean(inter):
    x, y = pair(1, 128, 300)
    check("cuda", x + 100, y - 100, inter=inter)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", FLOOR)
def test_strides(dtype):
    x, y = (normal(1, 300, 128, seed=s, dtype=dtype, device="cuda") for s in (0, 1))
    check("cuda", view(x.mT), view(y.mT), inter=True, floor=FLOOR[dtype])
    check("cuda", view(x[:, :100, ::2]), view(y[:, 200:, 1::2]), floor=FLOOR[dtype])


@pytest.mark.gpu
@needs_cuda
def test_same_bits_every_time():
    x, y = pair(1, 128, 1000)
    first, second = (_step(x, y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _step(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    with use_backend("cuda"):
        distance = gram(x, y, inter=True)[1]
    return distance.detach(), torch.autograd.grad(distance.sum(), x)[0]


@pytest.mark.gpu
@needs_cuda
def test_side_stream():
    x, y = pair(1, 128, 100)
    expected = _step(x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # work put on another stream would run before this input is ready
        late = x * 1.0
        found = _step(late, y)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.gpu
@needs_cuda
def test_graph_capture():
    x, y = pair(1, 256, 1000)
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(static, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(static, y)
    for seed in (2, 3):
        static.copy_(view(normal(1, 256, 1000, seed=seed, device="cuda")))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, _step(static, y), strict=True))


@pytest.mark.gpu
@needs_cuda
def test_compiled_with_cuda_graphs():
    def loss(x, y):
        return gram(x, y, inter=True)[1].sum()

    x, y = pair(1, 128, 100)
    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    with use_backend("cuda"):
        for _ in range(3):
            a, b = (x.clone().requires_grad_() for _ in range(2))
            torch.compiler.cudagraph_mark_step_begin()
            compiled(a, y).backward()
            loss(b, y).backward()
            torch.testing.assert_close(a.grad, b.grad)
