"""The CUDA kernels on the CPU emulator: every tier, layout and dtype against float64, schedules, sanitizers.

The cluster tier has no emulator: it is compiled and its machine code read (spills: tests/kernels/test_cuda_objects.py).
"""

from dataclasses import replace

import pytest
import torch
from cuda_objects import compiled
from emulated_cuda import emulated, module, sanitized, schedules, under
from group_norm_cases import Case, cuda_tier, excesses, run

from fewstep.kernels import backend, build
from fewstep.kernels.group_norm_silu import cuda_kernel, fused
from fewstep.kernels.group_norm_silu.cuda_kernel import HELD, HELD_BY_LARGE, cut
from fewstep.kernels.group_norm_silu.shapes import SHAPES, Shape

pytestmark = pytest.mark.usefixtures("unset_is_nan")
cuda_call = backend._implementations["group_norm_silu"]["cuda"]
LAYOUTS = ["contiguous", "channels_last"]
NO_BARRIER = ("__syncthreads();  // also before scratch is used again", "")
NO_BOUND = ("i < across * along; i += THREADS", "i < across * along + 3; i += THREADS")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["one", "two_phase"])
def test_against_float64(which: str, dtype: torch.dtype, layout: str) -> None:
    """Single elements and 16-byte vectors, residuals, three channels a group, one pixel, a mean of 300 deviations."""
    cases = (
        Case(), Case(shape=(1, 16, 8, 8)), Case(shape=(1, 16, 8, 8), residual="before"), Case(mean=300.0),
        Case(residual="after", act=None, film=False), Case(shape=(1, 96, 3, 3), groups=32),
        Case(shape=(2, 6, 1, 1), groups=3),
    )  # fmt: skip
    with emulated(), cuda_tier(which):
        for case in cases:
            assert not excesses(cuda_call, replace(case, dtype=dtype, layout=layout)), case


def test_no_schedule_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order warps and programs run in: no atomics, sums in one order."""
    first, *others = (under(run, schedule, monkeypatch) for schedule in schedules())
    assert not any(x.isnan().any() for x in first)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_a_missing_barrier_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that take sums before others have made them."""
    first, *others = (under(run, {"SIMT_ORDER": order}, monkeypatch, NO_BARRIER) for order in "01")
    wrong = [not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)]
    assert any(x.isnan().any() for x in first) or any(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "plant", "message"), [
    ("thread", None, ""), ("address", None, ""), ("thread", NO_BARRIER, "data race"),
    ("address", NO_BOUND, "heap-buffer-overflow"),
])
def test_sanitizers_find_what_is_planted_only(sanitizer: str, plant: tuple[str, str] | None, message: str) -> None:
    report = sanitized("group_norm_cases:run", sanitizer, plant)
    assert message in report
    assert bool(report) == bool(message)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_promised_shapes_fit_a_program(shape: Shape) -> None:
    """16-byte loads, memory within 99 KB (sm_89) or 163 KB (the others), and no fallback."""
    size = shape.channels // shape.groups
    for last in (False, True):
        for tensors in (1, 2):
            for itemsize in (2, 4):
                for held, limit in ((HELD, 99 << 10), (HELD_BY_LARGE, 163 << 10)):
                    sizes = shape.batch, shape.channels, shape.groups, shape.side**2, itemsize
                    c = cut(*sizes, last, tensors, held, True)
                    fixed = module("group_norm_silu").scratch(c.together * size, c.together, tensors == 2)
                    assert c.wide
                    assert fixed + c.together * size * c.chunk * itemsize * tensors <= limit
    x = torch.empty(shape.batch, shape.channels, shape.side, shape.side, dtype=torch.bfloat16, device="meta")
    residual = x if shape.residual else None
    arguments = (x, shape.groups, None, None, 1e-5, None, None, residual, "silu", shape.residual or "after")
    assert fused.cuda_supports(*arguments) is None


@pytest.mark.slow
def test_the_cluster_tier_waits_for_its_cluster() -> None:
    """Without barriers a program would read statistics that another has not written, or that are gone."""
    kernels, sass = compiled(build.ROOT / "group_norm_silu/cluster_sm90a.cu", "sm_90a")
    assert len(kernels) == 8
    assert sass.count("UCGABAR_WAIT") >= 2 * len(kernels)


def test_the_cluster_tier_runs_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 192, 64, 64)
    chunked = cuda_kernel.Cut(together=1, blocks=32, chunks=4, chunk=1024, wide=True)
    assert not cuda_kernel._clustered(x, 32, chunked)
    monkeypatch.setattr(cuda_kernel, "tuned", lambda *_: {"cluster": True})
    assert cuda_kernel._clustered(x, 32, chunked)
    assert not cuda_kernel._clustered(x, 32, replace(chunked, chunks=9))
