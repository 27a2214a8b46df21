"""Fixtures and comparisons shared by all tests. Truth is the float64 reference; see :func:`assert_as_accurate`."""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kdfast import backend

if backend.interpreting():
    import interpreter

    interpreter.make_fast()

# Two cores are shared by the workers of pytest-xdist.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def keep_freed_memory(keep: bool) -> None:
    """Whether malloc keeps large blocks that are freed, to use them again as they were left, where it is glibc's.

    Mapping them anew, with a page fault for each 4 KB, was most of the time of tests of large tensors.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in ((-4, 0 if keep else 65536), (-1, 2**31 - 1 if keep else 128 << 10)):
        if mallopt is not None:
            mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD


keep_freed_memory(True)


@pytest.fixture
def freed_memory_is_given_back() -> Iterator[None]:
    """For tests that measure memory."""
    keep_freed_memory(False)
    yield
    keep_freed_memory(True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "interpret" in item.keywords and not backend.interpreting():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def device_still_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an illegal access nothing on the device works in this process: it ends, so that other tests tell the truth."""
    yield
    if "gpu" not in request.keywords or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid}: the device no longer answers: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message)
        print(message, file=sys.__stderr__, flush=True)
        os._exit(1)  # pytest-xdist names the test and starts another process


@contextmanager
def made_once(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A path in a folder of all processes of pytest-xdist. Others wait meanwhile: what is there need not be made again."""
    folder = factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


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


def same_for_any_threads(compute: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
    """What ``compute`` returns, the same bits whatever the number of threads."""
    threads, expected = torch.get_num_threads(), compute()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for found, other in zip(compute(), expected, strict=True):
                assert torch.equal(found, other)
    finally:
        torch.set_num_threads(threads)
    return expected
