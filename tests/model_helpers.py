"""Small networks for the tests of models, and how they get weights that are not zero."""

from typing import Any

import torch
from torch import nn

from fewstep.models import DiT, Network, NetworkDenoiser, UNet
from fewstep.schedules import Cosine

TYPES: dict[str, type[Network]] = {"UNet": UNet, "DiT": DiT}


def perturbed(module: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """The same module with noise on every parameter, so that nothing is hidden behind a zero initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=std)
    return module


def tiny(kind: str, **overrides: Any) -> Network:
    """The debug preset with noise on every parameter, in eval mode."""
    torch.manual_seed(0)
    network = TYPES[kind].from_preset("debug", **overrides)
    perturbed(network)
    return network.eval()


def small_dit(**overrides: Any) -> DiT:
    """A DiT of one block of 16 channels, every weight of which is random."""
    network = DiT.from_preset("debug", width=16, depth=1, heads=1, **overrides)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.2)
    return network


def denoiser(kind: str, **overrides: Any) -> NetworkDenoiser:
    """A v-predicting denoiser around `tiny`, under the cosine schedule."""
    return NetworkDenoiser(tiny(kind, **overrides), Cosine(), "v").eval()


def batch(size: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z, t, y) for the debug presets."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(size, 1, 8, 8, generator=generator, dtype=dtype)
    return z, torch.linspace(0.1, 0.9, size, dtype=dtype), torch.arange(size) % 11
