"""Independent pieces of work on all cores: processes of one thread each.

Networks of some ten megaflops gain next to nothing from threads, and all of it from processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from fewstep.lab.orphans import follow

T = TypeVar("T")

POLL = 0.5  # seconds between two looks at whether to stop


def default_workers(device: torch.device) -> int:
    """One process per core that this one may use; on a GPU, one."""
    return len(os.sched_getaffinity(0)) if device.type == "cpu" else 1


def spread(
    function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], workers: int, stopping: Callable[[], bool]
) -> Iterator[tuple[int, T]]:
    """(i, function(*arguments[i])) in the order in which they finish; fewer once `stopping` says so.

    With one worker, or one piece, everything happens here. Otherwise function and arguments must be picklable, and what
    is under way when `stopping` says so is killed: a function should leave nothing half written.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a worker was killed; what it raised itself is raised as it is.
    """
    if workers <= 1 or len(arguments) <= 1:
        for i, each in enumerate(arguments):
            yield i, function(*each)
            if stopping():
                return
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(arguments)), context, _begin, (os.getpid(),)) as pool:
        futures = {pool.submit(function, *each): i for i, each in enumerate(arguments)}
        try:
            for future in _finished(set(futures), stopping):
                yield futures[future], future.result()
        except BrokenProcessPool:
            if not stopping():  # Slurm's signal goes to workers too, and ends those that have just been started
                raise
        finally:
            if not all(future.done() for future in futures):
                pool.shutdown(wait=False, cancel_futures=True)
                workers_left = set(multiprocessing.active_children()) - before
                for worker in workers_left:
                    worker.terminate()
                for worker in workers_left:
                    worker.join()


def _finished(left: set[Future[T]], stopping: Callable[[], bool]) -> Iterator[Future[T]]:
    while left and not stopping():
        done, left = wait(left, POLL, FIRST_COMPLETED)
        yield from done


def _begin(parent: int) -> None:
    """Start of a worker: one thread."""
    follow(parent)
    torch.set_num_threads(1)
