"""Draws on the GPU against the same draws on the CPU."""

import pytest
import torch

from fewstep.schedules import sample_seeds, seeded_noise, seeded_uniform

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(("draw", "shape"), [(seeded_uniform, (5,)), (seeded_noise, (3, 9, 7))])
def test_draws_are_bitwise_those_of_the_cpu(draw, shape) -> None:
    """Targets stored by one kind of machine would be wrong for a student that trains on another."""
    seeds = sample_seeds(run_seed=7, update=3, indices=torch.arange(33))
    assert torch.equal(draw(seeds.cuda(), shape).cpu(), draw(seeds, shape))
