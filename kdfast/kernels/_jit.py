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
from functools import partial
from inspect import Parameter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

MOST_KEYS = 4096  # of a kernel; beyond, they start anew
UNKNOWN: list = []  # cannot be part of a key: the launch is Triton's
VALUES = (int, bool, str, tl.dtype, type(None))
MIN_INT, MAX_INT = -(2**31), 2**31 - 1


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
        self._launch = _binder(kernel, self._launched)
        self._driver: Any = None
        self._found: dict[tuple, tuple[CompiledKernel, Callable, int, tuple, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return partial(self._launch, grid)

    def _launched(self, grid: tuple[int, ...], key: tuple, args: tuple, options: dict[str, Any]) -> None:
        active = driver.active
        if active is not self._driver:
            self._driver, self._found = active, {}
        device = active.get_current_device()
        key = (device, key, *options.items(), *map(type, options.values()))
        try:
            found = self._found.get(key)
        except TypeError:  # _UNKNOWN
            found = key = None
        if found is None or type(grid) is not tuple or not self._usual() or not _holds(found[4]):
            self._run(grid, key, args, options)
            return
        _, run, function, metadata, _ = found
        size = len(grid)
        run(
            grid[0], grid[1] if size > 1 else 1, grid[2] if size > 2 else 1, active.get_current_stream(device),
            function, metadata, None, None, None, *args,
        )  # fmt: skip

    def _run(self, grid: tuple[int, ...], key: tuple | None, args: tuple, options: dict[str, Any]) -> None:
        self.by_triton += 1
        compiled = self.triton.run(*args, grid=grid, warmup=False, **options)
        if key is None or not isinstance(compiled, CompiledKernel) or not self._usual():
            return
        if len(self._found) >= MOST_KEYS:
            self._found.clear()
        names = self.triton.used_global_vals.items()
        used = tuple((scope, name, value) for (name, _), (value, scope) in names)
        # Triton unloads a compiled kernel that nobody holds.
        self._found[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, used

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
    """Whether globals are what they were; Triton refuses to launch otherwise."""
    return all(scope.get(name) is value for scope, name, value in used)


def _binder(kernel: JITFunction, launched: Callable) -> Callable:
    """``launch(grid, *args, **options)`` with the kernel's parameters, which calls ``launched(grid, key, args, options)``."""
    parameters, keys = [], []
    scope = {"_launched": launched, "_Tensor": Tensor, "_float": float, "_constant": _constant, "_other": _other}
    for p in kernel.params:
        name, default = p.name, kernel.signature.parameters[p.name].default
        if p.is_constexpr:
            keys.append(f"{name} if type({name}) is int else _constant({name})")
        else:
            # Where it is not specialised on, only the type that holds an integer counts.
            integer = f"({MIN_INT} <= {name} <= {MAX_INT} or {name},)" if p.do_not_specialize else name
            keys.append(
                f"({name}.dtype, {name}.data_ptr() % 16 == 0) if type({name}) is _Tensor else {integer}"
                f" if type({name}) is int else _float if type({name}) is _float else _other({name})"
            )
        if default is not Parameter.empty:
            scope[f"_default_{name}"] = default
        parameters.append(name if default is Parameter.empty else f"{name}=_default_{name}")
    names = ", ".join(p.name for p in kernel.params)
    source = (
        f"def launch(_grid, {', '.join(parameters)}, **_options):\n"
        f"    _launched(_grid, ({', '.join(keys)},), ({names},), _options)\n"
    )
    exec(source, scope)
    return scope["launch"]


_plain: set[tuple[type, ...]] = set()  # types of the fields of tuples that may stand in a key as they are


def _is_plain(kinds: tuple[type, ...]) -> bool:
    if kinds in _plain:
        return True
    if all(k in VALUES for k in kinds):
        _plain.add(kinds)
        return True
    return False


def _constant(v: Any) -> Any:
    """Of a value that is compiled in: all of it. Types too, since True equals 1."""
    kind = type(v)
    if kind in VALUES:
        return kind, v
    if isinstance(v, tuple):
        kinds = tuple(map(type, v))
        return (kind, kinds, v) if _is_plain(kinds) else (kind, *map(_constant, v))
    return (kind, v.hex()) if kind is float else UNKNOWN  # -0.0 equals 0.0


def _other(v: Any) -> Any:
    """Of an argument that is neither a tensor nor an integer nor a float by itself."""
    kind = type(v)
    if not isinstance(v, tuple):
        return kind if v is None or kind is bool else UNKNOWN
    kinds = tuple(map(type, v))
    if kinds.count(float) == len(kinds):
        return kind, kinds
    if _is_plain(kinds):
        return kind, kinds, v
    if kinds[0] is Tensor and _is_plain(kinds[1:]):  # View
        return kind, kinds, v[0].dtype, v[0].data_ptr() % 16 == 0, v[1:]
    return kind, *map(_field, v)


def _field(v: Any) -> Any:
    if type(v) is Tensor:
        return v.dtype, v.data_ptr() % 16 == 0
    return (int, v) if type(v) is int else float if type(v) is float else _other(v)
