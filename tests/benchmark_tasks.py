"""Tasks for tests of the runner: they succeed, fail, crash, hang, or speak out of turn."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from fewstep.kernels.benchmark.task import CHECK, TIME, Settings, Task


def row(name: str, **facts: Any) -> dict[str, Any]:
    """A row of an operation of that name."""
    place = {"op": name, "pass": "forward", "shape": "s", "dtype": "fp32", "layout": "l", "backend": "triton"}
    return place | {"flops": 0, "bytes": 100, "process": os.getpid(), **facts}


def good(name: str) -> Iterator[dict[str, Any]]:
    print("a library prints")
    yield row(name, us=10.0)


def broken(name: str) -> Iterator[dict[str, Any]]:
    yield row(name, us=10.0)
    raise RuntimeError("two\nlines")


def spoiled(name: str) -> Iterator[dict[str, Any]]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
    yield row(name)


def full(name: str) -> Iterator[dict[str, Any]]:
    raise torch.OutOfMemoryError("CUDA out of memory")
    yield row(name)


def crash(name: str) -> Iterator[dict[str, Any]]:
    yield row(name, us=10.0)
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(name: str) -> Iterator[dict[str, Any]]:
    yield row(name, us=10.0)
    time.sleep(600)


def tasks(settings: Settings) -> Iterator[Task]:
    runs = {"good": good, "broken": broken, "spoiled": spoiled, "full": full, "crash": crash, "hang": hang}
    for name in settings.ops:
        kind = TIME if name.startswith("late") else CHECK
        run = runs[name.split("_")[-1]]
        yield Task(f"{name} triton", kind, lambda run=run, name=name: run(name))
