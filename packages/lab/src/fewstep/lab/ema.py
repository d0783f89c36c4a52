"""Exponential moving averages of weights."""

import torch
from torch import Tensor, nn

from fewstep.lab.fsdp import local


def max_decay(updates: int, half_life: float, decay: float | None = None) -> float:
    """The decay d that a run of `updates` approaches: its half-life is that fraction of the run, unless given itself.

    half_life: in (0, 1], a fraction of the run. decay: in [0, 1), the papers' fixed 0.9999, in place of half_life.
    """
    if decay is not None:
        return decay
    return float(0.5 ** (1 / max(half_life * updates, 1.0)))


class Ema:
    """Averages of the floating-point weights of some networks; everything else (counters) is copied.

    After update n (from 1) the average moves by 1 - min(decay, (1 + n) / (10 + n)) towards the weights, so that the
    random start is forgotten within the first few updates.
    """

    def __init__(self, networks: dict[str, nn.Module], decay: float):
        self.decay = decay
        self._networks = networks
        self.average = {
            name: {key: value.clone() for key, value in _state(network).items()} for name, network in networks.items()
        }

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Take in the weights as they are after update `n`, counted from 1."""
        decay = min(self.decay, (1 + n) / (10 + n))
        for name, network in self._networks.items():
            average, weights = self.average[name], _state(network)
            floats = [key for key, value in weights.items() if value.is_floating_point()]
            # One fused call for all tensors: a loop over hundreds of small ones costs more than the arithmetic.
            old, new = ([local(tensors[key]) for key in floats] for tensors in (average, weights))
            torch._foreach_lerp_(old, new, 1 - decay)
            for key in weights.keys() - set(floats):
                average[key].copy_(weights[key])

    @torch.no_grad()
    def copy_to_networks(self) -> None:
        """Replace the networks' weights by their averages."""
        for name, network in self._networks.items():
            for key, value in _state(network).items():
                value.copy_(self.average[name][key])


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in network.state_dict(keep_vars=True).items()}
