"""Which implementation of each operation is used: a registry of backends and the choice between them."""

from collections.abc import Callable
from typing import Any, TypeVar

BACKENDS = ("cuda", "triton", "reference")                        # as "auto" prefers them
_F = TypeVar("_F", bound=Callable[..., Any])
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_selected = "auto"


def register(operation: str, backend: str) -> Callable[[_F], _F]:
    """Decorate the implementation of an operation by a backend; a backend is available once it implements one."""

    def keep(function: _F) -> _F:
        _implementations.setdefault(operation, {})[backend] = function
        return function

    return keep


def implementation(operation: str) -> Callable[..., Any]:
    """Return what runs the operation under the present choice: the chosen backend's, or with "auto" the first there is.

    An operation that the chosen backend lacks runs on the reference.
    """
    found = _implementations[operation]
    wanted = BACKENDS if _selected == "auto" else (_selected, "reference")
    return next(found[name] for name in wanted if name in found)


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that can run here, the preferred one first; "reference" is always among them."""
    return tuple(name for name in BACKENDS if any(name in found for found in _implementations.values()))


class use_backend:
    """Choose the backend of every operation, in the whole process: from now on, or within a `with` block.

    Args:
        name: "auto" (the fastest there is), "reference" (plain PyTorch), "triton" or "cuda".

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that is not available here, naming those that are.
    """

    def __init__(self, name: str) -> None:
        global _selected
        if name not in ("auto", *BACKENDS):
            raise ValueError(f"backend {name!r} is unknown; known: auto, {', '.join(BACKENDS)}")
        if name not in ("auto", *available_backends()):
            raise RuntimeError(f"backend {name!r} is not available here; available: {', '.join(available_backends())}")
        self.name, self._previous = name, _selected
        _selected = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exception: object) -> None:
        global _selected
        _selected = self._previous
