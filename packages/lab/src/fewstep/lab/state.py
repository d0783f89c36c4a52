"""What a training update changes, and its way into a checkpoint and back."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill import Method
from fewstep.lab import distributed
from fewstep.lab.checkpoint import Checkpoint, CheckpointError
from fewstep.lab.config import TrainingConfig
from fewstep.lab.ema import Ema, max_decay
from fewstep.lab.fsdp import is_sharded, local, rows


@dataclass
class State:
    """What an update changes, and so what a checkpoint holds. `step`: updates done; settled: how many there are to be,
    where that is not the config's to say (see `fewstep.lab.budget`).
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema | None
    scaler: torch.amp.GradScaler
    meter: "Meter"
    skips: "Skips"
    step: int = 0
    settled: int | None = None


class Meter:
    """Sums of what the loss logs since the last line of metrics, kept on the device: reading one would wait for it."""

    def __init__(self, device: torch.device):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}
        self.device = device

    def add(self, logs: dict[str, Tensor], good: Tensor) -> None:
        """Take in the values of one update, unless it was skipped: `good` () bool."""
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(good, value, torch.zeros_like(value))
            self.counts[name] = self.counts.get(name, 0) + good.long()

    def means(self) -> dict[str, float]:
        """The means over updates and processes, NaN where all were skipped; the sums start anew."""
        found = {name: float(distributed.mean(value / self.counts[name])) for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return found


class Skips:
    """Updates skipped because their loss or gradient was not finite, on the device like the sums of `Meter`.

    total: of all. in_row: by optimiser, those since its last good update; networks that take turns fail on their own.
    """

    def __init__(self, names: Iterable[str], device: torch.device):
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.in_row = {name: torch.zeros_like(self.total) for name in names}

    def count(self, name: str, good: Tensor) -> Tensor:
        """Take in an update of that optimiser, `good` () bool; returns how many of its last ones were skipped."""
        self.total = self.total + ~good
        self.in_row[name] = torch.where(good, torch.zeros_like(self.total), self.in_row[name] + 1)
        return self.in_row[name]


def fresh_state(method: Method, options: TrainingConfig, updates: int, device: torch.device) -> State:
    """The state before the first update."""
    groups = method.param_groups()
    averaged = options.ema_half_life > 0 or options.ema_decay is not None
    decay = max_decay(updates, options.ema_half_life, options.ema_decay) if averaged else 0.0
    return State(
        networks=dict(method.networks),
        optimizers={name: _adam(group, options) for name, group in groups.items()},
        ema=Ema(method.networks, decay) if averaged else None,
        scaler=torch.amp.GradScaler(device.type, enabled=options.precision == "fp16"),
        meter=Meter(device),
        skips=Skips(groups, device),
    )


def _adam(groups: list[dict[str, Any]], options: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, which without weight decay is Adam; its fused form does all tensors in one call on CPU and CUDA alike."""
    first, second = options.betas
    decay = options.weight_decay
    return torch.optim.AdamW(groups, options.lr, (first, second), options.eps, decay, fused=True)


def clip_(optimizer: torch.optim.Optimizer, limit: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to `limit` if beyond it."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = nn.utils.clip_grad_norm_(weights, math.inf if limit is None else limit)
    return norm.full_tensor() if is_sharded(norm) else norm  # type: ignore[attr-defined]  # a DTensor


def checkpoint_of(state: State) -> Checkpoint:
    """The state as it is saved, the same on every process but for the rows of what is sharded."""
    skipped = {"total": int(state.skips.total), **{f"in_row/{k}": int(v) for k, v in state.skips.in_row.items()}}
    counts = {name: int(count) for name, count in state.meter.counts.items()}
    meta = {"scaler": state.scaler.state_dict(), "counts": counts, "skipped": skipped, "settled": state.settled}
    return Checkpoint(state.step, dict(_tensors(state)), meta)


def _tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    for name, network in state.networks.items():
        yield from ((f"network/{name}/{key}", value) for key, value in network.state_dict().items())
    for name, optimizer in state.optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            yield from ((f"optimizer/{name}/{index}/{key}", value) for key, value in values.items())
    if state.ema is not None:
        for name, average in state.ema.average.items():
            yield from ((f"ema/{name}/{key}", value) for key, value in average.items())
    yield from ((f"sum/{name}", distributed.mean(value.clone())) for name, value in state.meter.sums.items())


def load_state(state: State, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors where `checkpoint_of` took them from.

    Raises:
        CheckpointError: they are those of other networks.
    """
    try:
        for name, network in state.networks.items():
            _load(network.state_dict(), checkpoint, f"network/{name}/")
        for name, optimizer in state.optimizers.items():
            _load_optimizer(optimizer, checkpoint, f"optimizer/{name}/")
        if state.ema is not None:
            for name, average in state.ema.average.items():
                _load(average, checkpoint, f"ema/{name}/")
    except (RuntimeError, KeyError, IndexError) as error:
        what = f"checkpoint of update {checkpoint.step}"
        raise CheckpointError(f"{what}: not of these networks ({_brief(error)})") from error
    device, tensors = state.meter.device, checkpoint.tensors
    state.meter.sums = {name: tensors[f"sum/{name}"].to(device) for name in _names(checkpoint, "sum/")}
    state.meter.counts = checkpoint.meta["counts"]
    state.scaler.load_state_dict(checkpoint.meta["scaler"])
    for name, count in checkpoint.meta.get("skipped", {}).items():
        (state.skips.total if name == "total" else state.skips.in_row[name.removeprefix("in_row/")]).fill_(count)
    state.step, state.settled = checkpoint.step, checkpoint.meta.get("settled")


def _load(values: dict[str, Tensor], checkpoint: Checkpoint, prefix: str) -> None:
    """Fill `values` from the tensors called `prefix` and their name, of which there must be no others."""
    differ = set(_names(checkpoint, prefix)) ^ values.keys()
    if differ:
        raise KeyError(f"{prefix}{min(differ)}")
    for key, value in values.items():
        _fill(value, checkpoint, prefix + key)


@torch.no_grad()
def _fill(value: Tensor, checkpoint: Checkpoint, name: str) -> None:
    """Copy a saved tensor into `value`, or the rows of it that are on this process."""
    if checkpoint.shape(name) != tuple(value.shape):
        raise RuntimeError(f"{name}: {checkpoint.shape(name)} instead of {tuple(value.shape)}")
    local(value).copy_(checkpoint.rows(name, rows(value)) if is_sharded(value) else checkpoint.tensors[name])


def _load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, prefix: str) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    values: dict[int, dict[str, Tensor]] = {}
    for key in _names(checkpoint, prefix):
        index, name = key.split("/")
        weight = weights[int(index)]
        if checkpoint.shape(prefix + key) == tuple(weight.shape):
            # In the weight's own memory format (channels_last, say): fused updates walk memory, not indices.
            value = torch.empty_like(weight)
            _fill(value, checkpoint, prefix + key)
        else:
            value = checkpoint.tensors[prefix + key]
        values.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})


def _names(checkpoint: Checkpoint, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)]


def _brief(error: Exception) -> str:
    return str(error).split("\n")[-1].strip()
