"""ClassMeans: exact in any order, whole after failures, summed over processes; files."""

from __future__ import annotations

import json

import pytest
import torch
import torch.multiprocessing as mp

from kdfast.class_means import ClassMeans, compute_class_means


def data(rows: int = 60, dim: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.randn(rows, dim) * 0.01 + 1000  # a float32 running sum would lose the spread
    labels = torch.randint(0, classes - 1, (rows,))  # the last class is never seen
    return features, labels


def naive(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    means = torch.zeros(classes, features.shape[1])
    for k in labels.unique().tolist():
        means[k] = features[labels == k].double().mean(0)
    return means


def test_any_batches_in_any_order():
    features, labels = data()
    expected = naive(features, labels, 4)
    for seed in range(5):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        means = ClassMeans(4, 5)
        for rows in order.split(7):
            means.update(features[rows], labels[rows])
        assert torch.equal(means.compute(), expected)
        assert torch.equal(means.counts, labels.bincount(minlength=4))
    assert not means.compute()[3].any() and means.counts[3] == 0


def test_ignored_rows_and_types():
    features, labels = data()
    means = ClassMeans(4, 5)
    means.update(features.requires_grad_(), torch.where(labels == 1, -100, labels).int())
    assert means.counts[1] == 0 and not means.compute().requires_grad
    means.update(features[:0], labels[:0])
    assert means.compute(torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda f, l: (f, torch.where(l == 0, 4, l)), ValueError),
        (lambda f, l: (f, l - 1), ValueError),
        (lambda f, l: (f.index_fill(0, torch.tensor([59]), float("nan")), l), ValueError),
        (lambda f, l: (f[:, :3], l), ValueError),
        (lambda f, l: (f, l[:3]), ValueError),
        (lambda f, l: (f, l.float()), TypeError),
        (lambda f, l: (f.long(), l), TypeError),
    ],
)
def test_a_bad_update_changes_nothing(change, error):
    features, labels = data()
    means = ClassMeans(4, 5)
    means.update(features, labels)
    before, counts = means.compute(), means.counts
    with pytest.raises(error, match="features|labels"):
        means.update(*change(features, labels))
    assert torch.equal(means.compute(), before) and torch.equal(means.counts, counts)


def test_an_interrupted_update_changes_nothing(monkeypatch):
    features, labels = data()
    means = ClassMeans(4, 5)
    means.update(features, labels)
    before, counts = means.compute(), means.counts

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for step in ("cat", "aminmax"):  # on the way to the one step that adds
        with monkeypatch.context() as patch:
            patch.setattr(torch, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                means.update(features, labels)
        assert torch.equal(means.compute(), before) and torch.equal(means.counts, counts)


def test_files(tmp_path):
    features, labels = data()
    means = ClassMeans(4, 5)
    means.update(features[:30], labels[:30])
    means.save(tmp_path / "means.pt")
    again = ClassMeans.load(tmp_path / "means.pt")
    again.update(features[30:], labels[30:])  # goes on
    assert torch.equal(again.compute(), naive(features, labels, 4))
    again.save(tmp_path / "means.json")
    published = json.loads((tmp_path / "means.json").read_text())
    assert set(published) == {"0", "1", "2"} and len(published["0"]) == 5
    loaded = ClassMeans.load(tmp_path / "means.json", num_classes=4)
    assert torch.equal(loaded.compute(), again.compute())
    with pytest.raises(RuntimeError, match="counts"):
        loaded.update(features, labels)
    again.save(tmp_path / "rounded.json", decimals=4)
    assert json.loads((tmp_path / "rounded.json").read_text())["0"][0] == round(
        again.compute()[0, 0].item(), 4
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["means.json", "means.pt", "rounded.json"]


def test_published_json(tmp_path):
    path = tmp_path / "teacher.json"
    path.write_text('{"2": [1.0, 2.5], "0": [3.0, -4.0]}')
    means = ClassMeans.load(path)
    assert means.compute().tolist() == [[3, -4], [0, 0], [1, 2.5]] and means.counts.tolist() == [1, 0, 1]
    for text in ('{"0": [1.0], "1": [1.0, 2.0]}', '{"a": [1.0]}', "[1]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="means"):
            ClassMeans.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    means = ClassMeans(2, 3)
    path = tmp_path / "means.pt"
    means.save(path)
    before = path.read_bytes()

    def fail(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        means.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def _process(rank: int, folder: str, features: torch.Tensor, labels: torch.Tensor) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    means = ClassMeans(4, 5)
    rows = slice(rank * 25, 25 + rank * 35)  # 25 and 35 rows
    means.update(features[rows][:10], labels[rows][:10])
    means.all_reduce()
    means.all_reduce()  # nothing counts twice
    means.update(features[rows][10:], labels[rows][10:])
    means.all_reduce()
    means.save(f"{folder}/means{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes(tmp_path):
    features, labels = data()
    mp.spawn(_process, (str(tmp_path), features, labels), nprocs=2)
    for rank in (0, 1):
        means = ClassMeans.load(tmp_path / f"means{rank}.pt")
        assert torch.equal(means.compute(), naive(features, labels, 4))
        assert torch.equal(means.counts, labels.bincount(minlength=4))


def test_of_a_model_and_a_loader(capsys):
    features, labels = data()
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5))
    model[1].eval()  # a frozen part stays as it is
    loader = [(f, l) for f, l in zip(features.split(16), labels.split(16), strict=True)]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    means = compute_class_means(model, loader, 4)
    torch.testing.assert_close(means.compute(), naive(features / (1 + 1e-5) ** 0.5, labels, 4))
    assert model.training and model[0].training and not model[1].training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    doubled = compute_class_means(model, loader, 4, embed=lambda m, x: 2 * m(x), progress=False)
    torch.testing.assert_close(doubled.compute(), 2 * means.compute())
    with pytest.raises(ValueError, match="loader"):
        compute_class_means(model, [], 4)
