"""Large results of CPU ops lie in memory that is kept for the next result of their size."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import needs_extension

import kdfast
from kdfast import _extension

pytestmark = needs_extension


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    _extension.module.release_memory()


def maps(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size).requires_grad_(), torch.randn(size)


def gradient(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(kdfast.KDLoss()(student, teacher), student)[0]


SIZE = (512, 1024)  # 2 MB


def test_freed_results_are_used_again_and_live_ones_are_not() -> None:
    student, teacher = maps(*SIZE)
    first = gradient(student, teacher)
    values, place = first.clone(), first.data_ptr()
    second = gradient(2 * student, teacher)
    assert second.data_ptr() != place
    assert torch.equal(first, values)
    view = first[3:5]
    del first
    assert gradient(student, teacher).data_ptr() != place  # a view keeps it
    del view
    assert gradient(student, teacher).data_ptr() == place


def test_sizes_that_differ_much_are_kept_apart() -> None:
    large, small = maps(1024, 1024), maps(512, 1024)
    place = gradient(*large).data_ptr()
    assert gradient(*small).data_ptr() != place
    assert gradient(large[0][:900], large[1][:900]).data_ptr() == place


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced", "expanded"])
def test_gradients_have_the_layout_of_empty_like(layout: str) -> None:
    x = torch.randn(4, 64, 64, 64)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "permuted":
        x = x.permute(0, 1, 3, 2)
    elif layout == "sliced":
        x = torch.randn(4, 64, 64, 80)[..., 8:72]
    elif layout == "expanded":
        x = torch.randn(4, 64, 1, 64).expand(4, 64, 64, 64)
    student, teacher = x.detach().requires_grad_(), torch.randn(4, 64, 64, 64)
    (found,) = torch.autograd.grad(kdfast.AttentionGuidedLoss()(student, teacher), student)
    assert found.stride() == torch.empty_like(student).stride()
    with kdfast.use_backend("reference"):
        (expected,) = torch.autograd.grad(kdfast.AttentionGuidedLoss()(student, teacher), student)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_results_are_tensors_like_others(tmp_path) -> None:
    student, teacher = maps(*SIZE)
    found = gradient(student, teacher)
    expected = found.clone()
    torch.save(found, tmp_path / "gradient.pt")
    assert torch.equal(torch.load(tmp_path / "gradient.pt"), expected)
    assert torch.equal(copy.deepcopy(found).share_memory_(), expected)
    assert torch.equal(torch.from_numpy(found.numpy()), expected)
    found.add_(1).mul_(0)
    assert not found.any()
    optimizer = torch.optim.SGD([student], lr=1.0)
    for step in range(3):  # .grad is freed, or added to, and used again
        kdfast.KDLoss()(student, teacher).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert bool(torch.isfinite(student).all())


def test_threads_do_not_share_memory_in_use() -> None:
    given = [maps(*SIZE) for _ in range(3)]
    expected = [gradient(*pair) for pair in given]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            found = gradient(*given[i])
            if not torch.equal(found, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


_RESIDENT = """
import re, torch, kdfast
from pathlib import Path
from kdfast import _extension
torch.set_num_threads(1)
s, t = torch.randn(2048, 2048, requires_grad=True), torch.randn(2048, 2048)  # gradients of 16 MB
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
step = lambda: torch.autograd.grad(kdfast.KDLoss()(s, t), s)
step()
_extension.module.release_memory()
before = resident()
live = [step() for _ in range(4)]
most = resident() - before
del live
freed = resident() - before
_extension.module.release_memory()
print(most, freed, resident() - before)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("keep", "kept"), [("", 64), ("0", 0), ("40", 32)])
def test_no_more_is_kept_than_is_allowed(keep: str, kept: int) -> None:
    found = run(_RESIDENT, KDFAST_KEEP_MB=keep)
    assert found.returncode == 0, found.stderr
    most, freed, released = map(int, found.stdout.split())
    assert most == pytest.approx(64, abs=4)
    assert freed == pytest.approx(kept, abs=4)
    assert released == pytest.approx(0, abs=4)


_WRONG = """
import os, torch, kdfast
s, t = torch.randn(512, 1024, requires_grad=True), torch.randn(512, 1024)
for wrong in ("-1", "some", "1.5"):
    os.environ["KDFAST_KEEP_MB"] = wrong
    try:
        kdfast.KDLoss()(s, t)
    except RuntimeError as error:
        assert f"KDFAST_KEEP_MB: need a number of MB, 0 or more, got {wrong}" in str(error), error
    else:
        raise AssertionError(wrong)
os.environ["KDFAST_KEEP_MB"] = "1"
kdfast.KDLoss()(s, t).backward()
"""


def test_a_wrong_limit_is_refused() -> None:
    found = run(_WRONG)
    assert found.returncode == 0, found.stderr
