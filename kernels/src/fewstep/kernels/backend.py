"""Which implementation of each operation runs: a registry of backends and the choice between them.

For the writer of an operation: `declare` it, `register` its implementations, and let the public function end in
`dispatch(name, *args)`. Dispatch is Python on static facts (devices, dtypes, shapes), so torch.compile traces through
it, and it never measures anything: what was measured stands in `tuning.json`.
"""

import functools
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fewstep.kernels.forward_mode import forward_mode_is_on, functional_transform_is_on

BACKENDS = ("triton", "cuda", "reference")        # as "auto" prefers them where nothing was measured
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"     # Triton itself asks when it is imported

Supports = Callable[..., str | None]
Order = tuple[str, ...] | Callable[..., tuple[str, ...]]
_F = TypeVar("_F", bound=Callable[..., Any])
_log = logging.getLogger(__name__)
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_supports: dict[tuple[str, str], Supports] = {}
_orders: dict[str, Order] = {}
_sizes: dict[str, Callable[..., tuple[int | str, ...]]] = {}
_selected = "auto"
_architectures: dict[int, str] = {}
_said: set[tuple[str, ...]] = set()
_table: dict[str, dict[str, dict[str, dict[str, Any]]]] = json.loads(
    Path(__file__).with_name("tuning.json").read_text(encoding="utf-8")
)


class Choice(NamedTuple):
    """What runs a call, "reference", "triton" or "cuda", and why: one phrase, for logs and for the profiler."""

    backend: str
    why: str


def declare(operation: str, order: Order, sizes: Callable[..., tuple[int | str, ...]]) -> None:
    """Say how "auto" treats an operation on CUDA tensors; without this it tries `BACKENDS` in turn.

    Args:
        operation: its name.
        order: backends, the preferred one first, where the tuning table is silent; or a function of the operation's
            arguments that returns them.
        sizes: gets the arguments of the operation, returns the sizes under which the table files the call; each is
            rounded up to a power of two there, so that one measurement serves a range. Words stay as they are.
    """
    _orders[operation], _sizes[operation] = order, sizes


def register(operation: str, backend: str, supports: Supports | None = None) -> Callable[[_F], _F]:
    """Decorate the implementation of an operation by a backend.

    Args:
        operation, backend: names; backend is one of `BACKENDS`. Every operation needs a "reference".
        supports: gets the positional arguments of the implementation and returns why this backend cannot run that
            call, or None where it can. The reason is one phrase without the call's sizes ("head dimension 48"), since
            a fallback is warned about once per reason. Static facts only: it runs while torch.compile traces.
            Not asked about device or installation: `dispatch` does that.
    """

    def keep(function: _F) -> _F:
        _implementations.setdefault(operation, {})[backend] = function
        if supports is not None:
            _supports[operation, backend] = supports
        return function

    return keep


def dispatch(operation: str, *args: Any) -> Any:
    """Run the operation by the backend that `implementation` picks."""
    return implementation(operation, *args)(*args)


def implementation(operation: str, *args: Any) -> Callable[..., Any]:
    """Return the function that runs the operation on these arguments under the present choice.

    Under forward-mode differentiation and transforms of `torch.func` it is the reference always. A backend chosen by
    name runs, or the call is refused; operations that it has no implementation of at all run on the reference. "auto":
    CPU tensors on the reference; CUDA tensors by the tuning table, else by the operation's order, the first backend
    that can, with one warning per reason.

    Raises:
        ValueError: the backend chosen by name cannot run this call; says why and what can.
    """
    return _implementations[operation][explain(operation, *args).backend]


def explain(operation: str, *args: Any) -> Choice:
    """Return what `dispatch` would pick for these arguments; raises, warns and logs as it does."""
    if forward_mode_is_on():
        return Choice("reference", "forward-mode differentiation")
    if functional_transform_is_on():
        return Choice("reference", "a transform of torch.func")
    if _selected == "reference":
        return Choice("reference", "chosen by name")
    if _selected != "auto":
        return _named(operation, _selected, args)
    if not _on_gpu(args):
        return Choice("reference", "not on a GPU")
    choice = _automatic(operation, args)
    _once("chosen", operation, choice.backend, choice.why)
    return choice


def _named(operation: str, backend: str, args: tuple[Any, ...]) -> Choice:
    if backend not in _implementations[operation]:
        return Choice("reference", f"{backend} has no {operation}")
    reason = _refusal(operation, backend, args)
    if reason is None:
        return Choice(backend, "chosen by name")
    able = [f'"{name}"' for name in BACKENDS if name != backend and _refusal(operation, name, args) is None]
    raise ValueError(f"{operation}: {backend} cannot run {_described(args)}: {reason}; use {' or '.join(able)}")


def _automatic(operation: str, args: tuple[Any, ...]) -> Choice:
    entry = tuned(operation, *args)
    if entry and _can(operation, entry["backend"], args):
        return Choice(entry["backend"], "tuning table")
    order = _orders.get(operation, BACKENDS)
    for backend in order(*args) if callable(order) else order:
        if _can(operation, backend, args):
            return Choice(backend, "preferred")
    return Choice("reference", "nothing else can")


def _can(operation: str, backend: str, args: tuple[Any, ...]) -> bool:
    """Return whether the backend can run this call; if it has the operation and cannot, warn of it once."""
    reason = _refusal(operation, backend, args)
    if reason is not None and backend in _implementations[operation]:
        _once("fallback", operation, backend, reason)
    return reason is None


def _refusal(operation: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """Return why the backend cannot run this call, or None."""
    if backend not in _implementations[operation]:
        return f"{backend} has no {operation}"
    if backend == "reference":
        return None
    absent = _absence(backend, _on_gpu(args), operation)
    supports = _supports.get((operation, backend))
    return absent if absent is not None or supports is None else supports(*args)


def _absence(backend: str, on_gpu: bool, operation: str | None = None) -> str | None:
    """Return why the backend cannot run here at all on tensors of a GPU, or of the CPU."""
    if backend == "triton" and not HAS_TRITON:
        return "Triton is not installed"
    if not on_gpu and not (backend == "triton" and INTERPRETED):
        return "needs CUDA tensors"
    return _cuda_absence(operation) if backend == "cuda" else None


def _on_gpu(args: tuple[Any, ...]) -> bool:
    """Return whether the first tensor is; operations check that the others are where it is."""
    return _first_tensor(args).device.type == "cuda"


def on_device_of(*args: Any) -> AbstractContextManager[None]:
    """Make the device of the first tensor the present one: kernels are compiled for it and launched on it."""
    tensor = _first_tensor(args)
    within: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]  # has no types
    return within


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    for value in args:                              # a generator with next() would take as long as all of the rest
        if isinstance(value, Tensor):
            return value
    raise TypeError("an operation needs a tensor")


def _described(args: tuple[Any, ...]) -> str:
    tensors = [value for value in args if isinstance(value, Tensor)]
    return ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {x.device.type}" for x in tensors)


def _rounded(size: int) -> int:
    """Return the power of two at or above a size; when compiled by comparisons only: symbolic sizes stay symbolic."""
    if not torch.compiler.is_compiling():
        return 1 << max(size - 1, 0).bit_length()
    power = 1
    while power < size:
        power *= 2
    return power


def tuned(operation: str, *args: Any) -> Mapping[str, Any]:
    """Return the tuning table's entry for a call, its "backend" and measured settings, empty where it has none.

    What must not run before it was measured (the cluster tier) runs only where the entry names it. The table is
    {operation: {arch: {dtype, layout and rounded sizes: entry}}}, as in "sm_90", "bfloat16 contiguous 8x256x64".
    """
    if operation not in _table or operation not in _sizes or not _on_gpu(args):
        return {}
    entries = _table[operation].get(arch(_first_tensor(args).device.index or 0), {})
    return entries.get(filed(operation, *args), {})


def filed(operation: str, *args: Any) -> str:
    """Return what the tuning table files a call of a declared operation under."""
    first = _first_tensor(args)
    name = _name if torch.compiler.is_compiling() else _name_before
    return name(first.dtype, layout(first), _sizes[operation](*args))


def _name(dtype: torch.dtype, kind: str, sizes: tuple[int | str, ...]) -> str:
    rounded = "x".join(size if isinstance(size, str) else str(_rounded(size)) for size in sizes)
    return f"{str(dtype).removeprefix('torch.')} {kind} {rounded}"


_name_before = functools.lru_cache(maxsize=4096)(_name)            # writing a name takes as long as all of the rest


def layout(x: Tensor) -> str:
    """Return "contiguous", "channels_last" or "strided"."""
    if x.is_contiguous():
        return "contiguous"
    return "channels_last" if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else "strided"


def _constant(function: _F) -> _F:
    """Have torch.compile call a function while it traces and keep the answer.

    This is `torch.compiler.assume_constant_result` without its import of the whole compiler.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@_constant
def arch(index: int) -> str:
    """Return the architecture of a CUDA device, "sm_90"."""
    if index not in _architectures:
        major, minor = torch.cuda.get_device_capability(index)
        _architectures[index] = f"sm_{major}{minor}"
    return _architectures[index]


@_constant
def _cuda_absence(operation: str | None) -> str | None:
    from fewstep.kernels import build  # here, since `python -m fewstep.kernels.build` imports this package first

    return build.absence(operation)


@_constant
def _once(kind: str, operation: str, backend: str, reason: str) -> None:
    """Log a choice, or warn of a fallback, the first time; when compiled, at the time of tracing."""
    key = (kind, operation, backend, reason)
    if key in _said:
        return
    _said.add(key)
    if kind == "chosen":
        _log.info("%s runs on %s: %s", operation, backend, reason)
    else:
        warnings.warn(f"{operation} does not run on {backend} here: {reason}; using another backend", stacklevel=5)


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that can run here, the preferred one first; "reference" is always among them."""
    on_gpu = torch.cuda.is_available()
    implemented = {name for found in _implementations.values() for name in found}
    return tuple(b for b in BACKENDS if b in implemented and (b == "reference" or _absence(b, on_gpu) is None))


class use_backend:
    """Choose the backend of every operation, in the whole process: from now on, or within a `with` block.

    Args:
        name: "auto" (on a GPU the fastest known, else the reference), "reference" (plain PyTorch), "triton" or "cuda".

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that is not available here, naming those that are and what it lacks.
    """

    def __init__(self, name: str) -> None:
        global _selected
        if name not in ("auto", *BACKENDS):
            raise ValueError(f"backend {name!r} is unknown; known: auto, {', '.join(BACKENDS)}")
        if name not in ("auto", *available_backends()):
            why = _absence(name, torch.cuda.is_available()) or "no operation has it"
            able = ", ".join(available_backends())
            raise RuntimeError(f"backend {name!r} is not available here; available: {able} ({name}: {why})")
        self.name, self._previous = name, _selected
        _selected = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exception: object) -> None:
        global _selected
        _selected = self._previous
