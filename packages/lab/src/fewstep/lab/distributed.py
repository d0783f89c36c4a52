"""One process or many: what the rest of the lab needs to know of torchrun."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from fewstep.lab.config import ConfigError

# Stages that only the first process works on (evaluation) may last hours while the others wait at a barrier.
PATIENCE = timedelta(days=1)


def start(device: torch.device, store: dist.Store | None = None) -> None:  # type: ignore[name-defined]  # as in a torch without it
    """Join the group that torchrun announces in the environment; nothing where there is none.

    store: where its processes meet, if not at torchrun's address.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        return
    where = {} if store is None else {"store": store, "rank": int(os.environ["RANK"]), "world_size": world}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, **where)


def stop() -> None:
    """Leave the group, if there is one.

    Sharded networks hold it, and one that nobody else holds any more but itself, as after an error, may hold it until
    Python ends: gloo then aborts the process ("terminate called without an active exception").
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()


def any_process(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Whether each of `flags` holds on any process, the same answer for all: a round trip where there are several."""
    if not dist.is_initialized():
        return list(flags)
    values = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


class OtherProcessError(RuntimeError):
    """What this process did went well, what another one did at the same time did not."""


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """What raises within on one process raises on all: nobody goes on, or waits for one that is gone.

    Raises:
        OtherProcessError: on processes that did not fail themselves.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    (any_failed,) = any_process([failed is not None], device)
    if failed is not None:
        raise failed
    if any_failed:
        raise OtherProcessError("another process of the job failed; its log says why")


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over processes of `values`, any shape, changed in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= world_size()
    return values


def pick_device(name: str) -> torch.device:
    """The torch device that `device=name` means here; under torchrun each process takes the GPU of its local rank.

    Raises:
        ConfigError: not a device, or one that this machine lacks.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"device={name}: must be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            present = torch.cuda.device_count()
            raise ConfigError(f"device={name}: this machine has {present} CUDA devices; use device=cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device
