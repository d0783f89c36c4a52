"""Whole networks on the fused kernels are what they are on plain PyTorch, results and gradients."""

import pytest
import torch
from model_helpers import batch, perturbed
from torch import Tensor, nn

from fewstep.kernels import use_backend
from fewstep.models import DiT, UNet


def results(network: nn.Module, backend: str) -> list[Tensor]:
    z, t, y = batch()
    with use_backend(backend):
        output = network(z, 1000 * t, y)
        return [output, *torch.autograd.grad(output.square().sum(), list(network.parameters()))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [UNet, DiT])
def test_networks_are_the_same_on_fused_kernels(kind: type[UNet] | type[DiT]) -> None:
    """A wrong argument at one call site, as scale for shift, would train another network on a GPU than on a CPU."""
    network = kind.from_preset("debug").eval()
    perturbed(network, std=0.1)
    for plain, fused in zip(results(network, "reference"), results(network, "triton"), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4 * float(plain.detach().abs().max()) + 1e-7)
