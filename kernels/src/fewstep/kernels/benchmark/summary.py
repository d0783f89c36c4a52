"""What a results file says: ours beside the best of PyTorch's, shape by shape and as geometric means; what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewstep.kernels.benchmark.case import FORWARD
from fewstep.kernels.benchmark.operations import AUTO, EAGER, OURS, PYTORCHS
from fewstep.kernels.benchmark.results import Row

Place = tuple[str, str, str, str, str]  # op, pass, shape, dtype, layout


@dataclass(frozen=True)
class Line:
    """Who took how long on one case and pass.

    Attributes:
        place: op, pass, shape, dtype, layout.
        rows: timed ones by backend.
        picked: the backend that "auto" takes there; None if that is not known.
    """

    place: Place
    rows: Mapping[str, Row] = field(default_factory=dict)
    picked: str | None = None

    @property
    def ours(self) -> Row | None:
        """What "auto" picks; the faster of our fused backends, or our reference, where that is not known."""
        picked = [row for name, row in self.rows.items() if dispatched(self.place[0], name) == self.picked]
        return picked[0] if picked else self.own

    @property
    def own(self) -> Row | None:
        """The faster of our fused backends, our reference where there is none."""
        fused = [row for name, row in self.rows.items() if name in OURS[:2]]
        return fastest(fused or [row for name, row in self.rows.items() if is_ours(name)])

    @property
    def best_rival(self) -> Row | None:
        """The fastest of PyTorch's."""
        return fastest([row for name, row in self.rows.items() if not is_ours(name)])

    def speed_up(self, over: str | None = None) -> float | None:
        """How many times as fast ours is as a rival, the best one by default; None where either was not measured."""
        rival = self.best_rival if over is None else self.rows.get(over)
        return None if rival is None or self.ours is None else float(rival["us"] / self.ours["us"])

    def own_speed_up(self) -> float | None:
        """The same of our own kernels, whatever "auto" picks."""
        return None if self.best_rival is None or self.own is None else float(self.best_rival["us"] / self.own["us"])


def dispatched(op: str, backend: str) -> str:
    """As what dispatch knows it: where our reference is PyTorch's operator, PyTorch's row is that of the reference."""
    return "reference" if backend == EAGER and op in PYTORCHS else backend


def is_ours(backend: str) -> bool:
    """Whether rows of that backend time our operations."""
    return backend.split("+")[0] in (*OURS, AUTO)


def fastest(rows: Sequence[Row]) -> Row | None:
    """The row of least time."""
    return min(rows, key=lambda row: float(row["us"]), default=None)


def place_of(row: Mapping[str, Any]) -> Place:
    """The case and pass that a row is about."""
    return row["op"], row["pass"], row["shape"], row["dtype"], row["layout"]


def lines(rows: Iterable[Row]) -> list[Line]:
    """Timed rows by case and pass, in the order in which the cases first appear."""
    rows = list(rows)
    picked = {place_of(row): row["picked"] for row in rows if "picked" in row}
    found: dict[Place, dict[str, Row]] = {}
    for row in rows:
        if "us" in row:
            found.setdefault(place_of(row), {})[row["backend"]] = row
    return [
        Line(place, by, picked.get(place, picked.get((place[0], FORWARD, *place[2:])))) for place, by in found.items()
    ]


def geometric_mean(values: Iterable[float]) -> float | None:
    """exp of the mean logarithm; None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def wrong(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a result of ours, in words; None if nothing is, or if it is PyTorch's."""
    if "rel_err" not in row or not is_ours(row["backend"]):
        return None
    if not row["rel_err"] <= row["limit"]:                       # NaN is wrong too
        return f"relative error {row['rel_err']:.1e}, at most {row['limit']:.0e} is right"
    return None if row.get("same_bits", True) else "two runs on the same inputs differ"
