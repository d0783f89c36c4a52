"""What only the CUDA kernels of guided_update can get wrong: races between threads, and bounds."""

import pytest
import torch
from emulated_cuda import sanitized, schedules, under
from guided_update_cases import run

NO_BARRIER = ("__syncthreads();", "")
NO_BOUND = ("return at < call.size ? sample * call.size + at : -1;", "return sample * call.size + at;")


def test_no_schedule_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = (under(run, schedule, monkeypatch) for schedule in schedules())
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert not any(x.isnan().any() for x in first)


def test_a_missing_barrier_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that run before the one that works out the scalars: on a GPU, now and then, another warp."""
    assert any(x.isnan().any() for x in under(run, {"SIMT_ORDER": "1"}, monkeypatch, NO_BARRIER))


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "plant", "message"), [
    ("thread", None, ""), ("address", None, ""), ("thread", NO_BARRIER, "data race"),
    ("address", NO_BOUND, "AddressSanitizer: heap-"),
])
def test_sanitizers_find_what_is_planted_only(sanitizer: str, plant: tuple[str, str] | None, message: str) -> None:
    report = sanitized("guided_update_cases:run", sanitizer, plant)
    assert message in report
    assert bool(report) == bool(message)
