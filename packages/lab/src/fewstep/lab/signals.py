"""Ctrl-C, SIGTERM and SIGUSR2 (Slurm's warning) as a wish that the running stage grants at its next step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """Called, says whether a signal asked to stop; `number` is that signal's, or None."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.number is not None

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now; what was saved stays whole
        self.number = number


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within, SIGINT, SIGTERM and SIGUSR2 only set the flag: saving inside a handler could meet a half-done update."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag._set) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
