"""FSDP2: networks that train in shards of rows over the processes, for those that are too large for one GPU.

Weights, gradients, Adam's state and averages are each split by rows (dimension 0); those of a block are put together
while it computes. What does not train, the teacher, is whole on every process.
"""

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.distill import Method
from fewstep.lab import distributed
from fewstep.lab.parts import part_of


class Shards:
    """The networks of `method` in shards, put in place of the whole ones, which wait on the CPU until `gather`."""

    def __init__(self, method: Method, device: torch.device):
        from torch.distributed.device_mesh import init_device_mesh  # seconds of import that only this needs

        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        self._method, self._device, self._whole = method, device, dict(method.networks)
        for name, network in self._whole.items():
            method.networks[name] = _shard(copy.deepcopy(network.to("cpu")), mesh)

    def gather(self) -> None:
        """Put the whole networks back, with the weights as they are now."""
        for name, network in self._whole.items():
            trained = self._method.networks[name].state_dict()
            network.load_state_dict({key: _whole(value) for key, value in trained.items()})
            self._method.networks[name] = network.to(self._device)


def _shard(network: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    # In-place sums on a block's output would lose its gradient: the blocks of fewstep.models make none.
    warnings.filterwarnings("ignore", ".*returned a view tensor.*", UserWarning)
    network = network.to(memory_format=torch.contiguous_format)  # it shards no other
    for module in [*blocks(network), network]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # the root too: it may be run and not trained on
    return network


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor().cpu() if is_sharded(value) else value  # type: ignore[attr-defined]  # a DTensor


def is_sharded(value: Tensor) -> bool:
    """Whether it is one of FSDP2's, without importing that part of torch."""
    return hasattr(value, "device_mesh")


def local(value: Tensor) -> Tensor:
    """The rows of it that are on this process; the tensor itself where it is whole."""
    found: Tensor = value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]  # a DTensor
    return found


def rows(value: Tensor) -> slice:
    """Which rows of a sharded tensor are on this process."""
    found = part_of(len(value), distributed.rank(), distributed.world_size())
    assert len(local(value)) == found.stop - found.start
    return found


def blocks(network: nn.Module) -> list[nn.Module]:
    """The elements of its lists and dicts of modules, the inner ones first: what is put together as one."""
    return list(_blocks(network))[::-1]


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    holders = nn.ModuleList | nn.ModuleDict
    for module in network.modules():
        if isinstance(module, holders):
            yield from (child for child in module.children() if not isinstance(child, holders))


def recompute_activations(network: nn.Module) -> None:
    """Keep of every block what goes in, and compute the rest again in the backward pass: a third more time."""
    for block in blocks(network):
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)


def keep_activations(network: nn.Module) -> None:
    """Undo `recompute_activations`."""
    for block in blocks(network):
        vars(block).pop("forward", None)
