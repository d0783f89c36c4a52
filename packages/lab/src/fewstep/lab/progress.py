"""How far sampling has come: a bar with images/s and time left, or a line now and then where there is no terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Tell = Callable[[int, int], None]  # (pieces that are there, of how many)
PROGRESS = "progress.jsonl"  # where a stage that samples tells how far it is
QUIET = 15.0  # seconds between lines where there is no terminal for a bar


class SamplingProgress:
    """Counts network evaluations, of which `total` are to be made: images of different samplers take different time."""

    def __init__(self, console: Console, total: int, *, bar: bool = True) -> None:
        self.total, self.made, self.seconds = total, 0, 0.0
        self._console = console
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if bar and console.is_terminal:
            columns = (TextColumn("{task.description:44}"), BarColumn(), TaskProgressColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("sampling", total=total, speed="")

    def __enter__(self) -> SamplingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, label: str, images: int, nfe: int, seconds: float, *, cached: bool = False) -> None:
        """`images` of `nfe` network evaluations each are there; `cached` ones took no time now."""
        self.made += images * nfe
        self.seconds += 0.0 if cached else seconds
        speed = "cached" if cached else f"{images / max(seconds, 1e-9):,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, description=label, completed=self.made, speed=speed)
        elif time.monotonic() - self._last_line > QUIET:
            self._last_line = time.monotonic()
            self._console.print(f"{label}  {speed}  {self.made / max(self.total, 1):.0%}", highlight=False)


def unheard(done: int, total: int) -> None:
    """The `Tell` of work that nobody watches from elsewhere."""


def teller(path: Path) -> Tell:
    """A `Tell` that adds a line to `path`, which `fewstep status` reads."""

    def tell(done: int, total: int) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"step": done, "total": total, "time": round(time.time(), 2)}) + "\n")

    return tell
