"""The ablation of the paper's figure 3, on a mixture whose every quantity is known."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "packages/distill/benchmarks"


@pytest.mark.slow
def test_re_noising_that_forgets_z_t_costs_diversity(monkeypatch):
    # were q(z_s | x~) as good as the posterior, or the posterior drawn wrongly, the claim of figure 3 would not show
    monkeypatch.syspath_prepend(BENCHMARKS)
    renoising = importlib.import_module("renoising")
    grid = renoising.Grid(renoising.SCHEDULE)
    found = {
        kind: renoising.measure(renoising.sampled(renoising.train(grid, kind, 8, 400), 8), grid)
        for kind in ("posterior", "unconditional")
    }
    teacher = renoising.measure(renoising.sampled(grid, 8), grid)
    assert found["posterior"]["modes"] > 24.5 > 24.2 > found["unconditional"]["modes"]
    assert found["posterior"]["distance"] < 0.5 * found["unconditional"]["distance"]
    assert found["posterior"]["distance"] < teacher["distance"]
