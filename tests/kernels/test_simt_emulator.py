"""The SIMT emulator must run right kernels right, and show every planted bug in one of its ways."""

import pytest
from emulated_cuda import emulated, sanitized, schedules
from simt_probe_cases import errors

SUM_BARRIER = ("__syncthreads();  // all warps have written", "")
SUM_REUSE = ("__syncthreads();  // all threads have read", "")
WAIT = ("simt::wait_copies<1>();  // this step's tiles have arrived", "")
COPY_BARRIER = ("__syncthreads();  // all threads' copies have", "")
REUSE_BARRIER = ("__syncthreads();  // before the tiles are overwritten", "")
OUT_OF_BOUNDS = ("i < size; i += THREADS) sum", "i <= size + THREADS; i += THREADS) sum")


def wrong(monkeypatch: pytest.MonkeyPatch, plant: tuple[str, str] | None) -> set[tuple[str, str]]:
    """Return the schedules under which a result is off, or NaN."""
    found = set()
    for schedule in schedules():
        for name, value in schedule.items():
            monkeypatch.setenv(name, value)
        with emulated(plant=plant):
            if not all(error < 1e-4 for error in errors()):
                found.add((schedule["SIMT_ORDER"], schedule["SIMT_COPIES"]))
    return found


def test_right_kernels_are_right_under_every_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wrong(monkeypatch, None)


@pytest.mark.parametrize("plant", [SUM_BARRIER, SUM_REUSE, WAIT, COPY_BARRIER, REUSE_BARRIER])
def test_a_missing_line_changes_the_result(plant: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under one schedule at least; a GPU shows it once in a thousand runs."""
    assert wrong(monkeypatch, plant)


def test_lanes_that_wait_for_different_things_are_a_deadlock(capfd: pytest.CaptureFixture[str]) -> None:
    """A barrier in a branch that some threads do not take hangs a GPU; here the process ends and says where."""
    plant = ("__syncthreads();  // all warps have written", "if (threadIdx.x < 32) __syncthreads();")
    with pytest.raises(AssertionError, match=r"\[simt\] deadlock: threads wait at different barriers \(block 0,0,0"):
        sanitized("simt_probe_cases:errors", "address", plant)


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "plant", "message"), [
    ("thread", SUM_BARRIER, "data race"), ("thread", REUSE_BARRIER, "data race"), ("thread", None, ""),
    ("address", OUT_OF_BOUNDS, "heap-buffer-overflow"),
])
def test_sanitizers_name_the_kernels_line(sanitizer: str, plant: tuple[str, str] | None, message: str) -> None:
    """Races that happen to give the right numbers, and reads beyond a tensor, have no other witness."""
    report = sanitized("simt_probe_cases:errors", sanitizer, plant, SIMT_COPIES="eager")
    assert message in report
    assert ("kernel.cu" in report) == bool(report) == bool(message)
