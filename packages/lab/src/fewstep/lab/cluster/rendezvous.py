"""How the processes of a job find each other without a race for a port.

The first one binds a port that the system chooses and keeps it, then says in a file which; ports drawn by rule (from
the job's id, say) may be taken, and ports that are looked up, closed and bound again may be lost in between.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch re-exports it without saying so

from fewstep.lab.checkpoint import write_text

SECONDS = 600  # until all nodes of a job have started


def meet(place: Path, rank: int, world: int, seconds: float = SECONDS) -> TCPStore:
    """The store that all `world` processes share; `place` is a file that no other start of a job uses.

    Raises:
        TimeoutError: the first process did not say within `seconds` where it is.
    """
    patience = timedelta(seconds=seconds)
    if rank == 0:
        store = TCPStore(socket.gethostname(), 0, world, is_master=True, timeout=patience, wait_for_workers=False)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, f"{socket.gethostname()} {store.port}\n")
        return store
    host, port = _wait_for(place, seconds).split()
    return TCPStore(host, int(port), world, is_master=False, timeout=patience)


def _wait_for(place: Path, seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if place.is_file():
            return place.read_text()
        time.sleep(0.1)
    raise TimeoutError(f"{place}: the first process of the job did not say where it is within {seconds:g} s")
