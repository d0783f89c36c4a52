"""Fencing: a stage's folder belongs to one attempt, and an older copy that still runs writes nothing more."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fewstep.lab.checkpoint import write_text

FILE = "attempt.json"


class Superseded(RuntimeError):
    """A newer attempt owns the folder; the message is one line that names both."""


@dataclass(frozen=True, order=True)
class Attempt:
    """One start of one job; the newer of two is the greater.

    submission: number of the submission in its run. restart: times that Slurm has started the job again. job: its id,
    for people: ids may come again.
    """

    submission: int
    restart: int
    job: str = field(compare=False)

    @staticmethod
    def here(submission: int) -> Attempt:
        """The attempt that this process belongs to."""
        return Attempt(submission, int(os.environ.get("SLURM_RESTART_COUNT", "0")), os.environ.get("SLURM_JOB_ID", ""))

    def __str__(self) -> str:
        return f"submission {self.submission}, job {self.job}, restart {self.restart}"

    def claim(self, folder: Path) -> None:
        """Make the folder this attempt's.

        Raises:
            Superseded: a newer one has it.
        """
        holder = holder_of(folder)
        if holder is not None and self < holder:
            raise Superseded(f"{folder}: belongs to {holder}; {self} writes nothing more")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, json.dumps(asdict(self)) + "\n")

    def check(self, folder: Path) -> None:
        """Before every write.

        Raises:
            Superseded: the folder is another attempt's by now.
        """
        holder = holder_of(folder)
        if holder != self:
            raise Superseded(f"{folder}: belongs to {holder}; {self} writes nothing more")


def holder_of(folder: Path) -> Attempt | None:
    """The attempt that claimed the folder last; None where none did (or its file was cut short by a full disk)."""
    try:
        return Attempt(**json.loads((folder / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
