"""As many updates as a time allows: settled once for each training by its own speed, and from then on its number."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from fewstep.lab import distributed
from fewstep.lab.checkpoint import write_text
from fewstep.lab.config import TrainingConfig

FILE = "updates.json"
# Updates of a call before its clock starts (compiling, choosing algorithms, growing memory), and those that it times.
WARM, TIMED = 10, 50


class Budget:
    """The clock of one call of a training that may take `seconds`; it runs from now on."""

    def __init__(self, seconds: float, device: torch.device):
        self._seconds, self._device, self._began = seconds, device, time.monotonic()
        self._calls, self._then = 0, 0.0

    def updates(self, done: int, most: int) -> int | None:
        """After each update, `done` in all: how many there are to be, at most `most`; None until that is settled."""
        self._calls += 1
        if self._calls == WARM:
            self._then = self._now()
        if self._calls < WARM + TIMED:
            return None
        each = max(self._now() - self._then, 1e-9) / TIMED
        left = self._seconds - (time.monotonic() - self._began)
        # One answer for all processes; float64, so that it is that of a single one.
        fitting = distributed.mean(torch.tensor(left / each, dtype=torch.float64, device=self._device))
        return min(most, done + max(0, int(fitting)))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()


def write_updates(folder: Path, updates: int, options: TrainingConfig) -> None:
    """Write what was settled for the training in `folder`."""
    text = json.dumps({"updates": updates, "most": options.updates, "seconds": options.seconds})
    write_text(folder / FILE, text + "\n")


def updates_of(folder: Path, asked: int) -> int:
    """Updates of the training in `folder`: those that were settled there, else the `asked`."""
    path = folder / FILE
    return int(json.loads(path.read_text())["updates"]) if path.is_file() else asked
