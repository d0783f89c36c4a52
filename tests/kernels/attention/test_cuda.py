"""What only the CUDA kernels of attention can get wrong: races between threads, copies not waited for, and bounds."""

import os

import pytest
import torch
from attention_cases import Case, excesses, run
from emulated_cuda import emulated, sanitized, schedules, under
from torch import Tensor

from fewstep.kernels.attention import fused

pytestmark = pytest.mark.usefixtures("unset_is_nan")
Plant = tuple[str, str]
FULL = pytest.mark.skipif(
    os.environ.get("FEWSTEP_KERNELS_FULL") != "1", reason="each compiles all kernels again: make test-kernels-full"
)
NO_WAIT = ("simt::wait_copies<1>();", "")
NO_BARRIER = ("(2 * buffer + 1) * SIZE);\n    __syncthreads();", "(2 * buffer + 1) * SIZE);")
NO_BARRIER_BEFORE = ("__syncthreads();\n    work(", "work(")
NO_BOUND = ("if (row < left) *(uint4*)", "*(uint4*)")


def test_no_schedule_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = (under(run, schedule, monkeypatch) for schedule in schedules())
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert not any(x.isnan().any() for x in first)


@pytest.mark.parametrize("dim", fused.DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_head_dimension_over_several_tiles(dim: int, dtype: torch.dtype) -> None:
    """Each has its own tiles: of queries and keys, and of the narrower steps that its gradients take."""

    def cuda(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return fused.forward(q, k, v, scale, key_lengths, "cuda")

    with emulated():
        assert not excesses(cuda, Case(heads=1, queries=140, keys=133, dim=dim, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "schedule"), [
    pytest.param(NO_WAIT, {"SIMT_COPIES": "lazy"}, id="no wait"),
    pytest.param(NO_BARRIER, {"SIMT_COPIES": "eager", "SIMT_ORDER": "0"}, id="reused without a barrier", marks=FULL),
    pytest.param(NO_BARRIER_BEFORE, {"SIMT_COPIES": "lazy", "SIMT_ORDER": "1"}, id="used without", marks=FULL),
])  # fmt: skip
def test_planted_bugs_change_the_result(
    plant: Plant, schedule: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each goes well most of the time: the emulator's schedules must show them every time."""
    right, wrong = under(run, {}, monkeypatch), under(run, schedule, monkeypatch, plant)
    assert not all(torch.equal(a, b) for a, b in zip(right, wrong, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "plant", "message"), [
    ("thread", None, ""),
    pytest.param("address", None, "", marks=FULL), pytest.param("thread", NO_BARRIER, "data race", marks=FULL),
    pytest.param("address", NO_BOUND, "AddressSanitizer: heap-", marks=FULL),
])  # fmt: skip
def test_sanitizers_find_what_is_planted_only(sanitizer: str, plant: Plant | None, message: str) -> None:
    report = sanitized("attention_cases:run", sanitizer, plant, SIMT_COPIES="eager")
    assert message in report
    assert bool(report) == bool(message)
