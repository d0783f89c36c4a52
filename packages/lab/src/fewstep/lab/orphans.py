"""Worker processes that do not outlive the process that started them. Imports nothing large: workers start at once."""

import os
import signal
import threading
import time


def follow(parent: int) -> None:
    """Called first in a worker: deaf to the terminal's Ctrl-C (the parent decides), gone with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
