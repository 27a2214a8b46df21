"""Launches of ``kdfast.kernels._jit`` against Triton's own, on a driver that launches nothing: the same kernel, grid,
stream and arguments; and when Triton must be asked."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import fake_cuda
import scenarios
import triton
import triton.language as tl
from test_triton_aot import CASES
from triton import knobs

from kdfast import backend
from kdfast.kernels import _jit
from kdfast.kernels._jit import Kernel, jit
from kdfast.kernels._launch import View

if backend.interpreting():
    pytest.skip("the interpreter replaces the launcher", allow_module_level=True)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="this process has a real driver"),
    pytest.mark.skipif(fake_cuda.COMPILER is None, reason="the driver is made by a C compiler"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

FACTOR = tl.constexpr(3)


def _probe(x, y, size, count, pair, view, C: tl.constexpr, BLOCK: tl.constexpr = 16):
    value = tl.load(x + tl.arange(0, BLOCK)) * FACTOR
    tl.store(y + tl.arange(0, BLOCK) * size, value + count)


@pytest.fixture
def driver() -> Iterator[fake_cuda.Driver]:
    with fake_cuda.active() as fake:
        yield fake


@pytest.fixture
def probe() -> Kernel:
    return jit(_probe, do_not_specialize=["count"])


X = torch.zeros(64)
BASE = {
    "x": X, "y": X[16:], "size": 5, "count": 5, "pair": (5, 0.5), "view": View(X, *range(2, 13)), "C": 1,
    "num_warps": 4,
}  # fmt: skip
TENSORS = (X[1:], X[4:], X.half(), X.long(), X.bfloat16()[1:], X[:0], X.double()[1:], None)
NUMBERS = (
    0,
    1,
    2,
    16,
    17,
    -1,
    -16,
    2**31 - 1,
    2**31,
    -(2**31),
    -(2**31) - 1,
    2**40,
    2**63,
    True,
    False,
    1.0,
    2.5,
    None,
)
OTHERS = {
    "x": TENSORS,
    "y": TENSORS,
    "size": NUMBERS,
    "count": NUMBERS,
    "pair": (
        (1, 0.5), (16, 0.5), (5, 2.5), (True, 0.5), (5, 1), (5, True), (2**31, None), (), (X, 5), (X[1:], 5), (5, X),
        (5, X[1:]), (0.5, X.half()), (X, (5, X)), (X, (5, X[1:])), (X, (True, 0.5)), (X, (1, 0.5)),
    ),
    "view": (
        View(X[1:], *range(2, 13)), View(X, *range(1, 12)), View(X, True, *range(2, 12)), View(X, 1.0, *range(2, 12)),
        View(X.half(), *range(2, 13)), (X, *range(2, 13)),
    ),
    "C": (0, True, False, 1.0, 0.0, -0.0, "1", None, (1, 2), (True, 2), (1, 2.0), tl.float32, tl.float64, 2**40),
    "BLOCK": (32,),
    "num_warps": (8,),
    "num_stages": (2,),
    "maxnreg": (255,),
}  # fmt: skip


def _launched(driver: fake_cuda.Driver, kernel: Kernel, grid: tuple[int, ...] = (2, 3), **arguments) -> bool:
    """Launches as Triton does and as ``kernel`` does, which must be the same; whether Triton was asked for the latter."""
    before, launches = kernel.by_triton, driver.launches
    kernel[grid](**arguments)
    found = driver.last()
    kernel.triton[grid](**arguments)
    assert driver.launches == launches + 2
    assert driver.last() == found
    return kernel.by_triton > before


def test_differs_where_triton_does(driver, probe):
    assert _launched(driver, probe, **BASE)
    for name, values in OTHERS.items():
        for value in values:
            _launched(driver, probe, **BASE | {name: value})
            assert not _launched(driver, probe, **BASE | {name: value}), (name, value)
            assert not _launched(driver, probe, **BASE)


def test_differs_where_triton_does_whatever_came_before(driver, probe):
    choose = random.Random(0)
    given = {name: [BASE[name], *values] if name in BASE else values for name, values in OTHERS.items()}
    for _ in range(2000):
        changed = choose.sample(list(given), choose.randrange(1, 5))
        _launched(driver, probe, **BASE | {name: choose.choice(given[name]) for name in changed})


def test_order_and_defaults(driver, probe):
    *arguments, warps = BASE.values()
    probe[(7,)](*arguments, num_warps=warps)
    first = driver.last()
    for _ in range(2):
        probe[(7, 1, 1)](
            *arguments[:3], **{k: BASE[k] for k in ("C", "view", "pair", "count")}, BLOCK=16, num_warps=4
        )
        assert driver.last() == first
    assert probe.by_triton == 1
    with pytest.raises(TypeError):
        probe[(7,)](*arguments[:-1])


@pytest.mark.parametrize("name", ["size", "pair", "view", "C"])
def test_integers_that_are_not_specialised_on_take_no_new_key(driver, probe, name):
    _launched(driver, probe, **BASE)
    for count in (1, 16, 2**31 - 1, -(2**31)):
        assert not _launched(driver, probe, **BASE | {"count": count})
    assert _launched(driver, probe, **BASE | {"count": 2**31})
    assert _launched(driver, probe, **BASE | {name: OTHERS[name][0]})
    assert not _launched(driver, probe, **BASE | {"pair": (5, 7.5)})


def test_current_stream_and_device(driver, probe):
    _launched(driver, probe, **BASE)
    driver.stream = 9
    assert not _launched(driver, probe, **BASE)
    assert driver.last().stream == 9
    driver.device = 1
    assert _launched(driver, probe, **BASE)
    assert not _launched(driver, probe, **BASE)
    assert driver.last().stream == 9 + (1 << 16)


class Subclass(Tensor):
    pass


class Count(int):
    pass


OTHER_TYPES = {
    "parameter": {"x": torch.nn.Parameter(X)},
    "subclass": {"y": X.as_subclass(Subclass)},
    "wrapped": {"x": triton.TensorWrapper(X.to(torch.int8), tl.float8e5)},
    "int": {"size": Count(5)},
    "int in a tuple": {"pair": (5, Count(5))},
    "constexpr": {"C": tl.constexpr(1)},
    "constexpr in a tuple": {"C": (1, tl.constexpr(1))},
    "kernel": {"C": jit(_probe).triton},
}


@pytest.mark.parametrize("other", OTHER_TYPES)
def test_other_types_are_left_to_triton(driver, probe, other):
    for _ in range(3):
        assert _launched(driver, probe, **BASE | OTHER_TYPES[other])


def test_grids_that_are_functions_are_left_to_triton(driver, probe):
    for _ in range(2):
        assert _launched(driver, probe, lambda arguments: (arguments["BLOCK"],), **BASE)
        assert driver.last().grid == (16, 1, 1)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_see_every_launch(driver, probe, name):
    _launched(driver, probe, **BASE)
    seen = []
    hook = getattr(knobs.runtime, name)
    hook.add(seen.append)
    try:
        for _ in range(2):
            assert _launched(driver, probe, **BASE)
    finally:
        hook.remove(seen.append)
    assert len(seen) == 4
    assert not _launched(driver, probe, **BASE)
    with mock.patch.object(knobs.runtime, name, lambda metadata: seen.append(metadata)):
        assert _launched(driver, probe, **BASE)
    assert len(seen) == 6
    with mock.patch.object(knobs.runtime, name, None):
        assert not _launched(driver, probe, **BASE)


def test_settings_that_change_what_is_compiled_are_left_to_triton(driver, probe):
    _launched(driver, probe, **BASE)
    usual = driver.last().kernel
    with mock.patch.object(knobs.runtime, "debug", True):
        assert _launched(driver, probe, **BASE)
        assert driver.last().kernel != usual
    with mock.patch.object(knobs.compilation, "instrumentation_mode", "other"):
        assert _launched(driver, probe, **BASE)
        assert driver.last().kernel != usual
    with mock.patch.object(knobs.runtime, "add_stages_inspection_hook", return_value=("key", "hash")):
        assert _launched(driver, probe, **BASE)
    assert not _launched(driver, probe, **BASE)
    assert driver.last().kernel == usual
    called = []
    probe.triton.add_pre_run_hook(lambda *a, **o: called.append(a))
    assert _launched(driver, probe, **BASE)
    assert len(called) == 2


def test_globals_that_changed_are_refused_as_triton_does(driver, probe):
    probe.triton.used_global_vals = {
        ("FACTOR", id(globals())): (tl.constexpr(3), globals())
    }  # as compiling leaves it
    for _ in range(2):
        probe[(1,)](**BASE)
    assert probe.by_triton == 1
    with mock.patch.dict(globals(), FACTOR=tl.constexpr(4)), pytest.raises(RuntimeError, match="FACTOR"):
        probe[(1,)](**BASE)


def test_forgets_the_kernels_of_another_driver(driver, probe):
    _launched(driver, probe, **BASE)
    with fake_cuda.active() as other:
        probe.triton.device_caches.clear()
        assert _launched(other, probe, **BASE)
        assert not _launched(other, probe, **BASE)


def test_keys_are_bounded(driver, probe, monkeypatch):
    monkeypatch.setattr(_jit, "MOST_KEYS", 3)
    for size in range(20, 30):
        _launched(driver, probe, **BASE | {"size": size})
    ((_, found),) = probe._known.values()
    assert len(found) <= 3


def test_what_is_launched_stays_loaded_and_arguments_do_not(driver, probe):
    import gc
    import weakref

    x = torch.zeros(64)
    _launched(driver, probe, **BASE | {"x": x, "view": View(x, *range(2, 13)), "pair": (x, 5)})
    ((_, found),) = probe._known.values()
    ((compiled, *_),) = found.values()
    probe.triton.device_caches.clear()
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    assert compiled.function


@pytest.fixture
def compared(driver, monkeypatch) -> list[tuple[str, bool]]:
    """The kernels that are launched, and whether Triton was asked; each launch is compared with Triton's."""
    found: list[tuple[str, bool]] = []
    launch_of = Kernel.__getitem__

    def both(kernel, grid):
        def launch(*args, **options):
            before = kernel.by_triton
            launch_of(kernel, grid)(*args, **options)
            launched = driver.last()
            kernel.triton[grid](*args, **options)
            assert driver.last() == launched, kernel.__name__
            found.append((kernel.__name__, kernel.by_triton > before))

        return launch

    monkeypatch.setattr(Kernel, "__getitem__", both)
    return found


def _twice(call, compared):
    call()
    first = len(compared)
    call()
    assert first and compared[first:] == [(name, False) for name, _ in compared[:first]]


@pytest.mark.parametrize("case", CASES)
def test_ops_launch_what_triton_would(case, compared, monkeypatch):
    for family in ("criss_cross", "gram"):
        monkeypatch.setattr(f"kdfast.kernels.{family}.capability", lambda _: 9)
    precision, call = CASES[case]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        _twice(call, compared)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("layout", scenarios.LAYOUTS)
@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_losses_launch_what_triton_would(name, layout, compared, monkeypatch):
    scenario = scenarios.SCENARIOS[name]
    if layout not in scenario.layouts():
        pytest.skip("no such layout")
    monkeypatch.setattr(
        backend, "choose", lambda op, device, order, *_: "triton" if "triton" in order else "reference"
    )
    monkeypatch.setattr(backend, "is_cpu", lambda x: False)
    inputs = [scenario.inputs("cpu", dtype, layout) for dtype in (torch.float32, torch.bfloat16)]

    def call():
        for given in inputs:
            scenarios.step(scenario.loss, given)

    _twice(call, compared)


def test_compiled_kernels():
    """The same with a kernel that is really compiled, as the handles that are kept are Triton's."""
    kernel = jit(_probe, do_not_specialize=["count"])
    with fake_cuda.active(compiling=True) as driver:
        try:
            for x, asked in itertools.product((X, X[1:]), (True, False)):
                assert _launched(driver, kernel, **BASE | {"x": x}) is asked
            assert {m.packed_metadata[0] for m, *_ in next(iter(kernel._known.values()))[1].values()} == {4}
        finally:
            kernel.triton.device_caches.clear()
            kernel._known.clear()
