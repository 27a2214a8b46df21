"""Fixtures and comparisons shared by all tests. Truth is the float64 reference; see :func:`assert_as_accurate`."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

from kdfast import backend

# Two cores are shared by the workers of pytest-xdist.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", metavar="I/N", help="run the I-th of N parts of the tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--shard").split("/"))
    # Tests of one scenario stay together: they launch the same kernels, which the first of them compiles.
    items[:] = [item for item in items if zlib.crc32(_group(item).encode()) % parts == part % parts]
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "interpret" in item.keywords and not backend.interpreting():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


def _group(item: pytest.Item) -> str:
    call = getattr(item, "callspec", None)
    return str(call.params["scenario"]) if call and "scenario" in call.params else item.nodeid


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


needs_extension = pytest.mark.skipif(backend.why_not("cpu") is not None, reason=str(backend.why_not("cpu")))


def assert_as_accurate(
    got: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor, floor: float, what: str = ""
) -> None:
    """The error of ``got`` against float64 ``truth`` is at most twice that of the same-dtype reference, plus ``floor``.

    ``floor`` is absolute, in the units of ``truth``; NaN anywhere fails.
    """
    truth = truth.double()
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, need {list(truth.shape)}"
    error, allowed = (got.double() - truth).abs(), 2 * (same_dtype.double() - truth).abs().max() + floor
    assert bool((error <= allowed).all()), f"{what}: error {error.max():.3g}, allowed {allowed:.3g}"
