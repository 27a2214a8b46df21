"""The CUDA C++ kernels of the gram op on the CPU, by tests/cuda_emulator: logic and indexing without a GPU."""

import ctypes
import shutil

import pytest
import torch
from emulated import compile_emulated

from kdfast.reference.gram import gram as reference

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORWARD, BACKWARD_SAVED, BACKWARD_AGAIN = range(3)
FLOOR = 2e-6

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (n, ctypes.c_int64) for n in ("group", "row", "feature", "features")
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("x", Matrix),
        ("y", Matrix),
        ("groups", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("centered", ctypes.c_int32),
        ("inter", ctypes.c_int32),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = compile_emulated("gram", tmp_path_factory)
    library.kd_gram_workspace.restype = ctypes.c_int64
    return library


def matrix(v):
    return Matrix(v.data_ptr(), *v.stride(), v.shape[2])


def poison(*shape, like=None):
    return torch.full(shape, float("nan")) if like is None else torch.full_like(like, float("nan"))


def pointer(v):
    return None if v is None else ctypes.c_void_p(v.data_ptr())


def strides(v):
    return (ctypes.c_int64 * v.dim())(*v.stride())


def run(library, x, y, centered, inter, save, grad_products, grad_distance, need=(True, True)):
    """x, y [G, N, D]; results of the emulated kernels: products, distance, grad_x, grad_y."""
    groups, n, _ = x.shape
    terms = 1 + inter
    problem = Problem(matrix(x), matrix(y), groups, n, DTYPES[x.dtype], centered, inter)
    address = ctypes.byref(problem)
    products, distance = poison(terms, 3, groups), poison(terms, groups)
    saved = poison(groups, (3 if inter else 2) * (n + inter) ** 2) if save else None
    workspace = poison(library.kd_gram_workspace(address, FORWARD))
    code = library.kd_gram_forward(
        address, pointer(products), pointer(distance), pointer(saved), pointer(workspace), None
    )
    assert code == 0
    workspace = poison(library.kd_gram_workspace(address, BACKWARD_SAVED if save else BACKWARD_AGAIN))
    grads = [poison(like=v) if wanted else None for v, wanted in zip((x, y), need, strict=True)]
    code = library.kd_gram_backward(
        address,
        pointer(grad_products),
        strides(grad_products),
        pointer(grad_distance),
        strides(grad_distance),
        pointer(saved),
        ctypes.byref(Matrix() if grads[0] is None else matrix(grads[0])),
        ctypes.byref(Matrix() if grads[1] is None else matrix(grads[1])),
        pointer(workspace),
        None,
    )
    assert code == 0
    return products, distance, *grads


def truth(x, y, centered, inter, grad_products, grad_distance, dtype):
    """The reference in `dtype`, its gradients too."""
    x, y = (v.detach().to(dtype).requires_grad_() for v in (x, y))
    views = [v[:, :, None, :, None, None] for v in (x, y)]
    outputs = reference(*views, 0, bool(centered), False, bool(inter), False)
    grads = torch.autograd.grad(
        outputs,
        (x, y),
        (grad_products.to(outputs[0].dtype), grad_distance.to(outputs[1].dtype)),
        materialize_grads=True,
    )
    return *outputs, *grads


def error(found, exact, scale):
    return ((found.double() - exact.double()).abs() / scale).max().item()


def check(library, x, y, centered=1, inter=0, save=True, products_gradient=False, need=(True, True)):
    groups, n, terms = x.shape[0], x.shape[1], 1 + inter
    generator = torch.Generator().manual_seed(n)
    grad_distance = torch.rand(terms, groups, generator=generator) + 0.5
    exact_products = truth(
        x, y, centered, inter, torch.zeros(terms, 3, groups), grad_distance, torch.float64
    )[0].clamp_min(1e-30)
    # Products are of the size of |K|^2: this makes their share of the gradient as large as the distance's.
    grad_products = torch.zeros(terms, 3, groups)
    if products_gradient:
        grad_products = (torch.rand(terms, 3, groups, generator=generator) / exact_products).float()
    upstream = (grad_products, grad_distance)
    found = run(library, x, y, centered, inter, save, *upstream, need)
    exact = truth(x, y, centered, inter, *upstream, torch.float64)
    plain = truth(x, y, centered, inter, *upstream, torch.float32)
    for name, f, e, p in zip(("products", "distance", "grad_x", "grad_y"), found, exact, plain, strict=True):
        if f is None:
            continue
        assert torch.isfinite(f).all(), name
        floor = FLOOR if f.dtype == torch.float32 else torch.finfo(f.dtype).eps  # one rounding of the result
        if name == "products":
            scale = e.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
        elif name == "distance":
            scale = 1.0
        else:  # of the gradient's two terms, L^ Xc / |K| and <K^, L^> K^ Xc / |K|: their difference may be small
            view, which = (x, 1) if name == "grad_x" else (y, 2)
            norm = exact_products[0, which].min().sqrt().item()
            spread = (view - centered * view.mean(1, True)).abs().max().item()
            scale = max(e.abs().max().item(), 2 * spread / norm if norm > 1e-12 else 0.0, 1e-30)
        limit = 2 * error(p, e, scale) + floor
        assert error(f, e, scale) <= limit, (name, error(f, e, scale), limit)
    return found, exact


def features(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


def pair(groups, n, dx, dy, mean=0.0):
    """A teacher that resembles the student, as in training."""
    x, noise = features(groups, n, dx, mean=mean), features(groups, n, dy, seed=1, mean=mean)
    shared = min(dx, dy)
    y = noise.clone()
    y[..., :shared] = 0.5 * noise[..., :shared] + 0.7 * x[..., :shared]
    return x, y


MODES = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 33])
@pytest.mark.parametrize(("centered", "inter"), MODES)
def test_sizes(library, n, centered, inter):
    for d in (1, 2, 37) if n < 33 else (10,):
        check(library, *pair(1, n, d, d), centered, inter, save=d != 2, products_gradient=d == 37)


@pytest.mark.parametrize(("centered", "inter"), [(0, 0), (1, 1)])
def test_logits(library, centered, inter):
    check(library, *pair(1, 128, 100, 100), centered, inter, products_gradient=True)


@pytest.mark.parametrize(("centered", "save"), [(1, True), (0, False)])
def test_large_tile(library, centered, save):
    check(library, *pair(1, 129, 20, 20), centered, 1, save=save)


def test_groups_and_unequal_features(library):
    check(library, *pair(3, 37, 129, 20), save=False, products_gradient=True)


@pytest.mark.parametrize(("centered", "inter"), [(1, 0), (1, 1)])
def test_large_mean(library, centered, inter):
    x, y = pair(1, 40, 50, 50, mean=100.0)
    offsets = 50.0 * features(1, 1, 50, seed=3)
    check(library, x + offsets, y - offsets, centered, inter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(library, dtype):
    x, y = pair(2, 35, 41, 41, mean=3.0)
    for inter in (0, 1):
        check(library, (30 * x).to(dtype), y.to(dtype), 1, inter)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_range(library, scale):
    x, y = pair(1, 34, 20, 20)
    for inter in (0, 1):
        found, exact = (
            run(
                library, scale * x, y, 1, inter, True, torch.zeros(1 + inter, 3, 1), torch.ones(1 + inter, 1)
            ),
            truth(
                scale * x, y, 1, inter, torch.zeros(1 + inter, 3, 1), torch.ones(1 + inter, 1), torch.float64
            ),
        )
        for f, e in zip(found[1:], exact[1:], strict=True):
            assert error(f, e, e.abs().max()) < 1e-5


def strided(kind, n, d):
    if kind == "transposed":  # rows are contiguous
        return features(1, d, n).mT, features(1, d, n, seed=1).mT
    if kind == "sliced":
        return features(1, 2 * n, d + 3)[:, ::2, 1 : 1 + d], features(1, n, 2 * d, seed=1)[:, :, ::2]
    if kind == "mixed":
        return features(1, d, n).mT, features(1, n, d, seed=1)
    return features(1, n, d), features(1, 1, d, seed=1).expand(
        1, n, d
    )  # every row the same: a zero Gram if centred


@pytest.mark.parametrize("kind", ["transposed", "sliced", "mixed", "expanded"])
@pytest.mark.parametrize("inter", [0, 1])
def test_strides(library, kind, inter):
    x, y = strided(kind, 36, 44)
    if kind == "expanded":  # the gradient of an expanded view gets its own memory
        found = run(
            library,
            x,
            y,
            1,
            inter,
            True,
            torch.zeros(1 + inter, 3, 1),
            torch.ones(1 + inter, 1),
            (True, False),
        )
        assert found[1][0].item() == 1.0
        assert torch.isfinite(found[2]).all()
        return
    check(library, x, y, 1, inter, products_gradient=True)


@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_one_gradient(library, need):
    check(library, *pair(1, 20, 30, 30), 1, 1, need=need)


def test_upstream_of_zero_stride(library):
    x, y = pair(2, 9, 12, 12)
    ones = torch.ones(()).expand(2, 2)
    zeros = torch.zeros(()).expand(2, 3, 2)
    found = run(library, x, y, 1, 1, True, zeros, ones)
    exact = truth(x, y, 1, 1, zeros, ones, torch.float64)
    assert error(found[2], exact[2], exact[2].abs().max()) < 1e-5


@pytest.mark.parametrize("inter", [0, 1])
@pytest.mark.parametrize("degenerate", ["constant", "zero", "rows constant"])
def test_degenerate(library, degenerate, inter):
    x, y = pair(1, 6, 7, 7)
    if degenerate == "constant":
        y = torch.full_like(y, 0.1)
    elif degenerate == "zero":
        x, y = torch.zeros_like(x), torch.zeros_like(y)
    else:
        y = y[:, :, :1].expand(1, 6, 7).contiguous()
    check(library, x, y, 1, inter)
    check(library, x, y, 0, inter)


@pytest.mark.parametrize("inter", [0, 1])
def test_near_convergence(library, inter):
    x, noise = features(1, 40, 24), features(1, 40, 24, seed=1)
    upstream = torch.zeros(1 + inter, 3, 1), torch.ones(1 + inter, 1)
    products, distance, grad_x, grad_y = run(library, x, x.clone(), 1, inter, True, *upstream)
    assert (distance[0] == 0).all()
    assert distance.max() < 1e-6
    assert max(grad_x.abs().max(), grad_y.abs().max()) < 1e-7
    assert run(library, x, 3 * x, 1, 0, True, upstream[0][:1], upstream[1][:1])[1].item() < 1e-12
    y = x + 1e-3 * noise
    found = run(library, x, y, 1, 0, True, upstream[0][:1], upstream[1][:1])
    exact = truth(x, y, 1, 0, upstream[0][:1], upstream[1][:1], torch.float64)
    assert error(found[1], exact[1], exact[1].abs().max()) < 1e-3
    assert error(found[2], exact[2], exact[2].abs().max()) < 1e-3


def test_nan_is_seen(library):
    x, y = pair(1, 12, 9, 9)
    x[0, 3, 4] = float("nan")
    products, distance, grad_x, _ = run(library, x, y, 1, 1, True, torch.zeros(2, 3, 1), torch.ones(2, 1))
    assert distance.isnan().all()
    assert products[:, :2].isnan().all()
    assert grad_x.isnan().any()


def test_same_bits_every_time(library):
    x, y = pair(1, 33, 100, 100)
    upstream = torch.zeros(2, 3, 1), torch.ones(2, 1)
    first, second = (run(library, x, y, 1, 1, True, *upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
