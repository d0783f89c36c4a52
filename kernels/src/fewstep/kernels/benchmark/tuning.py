"""The tuning table from what was measured: for every kind of call the backend that was fastest, all costs counted.

    python -m fewstep.kernels.benchmark.tuning kernels/results/nvidia_h200.json           # prints what is new
    python -m fewstep.kernels.benchmark.tuning kernels/results/nvidia_h200.json --write   # puts it into tuning.json

A call that is not differentiated is filed by its forward pass, one that is by forward and backward together. Where
several shapes share a place, since sizes are rounded there, the least geometric mean wins. A backend that gave a wrong
result anywhere in a place, or was not checked and timed on all of its shapes, has no part in it. Where the reference is
PyTorch's own operator (attention), that one has a part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fewstep.kernels.benchmark.case import BACKWARD, FORWARD
from fewstep.kernels.benchmark.operations import OURS
from fewstep.kernels.benchmark.results import Row, read
from fewstep.kernels.benchmark.summary import dispatched, geometric_mean, wrong

TABLE = Path(__file__).parents[1] / "tuning.json"
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]
Case = tuple[str, str, str, str]  # op, shape, dtype, layout


def table(rows: Iterable[Row]) -> Table:
    """{operation: {arch: {place: {"backend": fastest, setting: true, ...}}}} of the rows of a results file."""
    rows = list(rows)
    times: dict[Case, dict[str, dict[str, float]]] = {}
    spoiled: dict[Case, set[str]] = {}
    for row in rows:
        backend = dispatched(row["op"], row["backend"])
        if wrong(row) is not None:
            spoiled.setdefault(_case(row), set()).add(backend)
        is_known = "rel_err" in row or backend == "reference"
        if "us" in row and is_known and backend.split("+")[0] in OURS:
            times.setdefault(_case(row), {}).setdefault(backend, {})[row["pass"]] = float(row["us"])
    shared: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for row in rows:
        for name, total in _totals(row, times.get(_case(row), {}), spoiled.get(_case(row), set())):
            shared.setdefault((row["operation"], row["arch"], name), []).append(total)
    found: Table = {}
    for (operation, arch, name), totals in shared.items():
        everywhere = set.intersection(*map(set, totals))
        if everywhere:
            means = {backend: geometric_mean(total[backend] for total in totals) for backend in everywhere}
            backend, *settings = min(means, key=lambda b: (means[b], b)).split("+")
            entry = {"backend": backend} | dict.fromkeys(settings, True)
            found.setdefault(operation, {}).setdefault(arch, {})[name] = entry
    return found


def _case(row: Mapping[str, Any]) -> Case:
    return row["op"], row["shape"], row["dtype"], row["layout"]


def _totals(
    row: Row, times: Mapping[str, Mapping[str, float]], spoiled: set[str]
) -> Iterable[tuple[str, dict[str, float]]]:
    """(place, backend -> microseconds) for each place that this row says its case is filed under."""
    if not row.get("arch"):
        return
    names = row["filed"]
    differentiated = {FORWARD, BACKWARD}
    for name in dict.fromkeys(names.values()):
        # Filed alike with and without gradients: the training step, which costs more, decides.
        passes = differentiated if names.get(BACKWARD) == name else {FORWARD}
        sums = {b: sum(us[p] for p in passes) for b, us in times.items() if passes <= set(us) and b not in spoiled}
        if sums:
            yield name, sums


def merged(old: Table, new: Table) -> Table:
    """`old` with the places of `new` put in, sorted: of other GPUs, and of shapes not measured now, entries stay."""
    result = json.loads(json.dumps(old))
    for operation, by_arch in new.items():
        for arch, places in by_arch.items():
            result.setdefault(operation, {}).setdefault(arch, {}).update(places)
    return {
        operation: {arch: dict(sorted(places.items())) for arch, places in sorted(by_arch.items())}
        for operation, by_arch in sorted(result.items())
    }


def main(arguments: list[str] | None = None) -> int:
    """Print or write; exit status 1 if the file holds no rows of a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results file of make gpu-check or fewstep profile kernels")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: the package's tuning.json")
    parser.add_argument("--write", action="store_true", help="write the table instead of printing what is new")
    options = parser.parse_args(arguments)
    new = table(read(options.results)["rows"])
    if not new:
        print(f"{options.results}: no rows that a GPU was timed for", file=sys.stderr)
        return 1
    old: Table = json.loads(options.table.read_text(encoding="utf-8"))
    for operation, by_arch in new.items():
        for arch, places in by_arch.items():
            for name, entry in places.items():
                if old.get(operation, {}).get(arch, {}).get(name) != entry:
                    print(f"{operation}  {arch}  {name}  {json.dumps(entry)}")
    if options.write:
        options.table.write_text(json.dumps(merged(old, new), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
