"""A denoiser as a function of its parameters: values, the gradient of its loss, its output's change along a direction.

Nothing here changes the module: parameters are passed in by `torch.func.functional_call`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from fewstep.distill.common import Weighting
from fewstep.schedules import Cond, Schedule

Parameters = Mapping[str, Tensor]


def values(module: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> value, without history."""
    return {name: p.detach() for name, p in module.named_parameters()}


def loss_gradient(
    denoiser: nn.Module,
    parameters: Parameters,
    weighting: Weighting,
    x: Tensor,
    z: Tensor,
    t: Tensor,
    cond: Cond,
    modify: Callable[[Tensor], Tensor] = lambda estimate: estimate,
) -> dict[str, Tensor]:
    """The gradient by the parameters of w(t) ||x - modify(g(z_t))||^2, modify passed straight through.

    Shape: x, z (B, ...), t (B,), cond leaves (B, ...) -> name -> like that parameter.
    """
    schedule: Schedule = denoiser.schedule  # type: ignore[assignment]  # nn.Module types attributes as modules
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with torch.enable_grad():
        estimate = functional_call(denoiser, leaves, (z, t, cond))
        straight = estimate + (modify(estimate.detach()) - estimate.detach())
        loss, _ = weighting(straight, x, schedule.log_snr(t))
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def directional(
    denoiser: nn.Module, parameters: Parameters, direction: Parameters, z: Tensor, t: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    """g(z_t) and its derivative along a direction of parameters, without history. Shape: -> (B, ...), (B, ...).

    Dual numbers themselves, which `torch.func.jvp` wraps: the same bits in 0.8 of its time.

    Raises:
        RuntimeError: the network's output has no tangent, since an operation drops them.
    """
    forward: Any = forward_ad  # torch has no types here
    with torch.no_grad(), forward.dual_level():
        duals = {name: forward.make_dual(value, direction[name]) for name, value in parameters.items()}
        found, derivative = forward.unpack_dual(functional_call(denoiser, duals, (z, t, cond)))
    if derivative is None:
        raise RuntimeError(f"{type(denoiser).__name__} has no derivative in forward mode: an operation drops tangents")
    return found, derivative


def mean_over_processes(tensors: Parameters) -> dict[str, Tensor]:
    """The mean over the processes of torch.distributed, as one message; the same tensors where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return dict(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = torch.split_with_sizes(flat, [tensor.numel() for tensor in tensors.values()])
    return {name: part.view_as(tensors[name]) for name, part in zip(tensors, parts, strict=True)}


def refuse_sharded(name: str, module: nn.Module) -> None:
    """Raise ValueError if a parameter lives in shards on several processes."""
    for parameter_name, parameter in module.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor, without importing that part of torch
            raise ValueError(f"{name}.{parameter_name} is sharded (FSDP2): the parameter-space form needs DDP")
