"""Worker processes that neither outlive the process that started them nor heed what it is told.

Imports nothing large: workers start at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# What asks a process to stop, and reaches its children too: a terminal's or a cluster's.
ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started within never hear what asks to stop: they serve until their parent, which saves, is gone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow(parent: int) -> None:
    """Called first in a worker: deaf to the terminal's Ctrl-C (the parent decides), gone with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
