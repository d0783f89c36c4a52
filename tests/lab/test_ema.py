"""Averages of weights."""

import math

import pytest
import torch
from torch import nn

from fewstep.lab.ema import Ema, max_decay


def test_average_is_the_recursion_of_the_formula() -> None:
    # Broken: figures are measured on an average that still remembers the random start, or on the last weights.
    network = nn.Linear(2, 1)
    ema = Ema({"student": network}, decay=0.6)
    expected = network.weight.detach().clone().double()
    for n in range(1, 30):
        with torch.no_grad():
            network.weight += 0.1 * n
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * network.weight.detach().double()
        ema.update(n)
    assert torch.allclose(ema.average["student"]["weight"].double(), expected, atol=1e-5)
    ema.copy_to_networks()
    assert torch.equal(network.weight, ema.average["student"]["weight"])


def test_channels_last_weights_and_counters_are_averaged_in_place_of_their_meaning() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    ema = Ema({"n": network}, decay=0.5)
    start = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight.add_(torch.arange(108.0).reshape(4, 3, 3, 3))
        network[1].num_batches_tracked.add_(3)
    ema.update(1000)
    assert torch.allclose(ema.average["n"]["0.weight"], (start + network[0].weight) / 2)
    assert ema.average["n"]["1.num_batches_tracked"] == 3


@pytest.mark.parametrize(("updates", "fraction"), [(4000, 0.05), (200, 0.05), (1000, 0.2)])
def test_half_life_is_the_given_share_of_the_run(updates: int, fraction: float) -> None:
    decay = max_decay(updates, fraction)
    assert math.log(0.5) / math.log(decay) == pytest.approx(updates * fraction)


def test_papers_decay_is_taken_as_it_is() -> None:
    assert max_decay(800_000, 0.05, decay=0.9999) == 0.9999
