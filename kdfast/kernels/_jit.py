"""``jit`` for kernels that the host launches: ``triton.jit``, whose launches after the first of a kind skip most of Triton.

Triton binds arguments, asks what to specialise on, prints options and looks up the result as text on every launch. Here
a launch has a key: of tensors the dtype and whether 16 bytes divide the address, of other arguments the type and the
value, except of floats and of integers that are not specialised on, which Triton does not look at either. The first
launch of a key is Triton's own and says which compiled kernel that is; further ones hand it the same arguments.

Triton's own way is taken for whatever else there is: tensor subclasses, objects of other types, launch hooks, debug and
instrumentation settings, globals of a kernel that changed, other GPUs than NVIDIA's, the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import Parameter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver
from triton.runtime.jit import KernelParam

MOST_KEYS = 4096  # of arguments of the same types; beyond, they start anew
MIN_INT, MAX_INT = -(2**31), 2**31 - 1
COMPARED = frozenset(
    (int, bool, str, tl.dtype, type(None))
)  # types of which equal values are the same to Triton


def jit(function: Callable | None = None, **options: Any) -> Any:
    """As ``triton.jit``; the result cannot be called by other kernels."""
    if function is None:
        return partial(jit, **options)
    kernel = triton.jit(**options)(function)
    known = type(kernel) is JITFunction and torch.version.hip is None
    return Kernel(kernel) if known else kernel


class Kernel:
    """``kernel[grid](*args, **options)`` as Triton's.

    Attributes:
        triton: the kernel as ``triton.jit`` made it.
        by_triton: how many launches went Triton's own way.
    """

    def __init__(self, kernel: JITFunction) -> None:
        self.triton, self.by_triton = kernel, 0
        self.__name__, self.__doc__ = kernel.__name__, kernel.__doc__
        self._bound = _binder(kernel, self._launch)
        self._driver: Any = None
        # By the types of the arguments: the rest of the key, and what is compiled for each.
        self._known: dict[tuple[type, ...], tuple[Callable, dict[tuple, tuple]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return partial(self._bound, grid)

    def _launch(self, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
        active = driver.active
        if active is not self._driver:
            self._driver, self._known = active, {}
        device = active.get_current_device()
        kinds = tuple(map(type, args))
        known = self._known.get(kinds)
        if known is None:
            known = self._known[kinds] = _key_of(self.triton.params, kinds), {}
        key_of, compiled = known
        try:
            key = key_of(device, args, options)
            found = compiled.get(key)
        except _Unknown:
            key = found = None
        if found is None or type(grid) is not tuple or not self._usual() or not _holds(found[4]):
            self._by_triton(grid, args, options, key, compiled)
            return
        _, run, function, metadata, _ = found
        size = len(grid)
        run(
            grid[0], grid[1] if size > 1 else 1, grid[2] if size > 2 else 1, active.get_current_stream(device),
            function, metadata, None, None, None, *args,
        )  # fmt: skip

    def _by_triton(
        self,
        grid: tuple[int, ...],
        args: tuple,
        options: dict[str, Any],
        key: tuple | None,
        to: dict[tuple, tuple],
    ) -> None:
        self.by_triton += 1
        compiled = self.triton.run(*args, grid=grid, warmup=False, **options)
        if key is None or not isinstance(compiled, CompiledKernel) or not self._usual():
            return
        if len(to) >= MOST_KEYS:
            to.clear()
        names = self.triton.used_global_vals.items()
        used = tuple((scope, name, scope.get(name)) for (name, _), (_, scope) in names)
        # With the compiled kernel itself: Triton unloads one that nobody holds.
        to[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, used

    def _usual(self) -> bool:
        """Nobody watches launches, nothing changes what is compiled."""
        runtime = knobs.runtime
        return not (
            runtime.debug
            or knobs.compilation.instrumentation_mode
            or runtime.add_stages_inspection_hook
            or _watched(runtime.launch_enter_hook)
            or _watched(runtime.launch_exit_hook)
            or self.triton.pre_run_hooks
        )


def _watched(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def _holds(used: tuple) -> bool:
    """Whether globals that are compiled in are still the same objects; Triton refuses to launch if their values changed."""
    for scope, name, value in used:  # noqa: SIM110 (a generator takes microseconds)
        if scope.get(name) is not value:
            return False
    return True


def _binder(kernel: JITFunction, launch: Callable) -> Callable:
    """``bound(grid, *args, **options)`` with the parameters of the kernel, which calls ``launch(grid, args, options)``."""
    scope = {"launch": launch}
    parameters = []
    for name, p in kernel.signature.parameters.items():
        if p.default is Parameter.empty:
            parameters.append(name)
        else:
            scope[f"default_{name}"] = p.default
            parameters.append(f"{name}=default_{name}")
    names = ", ".join(kernel.signature.parameters)
    exec(f"def bound(_grid, {', '.join(parameters)}, **_options): launch(_grid, ({names},), _options)", scope)
    return scope["bound"]


class _Unknown(Exception):
    """An argument is nothing that a key is made of."""


def _key_of(params: list[KernelParam], kinds: tuple[type, ...]) -> Callable:
    """``key(device, args, options)`` of arguments of these types."""
    parts = ["device"]
    for i, (p, kind) in enumerate(zip(params, kinds, strict=True)):
        v = f"a{i}"
        if issubclass(kind, tuple):
            parts.append(f"constants({v})" if p.is_constexpr else f"fields({v})")
        elif p.is_constexpr:
            parts.append(v if kind in COMPARED else f"constant({v})")
        elif kind is Tensor:
            parts += [f"{v}.dtype", f"{v}.data_ptr() % 16 == 0"]
        elif kind is int:  # where it is not specialised on, what matters is the type that holds it
            parts.append(f"{MIN_INT} <= {v} <= {MAX_INT} or {v}" if p.do_not_specialize else v)
        elif kind not in (float, bool, type(None)):
            parts.append(f"constant({v})")
    scope = {"constant": _constant, "constants": _constants, "fields": _fields}
    exec(
        f"def key(device, args, options):\n"
        f"    {''.join(f'a{i}, ' for i in range(len(kinds)))}= args\n"
        f"    return {', '.join(parts)}, *options.items(), *map(type, options.values())",
        scope,
    )
    return scope["key"]


@cache
def _comparable(kinds: tuple[type, ...]) -> bool:
    return COMPARED.issuperset(kinds)


def _constant(v: Any) -> Any:
    if type(v) in COMPARED:
        return v
    if type(v) is float:
        return v.hex()  # -0.0 equals 0.0
    if isinstance(v, tuple):
        return _constants(v)
    raise _Unknown


def _constants(v: tuple) -> tuple:
    kinds = tuple(map(type, v))  # True equals 1
    return (kinds, v) if _comparable(kinds) else (kinds, *map(_constant, v))


def _field(v: Any) -> Any:
    kind = type(v)
    if kind is Tensor:
        return v.dtype, v.data_ptr() % 16 == 0
    if kind is float:
        return None
    return _fields(v) if isinstance(v, tuple) else _constant(v)


def _fields(v: tuple) -> tuple:
    """Of arguments that stand in a tuple, which all are specialised on."""
    kinds = tuple(map(type, v))
    if _comparable(kinds):
        return kinds, v
    if kinds[0] is Tensor and _comparable(kinds[1:]):  # View
        return kinds, v[0].dtype, v[0].data_ptr() % 16 == 0, v[1:]
    return kinds, *map(_field, v)
