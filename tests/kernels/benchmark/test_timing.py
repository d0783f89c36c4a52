"""Times of a GPU, on a GPU made of two clocks: what the host adds must not be counted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewstep.kernels.benchmark import timing
from fewstep.kernels.benchmark.timing import by_the_clock, measure, summary


class Gpu:
    """A host whose clock runs while it launches, and a stream whose work starts when launched and not before.

    Times in microseconds. `depth`: launches that fit the queue; the host waits when it is full.
    """

    CYCLES_PER_US = 1000.0

    def __init__(self, depth: int = 1000) -> None:
        self.host, self.busy_until, self.depth = 0.0, 0.0, depth
        self.queue: list[float] = []

    def launch(self, device_us: float, host_us: float) -> None:
        self.host += host_us
        self.queue = [end for end in self.queue if end > self.host]
        if len(self.queue) >= self.depth:
            self.host = self.queue[-self.depth]
        self.busy_until = max(self.busy_until, self.host) + device_us
        self.queue.append(self.busy_until)

    def event(self) -> "Event":
        return Event(self)

    def synchronize(self, *_: Any) -> None:
        self.host = max(self.host, self.busy_until)

    def call(self, device_us: float, host_us: float, kernels: int = 1) -> Callable[[], None]:
        def run() -> None:
            for _ in range(kernels):
                self.launch(device_us / kernels, host_us / kernels)

        return run


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self, *_: Any) -> None:
        self.at = max(self.gpu.busy_until, self.gpu.host)

    def query(self) -> bool:
        return self.at <= self.gpu.host

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) / 1000


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(timing, "_event", gpu.event)
    monkeypatch.setattr(timing, "_wait", lambda cycles: gpu.launch(cycles / Gpu.CYCLES_PER_US, 5.0))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.host * 1e-6)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    return gpu


@pytest.mark.parametrize(("device_us", "host_us"), [(3.0, 80.0), (40.0, 200.0), (5000.0, 100.0)])
def test_the_hosts_time_is_not_the_devices(gpu: Gpu, device_us: float, host_us: float) -> None:
    """A kernel of 3 us behind 80 us of Python would be reported 27 times too slow, and every backend alike."""
    found = measure([gpu.call(device_us, host_us)] * 3, torch.device("cuda"))
    assert found.us == pytest.approx(device_us, rel=1e-3)
    assert found.host_us == pytest.approx(host_us, rel=1e-3)
    assert not found.host_bound


def test_many_launches_per_call_still_fit_the_queue(gpu: Gpu) -> None:
    """A full queue makes the host wait until the device has begun, and then the device waits for the host."""
    found = measure([gpu.call(60.0, 600.0, kernels=60)] * 4, torch.device("cuda"))
    assert found.us == pytest.approx(60.0, rel=1e-3)
    assert not found.host_bound


def test_what_cannot_be_hidden_is_said(gpu: Gpu) -> None:
    """A call that waits for the device (a copy to the host) has no device time of its own, and must not pretend to."""

    def waits() -> None:
        gpu.launch(10.0, 50.0)
        gpu.synchronize()

    assert measure([waits], torch.device("cuda")).host_bound


def test_summary_by_hand() -> None:
    """The median of all, and how far apart the runs' medians are."""
    us, spread = summary([[1.0, 2.0, 30.0], [2.0, 3.0, 4.0]])
    assert us == pytest.approx(2.5)
    assert spread == pytest.approx((3.0 - 2.0) / 2.5)


def test_inputs_are_taken_in_turn() -> None:
    """The same inputs again and again would measure the cache."""
    seen: list[int] = []
    by_the_clock([lambda i=i: seen.append(i) for i in range(3)], torch.device("cpu"), 1e-4)
    taken = seen[1:]
    assert {abs(taken.count(i) - taken.count(j)) <= 2 for i in range(3) for j in range(3)} == {True}
    assert len(taken) >= 2
