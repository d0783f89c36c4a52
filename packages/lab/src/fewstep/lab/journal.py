"""Where a training run tells how it goes: `metrics.jsonl`, TensorBoard, and a progress bar or plain lines."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewstep.lab.checkpoint import write_text

QUIET = 15.0  # seconds between lines where there is no terminal for a bar


class Journal:
    """Metrics of one training run of `updates`, gone on with after `step`: later lines of an earlier try are dropped.

    A silent journal (on all processes but the first) takes the same calls and writes nothing.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        label: str,
        updates: int,
        step: int,
        *,
        silent: bool = False,
        bar: bool = True,
        tensorboard: bool = True,
    ):
        self._path = folder / "metrics.jsonl"
        self._console, self._label, self._updates, self._silent = console, label, updates, silent
        self._last_line = time.monotonic()
        self._board: Any = None
        self._bar: Progress | None = None
        if silent:
            return
        folder.mkdir(parents=True, exist_ok=True)
        truncate(self._path, step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here: seconds of import

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if bar and console.is_terminal:
            self._bar = _progress(console)
            self._task = self._bar.add_task(label, total=updates, completed=step, speed="")

    def __enter__(self) -> "Journal":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, metrics: dict[str, float], images_per_second: float) -> None:
        """One line of metrics after update `step` (counted from 1)."""
        if self._silent:
            return
        clock = {"images_per_second": round(images_per_second, 1), "time": round(time.time(), 2)}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics, **clock}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        self._show(step, metrics, images_per_second)

    def expect(self, updates: int) -> None:
        """There are to be so many updates, not as many as it was made with."""
        self._updates = updates
        if self._bar is not None:
            self._bar.update(self._task, total=updates)

    def _show(self, step: int, metrics: dict[str, float], speed: float) -> None:
        text = f"loss {metrics['loss']:.4g}  {speed:,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, speed=text)
        elif time.monotonic() - self._last_line > QUIET or step == self._updates:
            self._last_line = time.monotonic()
            self._console.print(f"{self._label}  {step}/{self._updates}  {text}", highlight=False)


def truncate(path: Path, step: int) -> None:
    """Drop the lines of `path` after update `step`, and a last one that was cut short."""
    if path.is_file():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )
