"""The benchmark harness: it times what is right, refuses what is wrong, and writes what its columns say."""

import csv
from pathlib import Path

import pytest
import torch

import kdfast
from benchmarks import ceilings, memory, report, sweep
from benchmarks import measure as measure_module
from benchmarks.__main__ import main
from benchmarks.case import Baseline, Case, Provider, pair
from benchmarks.cases import HEADLINES, select
from benchmarks.cases.affinity import _by_sorting
from benchmarks.ceilings import Ceilings
from benchmarks.measure import measure
from kdfast.reference import affinity as reference

CPU = torch.device("cpu")
loss = kdfast.CKALoss()


class FixedCeilings(Ceilings):
    def bandwidth(self, working_set=None):
        return 1e10

    def matrix_rate(self, dtype):
        return 1e11


class Scaled(torch.autograd.Function):
    """The right value with a gradient 1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def broken(student, teacher):
    raise RuntimeError("no such kernel")


@pytest.fixture(scope="module")
def rows():
    baselines = {
        "right": Baseline(loss, tolerance=1e-4),
        "wrong value": Baseline(lambda s, t: loss(s, t) * 1.001, tolerance=1e-4),
        "wrong gradient": Baseline(lambda s, t: Scaled.apply(loss(s, t)), tolerance=1e-4),
        "nan": Baseline(lambda s, t: loss(s, t) * float("nan"), tolerance=1e-4),
        "too large": Baseline(loss, memory=1 << 60),
        "broken": Baseline(broken),
    }
    case = Case(
        "gram", "small", "test", loss, pair((6, 40), (6, 24)), 2 * 6 * 64 * 4, 6 * 6 * 64, baselines=baselines
    )
    found = measure(case, CPU, FixedCeilings(CPU), seconds=0.05, rounds=2, only=[*baselines, "eager", "cpu"])
    return {row["provider"]: row for row in found}


@pytest.mark.parametrize("provider", ["wrong value", "wrong gradient", "nan"])
def test_wrong_provider_is_not_timed(rows, provider):
    assert rows[provider]["status"] == "wrong"
    assert "median_ms" not in rows[provider]
    assert "allowed" in rows[provider]["note"]


@pytest.mark.parametrize(("provider", "reason"), [("too large", "GB are free"), ("broken", "no such kernel")])
def test_what_cannot_run_says_why(rows, provider, reason):
    assert rows[provider]["status"] == "not run"
    assert reason in rows[provider]["note"]


def test_right_providers_are_timed(rows):
    for name in ("right", "eager"):
        row = rows[name]
        assert row["status"] == "ok"
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["median_ms"])
    assert max(rows[name]["speedup"] for name in ("right", "eager")) == pytest.approx(1)
    assert rows["cpu"]["status"] == ("ok" if "note" not in rows["cpu"] else "not run")


def test_files_and_table(rows, tmp_path):
    facts = {"device": "A CPU (AVX2)", "threads": 2, "commit": "abc", "torch": "2", "date": "2025-01-01"}
    facts |= {"copy_gb_per_s": 10.0, "matrix_tflop_per_s": 0.1}
    suite = [("gram", "small", "float32", "contiguous"), ("gram", "other", "float32", "contiguous")]
    first = [facts | row | {"case": name} for row in rows.values() for name in ("other", "gone")]
    report.write(first, tmp_path, suite)
    (path,) = report.write([facts | row for row in rows.values()], tmp_path, suite)
    with path.open() as file:
        stored = list(csv.DictReader(file))
    assert tuple(stored[0]) == report.COLUMNS
    assert [row["case"] for row in stored] == ["small"] * len(rows) + ["other"] * len(
        rows
    )  # "gone" left the suite
    assert all((row["median_ms"] == "") == (row["status"] != "ok") for row in stored)
    text = report.summary(stored)
    assert "A CPU (AVX2), 2 threads" in text
    assert text.count("| small |") == 1

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks:cpu -->\nold\n<!-- /benchmarks:cpu -->\nafter\n")
    report.update_readme(readme, "benchmarks:cpu", text)
    assert readme.read_text() == f"before\n<!-- benchmarks:cpu -->\n{text}\n<!-- /benchmarks:cpu -->\nafter\n"
    with pytest.raises(ValueError, match="benchmarks:cuda"):
        report.update_readme(readme, "benchmarks:cuda", text)


def test_a_run_that_ran_out_of_time_is_resumed(tmp_path, capsys):
    # --minutes 0 starts no case: what is left is named, and nothing that was measured is measured again.
    command = ["--device", "cpu", "--op", "direction", "--provider", "cpu", "--quick", "--out", str(tmp_path)]
    assert main([*command, "--case", "[128, 64]", "--commit", "abc"]) == 0
    assert main([*command, "--resume", "--minutes", "0", "--commit", "abc"]) == 0
    cases = select(["direction"])
    assert f"out of time: {len(cases) - 1} cases" in capsys.readouterr().out
    assert main([*command, "--resume", "--minutes", "0", "--commit", "def"]) == 0
    assert f"out of time: {len(cases)} cases" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert {row["case"] for row in report.read(folder / "direction.csv")} == {cases[0].name}
    assert (folder / "roofline.png").stat().st_size > 0


def test_processes_prepare_at_once_and_time_in_turn(tmp_path):
    command = ["--device", "cpu", "--op", "direction", "--provider", "eager", "cpu", "--seconds", "0.05"]
    command += ["--case", "[128, 64]", "[512, 256]", "--jobs", "2", "--minutes", "2", "--commit", "abc"]
    profile = tmp_path / "kernels.csv"
    assert main([*command, "--out", str(tmp_path), "--profile", str(profile)]) == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    rows = report.read(folder / "direction.csv")
    assert {(row["case"], row["provider"]) for row in rows} >= {
        (case.name, "eager") for case in select(["direction"], ["[128, 64]", "[512, 256]"])
    }
    assert all(float(row["median_ms"]) > 0 for row in rows if row["status"] == "ok")
    if rows[-1]["status"] == "ok":
        assert report.read(profile)


def test_patch_of_a_variant_lasts_as_long_as_its_call():
    place = "benchmarks.measure:MOST_COPIES"
    more = measure_module.MOST_COPIES + 1
    with sweep.patched({place: more}):
        assert more == measure_module.MOST_COPIES
    assert more == measure_module.MOST_COPIES + 1
    with (
        pytest.raises(AttributeError, match="no_such_name"),
        sweep.patched({"benchmarks.measure:no_such_name": 1}),
    ):
        pass


def test_variants_are_of_cases_and_names_that_exist():
    pytest.importorskip("triton")
    files = sorted(Path(sweep.__file__).parent.glob("variants/*.py"))
    found, cases = sweep.variants(files), {case.key for case in select()}
    assert len(found) > 200
    for variant in found:
        assert tuple(variant[name] for name in ("family", "case", "dtype", "layout")) in cases, variant
        with sweep.patched(variant["patch"]):
            pass


def test_names_of_a_variant_are_of_its_module_unless_it_says_where():
    made = sweep.Variants("gram", "benchmarks.measure")
    made.add("more", "cka", MOST_COPIES=3, **{"benchmarks.sweep:WALL_SECONDS": 2.0})
    (variant,) = made
    assert variant["patch"] == {"benchmarks.measure:MOST_COPIES": 3, "benchmarks.sweep:WALL_SECONDS": 2.0}
    assert (variant["family"], variant["provider"], variant["dtype"]) == ("gram", "triton", "float32")


def test_peak_memory_sees_every_allocation():
    kept = torch.zeros(1 << 20)
    peak = memory.peak(lambda: (torch.ones(1 << 22).sum(), kept.sum()), CPU)
    if peak is None:
        pytest.skip("this system does not report peak memory")
    assert peak == pytest.approx(1 << 24, rel=0.05)


def test_headlines_are_cases_and_make_the_table(rows, tmp_path):
    keys = {case.key for case in select()}
    assert all((*place, "float32", "contiguous") in keys for place in HEADLINES)
    facts = {"device": "A CPU", "commit": "abc", "torch": "2", "date": "2025-01-01", "triton": ""}
    facts |= {"copy_gb_per_s": 10.0, "matrix_tflop_per_s": 0.1}
    report.write(
        [facts | row for row in rows.values()], tmp_path, [("gram", "small", "float32", "contiguous")]
    )
    found = report.headlines(tmp_path, {("gram", "small"): "CKA, small", ("gram", "gone"): "gone"})
    ours = "cpu" if rows["cpu"]["status"] == "ok" else None
    assert list(found) == (["CKA, small"] if ours else [])
    if ours:
        line = report.headline_table(found).splitlines()[-1]
        assert line.startswith("| CKA, small | - | ") and line.count("|") == 7
    assert "| small |" in report.write_tables(tmp_path).read_text()


def test_suite_is_well_formed():
    cases = select()
    assert len({(c.family, c.name, c.dtype, c.layout) for c in cases}) == len(cases)
    assert all(case.bytes > 0 and case.flops > 0 and case.source for case in cases)
    assert {case.family for case in select(["gram"], ["LOGIT"])} == {"gram"}
    with pytest.raises(ValueError, match="nonsense"):
        select(["nonsense"])


@pytest.mark.parametrize(
    "name", ["cka resnet20 [128, 64, 8, 8]", "debiased", "sp resnet20", "mmd", "logit cka, official"]
)
def test_published_forms_agree(name):
    (case,) = select(["gram"], [name])
    student, teacher = (x.detach()[:20].double() for x in case.inputs(CPU))
    with kdfast.use_backend("reference"):
        expected = case.loss(student, teacher).item()
    assert case.baselines["naive"].fn(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def _added_in_turn(x):
    """Sum of squares, one addition after another: in float32, but not as exact as a cascade of sums."""
    total = x.new_zeros(())
    for square in x.square().unbind():
        total = total + square
    return total


def _rounded(x):
    """The sum of squares of what TF32 keeps of x: ten bits; its gradient is that of x."""
    bits = x.detach().view(torch.int32)
    kept = ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)
    return (x + (kept - x).detach()).square().sum()


def test_an_alternative_may_add_in_any_order_but_not_round():
    """Nor may kdfast's own kernels do either."""
    case = Case(
        family="t",
        name="t",
        source="t",
        loss=lambda x: x.square().sum(),
        make=lambda device, seed: [10 + torch.rand(1 << 14, generator=torch.Generator().manual_seed(seed))],
        bytes=1,
        flops=1,
    )
    inputs = case.inputs(CPU)
    truth, bounds = measure_module._truth(case, inputs, CPU)

    def status(name, fn, **more):
        row = {"status": "ok"}
        provider = Provider(name, fn, **more)
        measure_module._check(provider, inputs, truth, measure_module._allowed(provider, bounds), CPU, row)
        return row["status"]

    assert status("compile", _added_in_turn) == "ok"
    assert status("cpu", _added_in_turn) == "wrong"
    for name in ("compile", "cpu"):
        assert status(name, case.loss) == "ok"
        assert status(name, _rounded) == "wrong"
    # A tolerance admits, it never refuses what is as exact as eager.
    assert status("naive", _rounded, tolerance=1e-2) == "ok"
    assert status("naive", case.loss, tolerance=1e-12) == "ok"


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.01, "wrong")])
def test_truth_of_its_own(factor, status):
    """Where the reference has no memory to run, another form is the truth, and still refuses a wrong one."""
    case = Case(
        family="t",
        name="t",
        source="t",
        loss=lambda x: factor * x.square().sum(),
        make=lambda device, seed: [torch.randn(50, generator=torch.Generator().manual_seed(seed))],
        bytes=1,
        flops=1,
        baselines={"naive": Baseline(lambda x: x.square().sum())},
        memory=1 << 60,
        truth=lambda x: (x * x).sum(),
        op="gram",
    )
    rows = {row["provider"]: row for row in measure(case, CPU, FixedCeilings(CPU), seconds=0.01, rounds=1)}
    assert rows["eager"]["status"] == rows["compile"]["status"] == "not run"
    assert rows["naive"]["status"] == "ok"
    if rows["cpu"]["status"] != "not run":  # no extension
        assert rows["cpu"]["status"] == status


def test_sorted_affinity_agrees():
    """The truth of concatenation at sizes whose matrix does not fit."""
    a, b, g = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((2, 9), (2, 13), (2, 13, 3)))
    found, truth = _by_sorting(a, b, g), reference.affinity(a, b, g)
    weights = torch.randn_like(truth)
    for y, z in zip(
        (found, *torch.autograd.grad(found, (a, b, g), weights)),
        (truth, *torch.autograd.grad(truth, (a, b, g), weights)),
        strict=True,
    ):
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-13)


def test_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("bandwidth", "matrix_rate"):
        monkeypatch.setattr(Ceilings, name, getattr(FixedCeilings, name))
    options = ["--device", "cpu", "--quick", "--rounds", "1", "--provider", "naive", "eager", "--out"]
    small = select(["gram"], ["logit cka [128"])
    monkeypatch.setattr("benchmarks.__main__.select", lambda *_: small)
    assert main([*options, str(tmp_path)]) == 0
    assert "logit cka [128, 100]" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/gram.csv"))) == 1
    assert len(list(tmp_path.glob("*/*.png"))) == 3


def test_copies_have_the_size_of_the_working_set():
    for nbytes in (100, 8601600, 12902400, 1 << 20, (1 << 24) + 1):
        assert nbytes <= ceilings._rounded_up(nbytes) <= nbytes * 9 / 8
