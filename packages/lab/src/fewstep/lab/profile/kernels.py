"""`fewstep profile kernels`: measure the operations here, or show what a results file holds."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.kernels.benchmark.task import Settings
from fewstep.lab.config import ConfigError

FILTERS = ("op", "shape", "dtype", "backend")
LONGEST = 120.0  # seconds for one task


def command(args: argparse.Namespace, console: Console) -> int:
    """Measure or read, then show. Exit status 1 if a result of ours is wrong.

    Raises:
        ConfigError: an unknown operation, dtype, backend, shape or device.
        ValueError, FileNotFoundError: --from is no results file.
    """
    from fewstep.kernels.benchmark.results import read
    from fewstep.lab.profile import tables

    out = Path(args.out)
    source = Path(args.source) if args.source else measure(args, out, Console(stderr=True) if args.json else console)
    found = read(source)
    if args.source:
        timed = [row for row in found["rows"] if row["op"] not in tables.CEILINGS]
        check_filters(args, [tuple(row[name] for name in FILTERS) for row in timed])
    wanted = settings(args, "cpu", "tiny").wants
    rows = [r for r in found["rows"] if r["op"] in tables.CEILINGS or wanted(*(r[name] for name in FILTERS))]
    written = write(rows, found["notes"], out)
    if args.json:
        print(json.dumps({"rows": rows, "notes": found["notes"]}, indent=1))
    else:
        show(rows, found["notes"], console)
        console.print("  ".join(map(str, [source, *written])), soft_wrap=True)
    return int(bool(tables.incorrect(rows)))


def settings(args: argparse.Namespace, device: str, size: str) -> Settings:
    """What is wanted, as the benchmarks take it."""
    return Settings(device, size, *(tuple(getattr(args, name)) for name in ("op", "shape", "dtype", "backend")))


def check_filters(args: argparse.Namespace, there: Sequence[tuple[str, ...]]) -> None:
    """Raise unless every filter leaves something of (op, shape, dtype, backend) rows that those before it left.

    Raises:
        ConfigError: names what there is.
    """
    for i, name in enumerate(FILTERS):
        known = list(dict.fromkeys(row[i].split()[0] if name == "shape" else row[i] for row in there))
        for value in getattr(args, name):
            if not any(_fits(name, value, row[i]) for row in there):
                before = " ".join(f"--{n} {' '.join(getattr(args, n))}" for n in FILTERS[:i] if getattr(args, n))
                raise ConfigError(f"--{name} {value}: must be one of {', '.join(known)}{before and f' with {before}'}")
        wanted = getattr(args, name)
        there = [row for row in there if not wanted or any(_fits(name, value, row[i]) for value in wanted)]


def _fits(name: str, value: str, text: str) -> bool:
    return value in text if name == "shape" else value == text


def measure(args: argparse.Namespace, out: Path, console: Console) -> Path:
    """Run the benchmarks on this machine under a clock; returns the results file."""
    import torch

    from fewstep.kernels.benchmark import operations, results
    from fewstep.kernels.benchmark.runner import Run, Stage
    from fewstep.kernels.benchmark.task import KINDS
    from fewstep.lab.distributed import pick_device

    if args.minutes <= 0:
        raise ConfigError(f"--minutes {args.minutes:g}: must be more than 0")
    device = pick_device(args.device)
    wanted = settings(args, device.type, "tiny" if args.tiny else "gpu" if device.type == "cuda" else "cpu")
    check_filters(args, [(c.op, c.shape, c.dtype, name) for c, name in operations.pairs(wanted.size, device)])
    made = results.circumstances(torch.device(device.type))
    path = out / f"{results.file_name(made['device'])}.json"
    path.unlink(missing_ok=True)
    console.print(f"{made['device']}, torch {made['versions']['torch']}; at most {args.minutes:g} minutes")
    if device.type == "cpu":
        console.print("no GPU: flash, cuDNN and efficient attention cannot be measured, nor compiled Triton and CUDA")
    run = Run(
        wanted, results.Results(path, made), time.monotonic() + 60 * args.minutes, LONGEST,
        lambda text: console.print(text, markup=False, highlight=False),
    )  # fmt: skip
    run.walk(Stage(operations.__name__, KINDS, 1, 60 * args.minutes))
    run.finish(operations.__name__)
    return path


def show(rows: list[dict[str, Any]], notes: dict[str, str], console: Console) -> None:
    """Tables on the screen, and what is wrong or missing."""
    from fewstep.lab.profile import tables

    for title, table in tables.all_tables(rows).items():
        tables.show(console, table, title)
    for line in (*tables.circumstances(rows), *tables.ceilings(rows)):
        console.print(line, markup=False)
    for line in tables.unmeasured(notes):
        console.print(f"not there: {line}", markup=False, style="yellow")
    for line in tables.incorrect(rows):
        console.print(f"wrong: {line}", markup=False, style="red")


def write(rows: list[dict[str, Any]], notes: dict[str, str], out: Path) -> list[Path]:
    """`tables.md` for a README, and every figure that these rows allow as PNG and PDF; returns the files."""
    from fewstep.lab.profile import figures, tables
    from fewstep.lab.report.style import style

    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(tables.markdown(rows, notes))
    written = [out / "tables.md"]
    with style():
        for name, figure in figures.draw(rows).items():
            for suffix in ("png", "pdf"):
                figure.savefig(out / f"{name}.{suffix}")
            written.append(out / f"{name}.png")
    return written
