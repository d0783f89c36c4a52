"""Rows of measurements in one JSON file, written after every row, so that a killed run keeps what it had."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fewstep.kernels.benchmark.ceilings import COPY, PRODUCT, floor_us, rates

FORMAT = 1
KEY = ("op", "pass", "shape", "dtype", "layout", "backend")
PACKAGES = ("torch", "triton", "numpy")

Row = dict[str, Any]


class Results:
    """The rows of one device. A row measured again replaces the one before; others, of older runs too, are kept.

    Attributes:
        rows: by their `KEY`.
        notes: what could not be measured, by the name of its task, in one line each.

    Raises:
        ValueError: the file is there and is no results file.
    """

    def __init__(self, path: Path, made: Mapping[str, Any]) -> None:
        self.path, self.made = path, dict(made)
        self.rows: dict[tuple[str, ...], Row] = {}
        self.notes: dict[str, str] = {}
        if path.exists():
            found = read(path)
            self.rows = {key_of(row): row for row in found["rows"]}
            self.notes = dict(found["notes"])

    def add(self, row: Row) -> Row:
        """Keep a row, completed by what it was made with, beside what an older one of this run knew. Written."""
        key = key_of(row)
        old = self.rows.get(key, {})
        same_run = all(old.get(name) == value for name, value in self.made.items())
        self.rows[key] = {**(old if same_run else {}), **row, **self.made}
        self._complete(self.rows if row["op"] in (COPY, PRODUCT) else {key: self.rows[key]})
        self.write()
        return self.rows[key]

    def note(self, task: str, text: str) -> None:
        """Say why a task has no row, or not all of its rows. Written."""
        self.notes[task] = text
        self.write()

    def forget(self, task: str) -> None:
        """Drop what an earlier run noted of a task that is done again."""
        self.notes.pop(task, None)

    def _complete(self, rows: Mapping[tuple[str, ...], Row]) -> None:
        """Add floor and ratio to rows that are timed, from the ceilings that are known."""
        known = rates([row for row in self.rows.values() if row["op"] in (COPY, PRODUCT)])
        for row in rows.values():
            if "us" in row and row.get("bytes"):
                floor = floor_us(row["bytes"], row["flops"], row["dtype"], known)
                row["floor_us"], row["ratio"] = floor, None if floor is None else floor / row["us"]

    def write(self) -> None:
        """Write the file whole, beside its place, and then move it there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        lines = ",\n".join(json.dumps(row) for row in self.rows.values())
        notes = json.dumps(self.notes, indent=1)
        partial.write_text(f'{{"format": {FORMAT}, "notes": {notes}, "rows": [\n{lines}\n]}}\n')
        os.replace(partial, self.path)


def file_name(device: str) -> str:
    """A device's name as that of a file."""
    return re.sub(r"\W+", "_", device.lower()).strip("_")


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a row from another."""
    return tuple(str(row[name]) for name in KEY)


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no results file of this format.
    """
    try:
        found = json.loads(path.read_text())
        fits = found["format"] == FORMAT and all(set(KEY) <= set(row) for row in found["rows"])
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is not a results file of `fewstep profile kernels` or `make gpu-check`")
    return dict(found)


def circumstances(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What rows carry of where they were made: device, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    versions = {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p)) is not None}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return {"device": name, "versions": versions, "commit": commit or commit_of(Path(__file__).parent)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's own name and how many threads PyTorch uses of it."""
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's own name, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit_of(folder: Path) -> str:
    """The commit of a clone, with "+changes" where tracked files differ from it; "unknown" outside one."""
    head = _git("rev-parse", "HEAD", folder=folder)
    if head is None:
        return "unknown"
    return f"{head}+changes" if _git("status", "--porcelain", "-uno", folder=folder) else head


def _git(*arguments: str, folder: Path) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
