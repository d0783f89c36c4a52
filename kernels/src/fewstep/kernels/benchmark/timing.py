"""Microseconds per call, by CUDA events behind a busy GPU or by the clock of the CPU.

On a GPU small calls take less time than Python needs to launch them. So the GPU is first kept busy by a kernel that
waits, calls are queued behind it, and events around them tell what the GPU itself took; whether the wait was long
enough is asked of the first event afterwards. What the host took per call is kept beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Calls = Sequence[Callable[[], object]]

RUNS, BLOCKS = 2, 7          # medians are over all blocks, the spread is between the runs' medians
BLOCK_US = 2_000.0           # a block of calls lasts about this long
MOST_CALLS = 48              # per block; each launches up to some 12 kernels, and about 1,000 launches fit the queue
LONGEST_WAIT_US = 60_000.0


@dataclass(frozen=True)
class Timing:
    """Medians in microseconds per call.

    Attributes:
        us: of the device (on a CPU, of the call).
        spread: largest difference between the medians of the runs, as a share of `us`.
        host_us: what the host needed to launch a call; None on a CPU.
        host_bound: the device waited for the host even so, so `us` is no time of the device alone.
    """

    us: float
    spread: float
    host_us: float | None = None
    host_bound: bool = False


def measure(calls: Calls, device: torch.device, seconds: float = 2.0) -> Timing:
    """Time calls that do the same on different inputs, taken in turn. They must have been called once before.

    seconds: about what the measurement may last on a CPU; on a GPU it lasts as long as its blocks.
    """
    return _on_gpu(calls, device) if device.type == "cuda" else by_the_clock(calls, device, seconds)


def summary(runs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Median of all values, and the largest difference between the runs' medians as a share of it."""
    us = statistics.median(value for run in runs for value in run)
    medians = [statistics.median(run) for run in runs]
    return us, (max(medians) - min(medians)) / us


def by_the_clock(calls: Calls, device: torch.device, seconds: float) -> Timing:
    """Time calls with all that the host does for them, the device idle before and after each: whole training steps."""
    once = max(_seconds(calls[0], device), 1e-7)
    count = max(1, min(200, int(seconds / RUNS / once)))
    runs = [[_seconds(calls[i % len(calls)], device) * 1e6 for i in range(count)] for _ in range(RUNS)]
    return Timing(*summary(runs))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@dataclass(frozen=True)
class _Block:
    us: float
    host_us: float
    late: bool


def _on_gpu(calls: Calls, device: torch.device) -> Timing:
    cycles = _cycles_per_us(device)
    first = _block(calls, min(len(calls), 4), 0.0, cycles)
    count = max(2, min(MOST_CALLS, int(BLOCK_US / max(first.us, 1e-3))))
    wait = min(1.5 * count * first.host_us + 300.0, LONGEST_WAIT_US)
    trial = _block(calls, count, wait, cycles)
    while trial.late and count > 4:
        count //= 2
        trial = _block(calls, count, wait, cycles)
    runs = [[_block(calls, count, wait, cycles, start=i * count) for i in range(BLOCKS)] for _ in range(RUNS)]
    blocks = [block for run in runs for block in run]
    us, spread = summary([[block.us for block in run] for run in runs])
    return Timing(us, spread, statistics.median(b.host_us for b in blocks), sum(b.late for b in blocks) > BLOCKS)


def _block(calls: Calls, count: int, wait_us: float, cycles_per_us: float, start: int = 0) -> _Block:
    """Queue `count` calls behind a wait and time them."""
    before, after = _event(), _event()
    torch.cuda.synchronize()
    if wait_us:
        _wait(int(wait_us * cycles_per_us))
    before.record()
    began = time.perf_counter()
    for i in range(start, start + count):
        calls[i % len(calls)]()
    host = time.perf_counter() - began
    late = before.query()          # the wait was over before the last call was queued
    after.record()
    after.synchronize()
    return _Block(before.elapsed_time(after) * 1e3 / count, host * 1e6 / count, late)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no types for it


def _wait(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]  # nor for this


def _cycles_per_us(device: torch.device) -> float:
    """What `torch.cuda._sleep` counts, per microsecond, at the present clock."""
    cycles, times = 2_000_000, []
    for _ in range(3):
        before, after = _event(), _event()
        before.record(torch.cuda.current_stream(device))
        _wait(cycles)
        after.record(torch.cuda.current_stream(device))
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3)
    return float(cycles / statistics.median(times))
