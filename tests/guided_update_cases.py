"""Calls of guided_update that reach each of its CUDA kernels, also run under sanitizers."""

import torch
from torch import Tensor

from fewstep.kernels import guided_update
from fewstep.schedules import Cosine, Raw


def run() -> list[Tensor]:
    """Return results and gradients, by vectors and, as 21 x 17 elements ask for it, one by one."""
    g = torch.Generator().manual_seed(0)
    t, s = torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.1])
    found = []
    for shape in ((2, 3, 16, 48), (2, 21, 17)):
        cond, uncond, z, noise = torch.randn(4, *shape, generator=g)
        leaves = [cond.bfloat16().requires_grad_(), uncond.bfloat16().requires_grad_(), z.requires_grad_()]
        raw = Raw(leaves[0], leaves[1], "v")
        moved = guided_update(raw, leaves[2], t, s, Cosine(), t, kind="posterior", noise=noise, clip=(-1, 1))
        found += [moved.detach(), *torch.autograd.grad(moved.square().sum(), leaves)]
    return found
