"""Every loss with kernels on a GPU, by Triton and by CUDA: types, layouts, streams, graphs, torch.compile.

What only a GPU can show. On the CPU the same scenarios run through the C++ backend, so that they are known to work.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from scenarios import SCENARIOS, Scenario, step

from kdfast import backend, use_backend

FLOOR = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(backend.why_not("cpu") is not None, reason="no extension")),
    *(pytest.param(name, marks=ON_GPU) for name in ("triton", "cuda")),
]
GPU_BACKENDS = BACKENDS[1:]
VARIANTS = [
    pytest.param(name, dtype, layout, id=f"{name}-{str(dtype).removeprefix('torch.')}-{layout}")
    for name, scenario in SCENARIOS.items()
    for dtype in FLOOR
    for layout in scenario.layouts()
    if dtype == torch.float32 or layout == "contiguous"
]

COMPILED = (
    "cka",
    "pcka",
    "attention",
    "direction",
    "kd",
    "concatenation",
    "criss-cross",
)  # one per op: compiling takes seconds


def device_of(name: str) -> str:
    return "cpu" if name == "cpu" else "cuda"


def run(name: str, scenario: Scenario, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """On backend ``name``; what CUDA leaves to Triton by design is skipped, with the op's reason."""
    with use_backend(name):
        try:
            return step(scenario.loss, inputs)
        except NotImplementedError as error:
            pytest.skip(str(error))


@contextmanager
def side_stream():
    """Work on a stream of its own, in order with what comes before and after."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def check(found: list, same_dtype: list, truth: list, floor: float) -> None:
    for f, s, t in zip(found, same_dtype, truth, strict=True):
        size = max(float(t.abs().max()), 1e-3 if t.dim() == 0 else 0.0)
        error, allowed = float((f.double() - t).abs().max()), 2 * float((s.double() - t).abs().max())
        assert error <= allowed + floor * size, f"error {error:.3g}, allowed {allowed + floor * size:.3g}"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("scenario", "dtype", "layout"), VARIANTS)
def test_agrees_with_float64(scenario, dtype, layout, name):
    scenario = SCENARIOS[scenario]
    inputs = scenario.inputs(device_of(name), dtype, layout)
    found = run(name, scenario, inputs)
    wide = [
        v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v for v in inputs
    ]
    with use_backend("reference"):
        truth, same = step(scenario.loss, wide), step(scenario.loss, inputs)
    check(found, same, truth, FLOOR[dtype])
    for f, v in zip(found[1:], inputs, strict=False):
        assert f.dtype == v.dtype and f.shape == v.shape


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_same_bits_every_time(scenario, name):
    scenario = SCENARIOS[scenario]
    inputs = scenario.inputs("cuda")
    first = run(name, scenario, inputs)
    for _ in range(3):
        for f, g in zip(first, run(name, scenario, inputs), strict=True):
            assert torch.equal(f, g)


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_side_stream(scenario, name):
    scenario = SCENARIOS[scenario]
    inputs = scenario.inputs("cuda")
    expected = run(name, scenario, inputs)
    with side_stream():
        torch.cuda._sleep(20_000_000)
        # Ready only after the sleep: a launch on another stream would read them too early.
        late = [(v.detach() + 0).requires_grad_(v.requires_grad) for v in inputs]
        found = run(name, scenario, late)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_graph_capture(scenario, name):
    scenario = SCENARIOS[scenario]
    inputs, others = scenario.inputs("cuda"), scenario.inputs("cuda", seed=7)
    expected = run(name, scenario, others)
    with side_stream():
        run(name, scenario, inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(name, scenario, inputs)  # what draws on the host is skipped, with its reason
    for v, other in zip(inputs, others, strict=True):
        v.detach().copy_(other.detach())
    for _ in range(2):  # a counter that one replay leaves behind would show in the next
        graph.replay()
        torch.cuda.synchronize()
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e)


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("scenario", COMPILED)
def test_compiled_with_reduce_overhead(scenario, name):
    scenario = SCENARIOS[scenario]
    inputs = scenario.inputs("cuda")
    expected = run(name, scenario, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(scenario.loss, mode="reduce-overhead", fullgraph=True)
    with use_backend(name):
        for _ in range(3):  # warm-up, capture, replay
            torch.compiler.cudagraph_mark_step_begin()
            found = [v.clone() for v in step(compiled, inputs)]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_host_synchronisation(scenario, name):
    scenario = SCENARIOS[scenario]
    inputs = scenario.inputs("cuda")
    run(name, scenario, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, scenario, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
