"""Whole networks on the fused kernels are what they are on plain PyTorch, results and gradients."""

import pytest
import torch
from emulated_cuda import emulated
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [UNet, DiT])
def test_networks_are_as_exact_on_cuda_kernels(kind: type[UNet] | type[DiT]) -> None:
    """In bfloat16, all that its attention takes: as far from float32 as PyTorch's operators are."""
    network = kind.from_preset("debug").eval()
    perturbed(network, std=0.1)
    exact = results(network, "reference")
    with emulated(), torch.autocast("cpu", torch.bfloat16):
        plain, fused = results(network, "reference"), results(network, "cuda")
    for wanted, *found in zip(exact, plain, fused, strict=True):
        usual, error = (float((x - wanted).detach().norm() / wanted.detach().norm()) for x in found)
        assert error < 2 * usual + 1e-3
