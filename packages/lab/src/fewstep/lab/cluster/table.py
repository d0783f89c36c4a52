"""The table of `fewstep status`."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from fewstep.lab.cluster.monitor import DONE, ENDED, Part, Progress, name

COLUMNS = ("stage", "job", "state", "node", "progress", "left", "last error")


def table(parts: Sequence[Part]) -> Table:
    """One row for each part."""
    shown = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for part in parts:
        style = "green" if part.state == DONE else "red" if part.state in ENDED else None
        far = (progress(part.progress), duration(part.progress.left))
        shown.add_row(name(part), part.job, part.state, part.node, *far, part.error, style=style)
    return shown


def progress(made: Progress) -> str:
    """What is done of all."""
    return f"{made.done}/{made.total} ({made.done / made.total:.0%})" if made.total else ""


def duration(seconds: float | None) -> str:
    """Seconds as people read them."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
