"""The Triton kernels in the strict interpreter: every tile, the order of programs, and bugs planted in them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import FAR_BELOW_ZERO, Case, excesses, inputs, results
from mutants import mutant
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder

from fewstep.kernels.attention import fused, triton_kernel
from fewstep.kernels.attention.triton_kernel import BLACKWELL, EARLIER, FORWARD, HOPPER, KEYS, QUERIES, Tile

pytestmark = pytest.mark.usefixtures("unset_is_nan")


def triton(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    return fused.forward(q, k, v, scale, key_lengths, "triton")


STEPS = (FORWARD, QUERIES, KEYS)
TILES = {
    (dim, tuple(table[step][dim][size] for step in STEPS))
    for dim in fused.DIMS for table in (EARLIER, HOPPER, BLACKWELL) for size in (0, 1)
}


@pytest.mark.parametrize(("dim", "tiles"), sorted(TILES, key=str))
def test_every_tile(dim: int, tiles: tuple[Tile, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with whole tiles and a rest, on both sides; a tile that only runs on some chip is run here too."""
    monkeypatch.setattr(triton_kernel, "_tile", lambda step, q, rows, pairs: tiles[STEPS.index(step)])
    assert not excesses(triton, Case(heads=1, queries=133, keys=133, dim=dim, dtype=torch.bfloat16))


def test_tiles_are_smaller_where_programs_are_few() -> None:
    """A GPU of 132 processors is half idle with 48 programs; short sequences would fill half of a large tile."""
    q = torch.empty(1, 6, 1024, 64, dtype=torch.bfloat16)
    many, few = HOPPER[FORWARD][64]
    assert triton_kernel._tile(FORWARD, q, 1024, 64 * 6) == many
    assert triton_kernel._tile(FORWARD, q, 1024, 6) == few
    assert triton_kernel._tile(FORWARD, q, 64, 64 * 12) == few
    assert triton_kernel._tile(KEYS, q, 77, 8 * 20) == HOPPER[KEYS][64][0]
    assert triton_kernel._tile(QUERIES, q.float(), 1024, 384) == Tile(32, 16, 4, 1)


def test_same_bits_in_whatever_order_programs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU runs them in any order; training that is resumed must repeat itself bit for bit."""
    case = Case(queries=70, keys=70, dim=32, dtype=torch.bfloat16)
    first = results(triton, case, inputs(case))
    placed = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: placed(self, self.grid_dim[0] - 1 - x, y, z)
    )
    assert all(torch.equal(a, b) for a, b in zip(results(triton, case, inputs(case)), first, strict=True))


PADDED = Case(batch=2, heads=1, queries=70, keys=77, dim=72, dtype=torch.bfloat16, lengths=(66, 5))
SHORT = Case(queries=3, keys=5, dim=32)
BUGS = {
    "keys beyond the length count": (
        '< left)[None, :], scores, float("-inf"))', ">= 0)[None, :], scores, 0.0)", PADDED
    ),
    "their weights overflow": (
        "d_scores = tl.where((tl.arange(0, BLOCK_N) < left)[None, :], d_scores, 0.0)", "d_scores = d_scores",
        FAR_BELOW_ZERO,
    ),
    "padded keys get a gradient": ("tl.arange(0, BLOCK_N) < length)[", "tl.arange(0, BLOCK_N) < keys)[", PADDED),
    "no rest of the columns": ("tl.dot(a_rest, tl.trans(b_rest)", "tl.dot(a_rest * 0, tl.trans(b_rest)",
                               replace(PADDED, dtype=torch.float16)),
    "weights are not scaled down": ("weight = weight * shrink + tl.sum", "weight = weight + tl.sum", PADDED),
    "values are not scaled down": ("total = total * shrink[:, None]", "total = total * 1.0", PADDED),
    "a rounding too many": ("scores * scale2 - new_peak[:, None]",
                            "scores.to(k.dtype).to(tl.float32) * scale2 - new_peak[:, None]",
                            replace(PADDED, magnitude=8.0)),
    "log-sum-exp of base 2": ("(peak + tl.log2(weight)) * LN2", "(peak + tl.log2(weight))", PADDED),
    "no scale in dq": ("total * scale, total_rest * scale", "total, total_rest * scale", PADDED),
    "the log-sum-exp's gradient": ("row_delta -= lse_counts *", "row_delta += lse_counts *", PADDED),
    "a tile of queries twice": ("in range(0, whole, BLOCK_M):", "in range(0, whole + 1, BLOCK_M):", PADDED),
    "rows of the next sample": ("(rows < left)", "(rows < left + 1)", PADDED),
    "unset lanes": ("mask=exists, other=0.0)\n    else:", "mask=exists)\n    else:", PADDED),
    "programs write one row": ("% tiles * BLOCK,", "% tiles * (BLOCK - 1),", PADDED),
    "the head's stride": ("head * head_stride", "head * 2 * head_stride", replace(PADDED, heads=2)),
    "chunks overlap": ("range(0, DIM, CHUNK):", "range(0, DIM, CHUNK // 2):", SHORT),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these tests' means must see what it is there for: numbers, bounds, races, lanes never set."""
    right, wrong, case = BUGS[bug]
    kernels = mutant(triton_kernel, tmp_path, (right, wrong))
    monkeypatch.setattr(fused, "_kernels", lambda backend: kernels)
    try:
        caught = excesses(triton, case)
    except InterpreterError as raised:
        caught = [str(raised)]
    assert caught
