"""A process that does tasks one by one as it is told: a kernel that brings it down takes no other measurement with it.

    python -m fewstep.kernels.benchmark.worker MODULE     # MODULE has `tasks(settings)`

Reads JSON lines, first the settings and then names of tasks; writes JSON lines: {"end"} when it is ready, then for each
task any number of {"row"}, at most one {"error"}, and {"end"}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import Any, TextIO

import torch

from fewstep.kernels.benchmark.task import Settings, Task


def main(module: str) -> None:
    """Do what stdin says until it ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)                                   # whatever else prints must not stand between the lines
    warnings.simplefilter("ignore")                 # each would be repeated by every worker
    settings = Settings(**json.loads(sys.stdin.readline()))
    tasks = {task.name: task for task in importlib.import_module(module).tasks(settings)}
    _say(out, end=True, spoiled=False)
    for line in sys.stdin:
        error = _do(tasks[json.loads(line)], out)
        spoiled = error is not None and "CUDA error" in error     # nothing in this process can be trusted any more
        _say(out, end=True, spoiled=spoiled)
        if spoiled:
            break


def _do(task: Task, out: TextIO) -> str | None:
    try:
        for row in task.run():
            _say(out, row=row)
    except Exception as error:   # whatever a kernel or the compiler raises is a finding about this task alone
        text = one_line(error)
        _say(out, error=text)
        return text
    finally:
        torch.cuda.empty_cache()   # others share the device; does nothing without one
    return None


def one_line(error: BaseException) -> str:
    """Type and message in at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _say(out: TextIO, **message: Any) -> None:
    out.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
