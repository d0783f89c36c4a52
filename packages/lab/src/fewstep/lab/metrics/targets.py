"""Targets: a number, its limit, and whether it was reached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["at_most", "at_least", "within"]


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    kind "at_most" and "at_least" compare value with limit; "within" asks |value - 1| <= limit, for ratios that should
    be 1. An `aim` is reported like a target but does not count as missed.
    """

    name: str
    value: float
    limit: float
    kind: Kind = "at_most"
    aim: bool = False

    @property
    def reached(self) -> bool:
        """Whether the value keeps to the limit; never for NaN."""
        if math.isnan(self.value):
            return False
        if self.kind == "at_least":
            return self.value >= self.limit
        return (abs(self.value - 1) if self.kind == "within" else self.value) <= self.limit

    def to_json(self) -> dict[str, Any]:
        """As it stands in `results.json`."""
        return {
            "name": self.name, "value": self.value, "kind": self.kind, "limit": self.limit,
            "aim": self.aim, "pass": self.reached,
        }  # fmt: skip
