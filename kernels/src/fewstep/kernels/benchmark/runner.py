"""Walks the tasks of a run, stage by stage, in worker processes and under one clock; rows are kept as they come."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fewstep.kernels.benchmark.results import Results
from fewstep.kernels.benchmark.task import Settings, Task

LEFT = "not measured: the time of the run was up"
OUT_OF_MEMORY = "OutOfMemoryError"  # torch's
PATIENCE = 10.0  # seconds that a worker gets to end by itself


@dataclass(frozen=True)
class Stage:
    """Tasks of one module, of some kinds, in their order; what an earlier stage did is not done again.

    Attributes:
        module: has `tasks(settings)`; imported by name, in the workers too.
        kinds: of `task`.
        workers: processes that share them.
        seconds: what this stage may take at most.
        environment: added to that of the workers.
    """

    module: str
    kinds: tuple[str, ...]
    workers: int
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """One run: its settings, its results, its clock.

    Attributes:
        deadline: in the time of `time.monotonic`.
        longest: seconds after which a single task is stopped.
        say: told of every row and every failure, in a line.
        failed: names of tasks that came to an error.
        done: names of tasks that were begun and not lost to the clock.
        crowded: names of tasks that found too little memory beside others; a later stage may do them once more.
    """

    settings: Settings
    results: Results
    deadline: float
    longest: float
    say: Callable[[str], None]
    failed: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    crowded: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def walk(self, *stages: Stage) -> None:
        """Do stages side by side until each has no task or no time left."""
        threads = [thread for stage in stages for thread in self._threads(stage)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def finish(self, *modules: str) -> None:
        """Note what these modules have and was left undone."""
        for module in modules:
            for task in list_tasks(module, self.settings):
                if task.name not in self.done:
                    self.results.note(task.name, LEFT)

    def _threads(self, stage: Stage) -> list[threading.Thread]:
        tasks = [task for task in list_tasks(stage.module, self.settings) if task.kind in stage.kinds]
        names = [task.name for task in tasks if task.name not in self.done]
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in names:
            waiting.put(name)
        end = min(self.deadline, time.monotonic() + stage.seconds)
        count = min(stage.workers, len(names))
        return [threading.Thread(target=self._serve, args=(stage, waiting, end)) for _ in range(count)]

    def _serve(self, stage: Stage, waiting: queue.SimpleQueue[str], end: float) -> None:
        """Give one worker task after task; a new worker after every one that was lost."""
        while time.monotonic() < end and not waiting.empty():
            with Worker(stage, self.settings) as worker:
                worker.await_ready(end)
                for name in _taken(waiting, end):
                    if not self._do(worker, name, end):
                        break

    def _do(self, worker: Worker, name: str, end: float) -> bool:
        """Have a task done; False if the worker cannot do another."""
        began = time.monotonic()
        limit = min(end, began + self.longest)
        with self._lock:
            self.done.add(name)
            self.results.forget(name)
        for message in worker.ask(name, limit):
            if "end" in message:
                return not message["spoiled"]
            with self._lock:
                self._take(name, message)
        with self._lock:
            self._lose(name, worker, time.monotonic() - began, stopped=time.monotonic() >= limit, last=limit == end)
        return False

    def _take(self, name: str, message: Mapping[str, Any]) -> None:
        if "row" in message:
            self.say(line_of(self.results.add(message["row"])))
        elif OUT_OF_MEMORY in message["error"] and name not in self.crowded:
            self.crowded.add(name)
            self.done.discard(name)
            self.say(f"{name}: {OUT_OF_MEMORY}, perhaps beside others")
        else:
            self.fail(name, message["error"])

    def _lose(self, name: str, worker: Worker, seconds: float, stopped: bool, last: bool) -> None:
        """A worker ended in the midst of a task; if for the stage's clock alone, a later stage may do it."""
        if stopped and last:
            self.done.discard(name)
        else:
            self.fail(name, f"stopped after {seconds:.0f} s" if stopped else f"its process ended: {worker.code()}")

    def fail(self, name: str, text: str) -> None:
        """Note that a task came to an error, and which."""
        self.failed.append(name)
        self.results.note(name, text)
        self.say(f"{name}: {text}")


class Worker:
    """A process of `worker`, told by lines what to do."""

    def __init__(self, stage: Stage, settings: Settings) -> None:
        command = [sys.executable, "-m", "fewstep.kernels.benchmark.worker", stage.module]
        environment = {**os.environ, **stage.environment}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._tell(asdict(settings))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]  # so is this

    def await_ready(self, limit: float) -> None:
        """Return when it has imported what it needs, or ended, or at `limit`."""
        for message in self._hear(limit):
            if "end" in message:
                return

    def ask(self, name: str, limit: float) -> Iterator[dict[str, Any]]:
        """What it says of a task, up to its end or the worker's, which is killed at `limit`."""
        self._tell(name)
        yield from self._hear(limit)

    def _hear(self, limit: float) -> Iterator[dict[str, Any]]:
        timer = threading.Timer(max(0.0, limit - time.monotonic()), self.process.kill)
        timer.start()
        try:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                with contextlib.suppress(ValueError):      # a killed one leaves half a line
                    yield json.loads(line)
        finally:
            timer.cancel()

    def code(self) -> int:
        """Its exit code, negative for a signal."""
        return self.process.wait()

    def _tell(self, what: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):          # it has ended: its output says so
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()


def list_tasks(module: str, settings: Settings) -> list[Task]:
    """The tasks of a module, in their order."""
    return list(importlib.import_module(module).tasks(settings))


def _taken(waiting: queue.SimpleQueue[str], end: float) -> Iterator[str]:
    while time.monotonic() < end:
        try:
            yield waiting.get_nowait()
        except queue.Empty:
            return


def line_of(row: Mapping[str, Any]) -> str:
    """A row in one line of text."""
    parts = [f"{row['op']} {row['pass']} {row['shape']} {row['dtype']} {row['layout']} {row['backend']}:"]
    parts += [f"error {row['rel_err']:.1e}"] if "rel_err" in row else []
    parts += [f"{row['us']:,.1f} us"] if "us" in row else []
    parts += [f"{row['ratio']:.2f} of the floor's speed"] if row.get("ratio") is not None else []
    parts += [f"picks {row['picked']}"] if "picked" in row else []
    return " ".join(parts)
