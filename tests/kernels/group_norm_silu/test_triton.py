"""The Triton kernels in the strict interpreter: every tier, layout and dtype, forward and backward, against float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from group_norm_cases import TIERS, Case, excesses, inputs, results, tier
from mutants import mutant
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder

from fewstep.kernels import backend
from fewstep.kernels.group_norm_silu import fused, triton_kernel

pytestmark = pytest.mark.usefixtures("unset_is_nan")
triton_call = backend._implementations["group_norm_silu"]["triton"]
RAGGED, ALIGNED = Case(), Case(shape=(1, 16, 8, 8), groups=2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", TIERS)
def test_ragged_and_aligned_in_every_tier(which: str, dtype: torch.dtype, layout: str) -> None:
    """Sizes that fill no tile, and ones that fill each: a wrong mask, offset or merge shows in some result."""
    with tier(which):
        for case in (RAGGED, ALIGNED):
            assert not excesses(triton_call, replace(case, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("which", TIERS)
def test_residuals_before_and_after(which: str, layout: str) -> None:
    """"before" returns the sum, takes its gradient and gives it to both addends; statistics are those of the sum."""
    with tier(which):
        assert not excesses(triton_call, Case(layout=layout, residual="before", dtype=torch.bfloat16))
        assert not excesses(triton_call, Case(layout=layout, residual="after", act=None, film=False))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("which", TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_of_three_hundred_deviations(which: str, layout: str, dtype: torch.dtype) -> None:
    """No digit may be lost: E[x^2] - E[x]^2 would leave two of the variance, a mean rounded to float32 five of xhat."""
    with tier(which):
        assert not excesses(triton_call, replace(RAGGED, layout=layout, dtype=dtype, mean=300.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 6, 1, 1), 3), ((1, 6, 2, 1), 3), ((1, 5, 3, 3), 5), ((1, 7, 3, 1), 1)]
)
def test_one_pixel_and_less_than_a_tile(shape: tuple[int, ...], groups: int, layout: str) -> None:
    """One value per group has variance 0; a group of one channel, all channels in one group."""
    assert not excesses(triton_call, Case(shape=shape, groups=groups, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_three_channels_a_group(layout: str) -> None:
    """96 channels in 32 groups: 16-byte loads span groups, and blocks of whole groups are not powers of two."""
    assert not excesses(triton_call, Case(shape=(1, 96, 3, 3), groups=32, dtype=torch.bfloat16, layout=layout))


@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5), (1, 6, 2, 3, 2)])
def test_rows_sequences_and_volumes(shape: tuple[int, ...]) -> None:
    assert not excesses(triton_call, Case(shape=shape, groups=3))


def test_each_optional_input_alone() -> None:
    """A missing weight is 1 and a missing scale 0, in the result and in the gradients of the others."""
    for kept in ("weight", "bias", "scale", "shift"):
        case = Case(shape=(1, 6, 3, 2), groups=2)
        given = {k: v if k in ("x", kept) else None for k, v in inputs(case).items()}
        exact = {k: None if v is None else v.detach().double().requires_grad_() for k, v in given.items()}
        plain = results(backend._implementations["group_norm_silu"]["reference"], case, exact)
        for name, value in results(triton_call, case, given).items():
            torch.testing.assert_close(value.double(), plain[name], rtol=1e-5, atol=1e-5, msg=f"{kept}: {name}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_in_whatever_order_programs_run(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU runs them in any order; training that is resumed must repeat itself bit for bit."""
    case = replace(RAGGED, layout=layout)
    with tier("two_phase"):
        first = results(triton_call, case, inputs(case))
        placed = InterpreterBuilder.set_grid_idx
        monkeypatch.setattr(
            InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: placed(self, self.grid_dim[0] - 1 - x, y, z)
        )
        for name, value in results(triton_call, case, inputs(case)).items():
            assert torch.equal(value, first[name]), name


BUGS = {
    "channels of the next group": ("(lane < SIZE * GROUPS) & ", "", "resident", {}),
    "pixels of the next chunk": ("start, tl.minimum(start + chunk, S)", "start, S", "two_phase", {}),
    "the mean as one float32": ("return _read(", "return 0.0 * _read(",
                                "resident", {"mean": 300.0}),
    "chunks merged without their distance": ("part_m2s + count * off * off", "part_m2s", "two_phase", {}),
    "last chunk counted as full": ("tl.minimum(chunk, S - k * chunk), 0)", "chunk, 0)", "two_phase", {}),
    "every chunk writes the mean": ("if part == 0:", "if part >= 0:", "two_phase", {}),
    "SiLU's derivative": ("(s * (1.0 + v * (1.0 - s)))", "(s * (1.0 + v * s))", "resident", {}),
    "gradient of the variance": (" - xhat * mean_a[:, None]", "", "resident", {}),
    "group mean from one channel block": ("group_a += _per_group", "group_a = _per_group", "streamed", {}),
    "the sum's own gradient": ("gradient += tl.load(dtotal", "gradient += 0.0 * tl.load(dtotal", "streamed",
                               {"residual": "before"}),
    "weight's gradient without scale": ("total_a += factor * sample_a", "total_a += sample_a", "resident", {}),
    "unset lanes": ("value = tl.load(x + at, live, other=0.0)", "value = tl.load(x + at, live)", "streamed", {}),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these tests' means must see what it is there for: numbers, races between programs, lanes never set."""
    right, wrong, which, change = BUGS[bug]
    kernels = mutant(triton_kernel, tmp_path, (right, wrong))
    monkeypatch.setattr(fused, "_kernels", lambda backend: kernels)
    case = replace(RAGGED, **change)
    with tier(which):
        kernels._planned.cache_clear()
        try:
            caught = excesses(triton_call, case) or excesses(triton_call, replace(case, layout="channels_last"))
        except InterpreterError as raised:
            caught = [str(raised)]
    assert caught


def test_parameter_gradients_have_16_bytes_for_every_thread() -> None:
    """A tile of fewer than four values a thread is read without 128-bit loads, as a batch of one once was."""
    found = [c for c in triton_kernel.configurations() if c.kernel is triton_kernel.parameter_gradients]
    assert any(c.constants["SAMPLES"] == 1 for c in found)
    for c in found:
        values = c.constants["SAMPLES"] * c.constants["CHUNKS_TILE"] * c.constants["CHANNELS"]
        assert values >= 4 * 32 * c.num_warps, c.name
