"""What is to be done, in pieces that can be skipped, repeated in another process, or left out when time is up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# Kinds: ceilings alone on the device; checks of ours, and of PyTorch's, in parallel; times alone.
FIRST, CHECK, RIVAL, TIME = "first", "check", "rival", "time"

KINDS = (FIRST, CHECK, RIVAL, TIME)


@dataclass(frozen=True)
class Task:
    """Something to measure: `run` yields rows as they are found. `name` is unique and the same in every process."""

    name: str
    kind: str
    run: Callable[[], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Settings:
    """What all processes of one run must agree on.

    Attributes:
        device: of torch, "cpu" or "cuda".
        size: one of `case.SIZES`.
        ops, shapes, dtypes, backends: what is wanted: an op, dtype or backend by its name, a shape by a part of it;
            empty for all.
        without: backends to leave out, with all of their variants.
    """

    device: str
    size: str
    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def wants(self, op: str, shape: str, dtype: str, backend: str) -> bool:
        """Whether that is among what is wanted."""
        named = ((self.ops, op), (self.dtypes, dtype), (self.backends, backend))
        fits = all(not some or value in some for some, value in named) and backend.split("+")[0] not in self.without
        return fits and (not self.shapes or any(part in shape for part in self.shapes))
