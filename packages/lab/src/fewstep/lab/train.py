"""The one training loop: any method of `fewstep.distill` (teacher training is one), on one process or many.

Everything random is a function of (seed, update, position in the data): order, noise, times, weights w by the method's
seeds, dropout by a fresh seed for every update. A resumed run therefore needs no generator states to be the run that it
would have been, and any number of processes makes the same draws.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fewstep.distill import Batch, InstantMomentMatching, Method, TargetMethod
from fewstep.lab import distributed
from fewstep.lab.budget import Budget, write_updates
from fewstep.lab.checkpoint import load_latest, save_checkpoint, save_index, save_part
from fewstep.lab.config import ConfigError, TrainingConfig
from fewstep.lab.context import Interrupted, unfenced
from fewstep.lab.data import Order, Split
from fewstep.lab.ema import max_decay
from fewstep.lab.fsdp import Shards, is_sharded, keep_activations, local, recompute_activations
from fewstep.lab.journal import Journal
from fewstep.lab.state import State, checkpoint_of, clip_, fresh_state, load_state
from fewstep.lab.stored import TargetStore

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Updates between two agreements of several processes on whether to stop: each costs them a round trip.
AGREE_EVERY = 8
# Updates of one optimiser in a row that are skipped for a loss or gradient that is not finite, before training stops.
PATIENCE = 3


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line and names the update."""


def learning_rate(options: TrainingConfig, update: int, updates: int) -> float:
    """The rate of `update` (from 0): linear warm-up times an anneal that is exactly 0 at `update == updates`."""
    warm = min(1.0, (update + 1) / options.warmup) if options.warmup else 1.0
    left = 1 - update / updates
    anneal = {"none": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[options.anneal]
    return options.lr * warm * anneal


class _Loss(nn.Module):
    """A method's loss as a module, for DDP: its hooks then meet every trained weight, the embedding of w included."""

    def __init__(self, method: Method):
        super().__init__()
        self._method = [method]  # in a list: the teacher must not become a part of the module
        self.networks = nn.ModuleDict(method.networks)

    def forward(self, batch: Batch, step: int, targets: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if targets is None:
            return self._method[0].loss(batch, step)
        return cast(TargetMethod, self._method[0]).loss(batch, step, targets)


class Trainer:
    """Trains the networks of `method` on `split` for `updates`, from the last checkpoint in `out` if there is one.

    seed: of this stage; label: its name on the screen. stored: targets that were computed before. The
    weights are to be read after `run` and `finish`.
    """

    def __init__(
        self,
        method: Method,
        split: Split,
        options: TrainingConfig,
        *,
        updates: int,
        seed: int,
        out: Path,
        device: torch.device,
        label: str = "train",
        console: Console | None = None,
        stopping: Callable[[], bool] = lambda: False,
        fence: Callable[[], None] = unfenced,
        stored: TargetStore | None = None,
        bar: bool = True,
        tensorboard: bool = False,
    ):
        self.method, self.options, self.updates, self.seed, self.out = method, options, updates, seed, out
        self.device, self.label, self.console, self.stopping = device, label, console or Console(), stopping
        self.fence, self.stored = fence, stored
        self._shown = {"bar": bar, "tensorboard": tensorboard}
        even = 2 if isinstance(method, InstantMomentMatching) else 1
        self.parts = parts_of(options, distributed.world_size(), f"stages.{label}", even)
        self.split = split.to(device)
        sharded = options.parallel == "fsdp" and distributed.world_size() > 1
        self._shards = Shards(method, device) if sharded else None
        for network in method.networks.values():
            network.train()
            if options.activation_checkpointing:
                recompute_activations(network)
        self.order = Order(len(split), options.batch_size, seed)
        self.state = fresh_state(method, options, updates, device)
        self._announced = 0  # updates whose batches the split expects
        self._loss = _Loss(method) if sharded else _parallel(_Loss(method), device)
        # The update at which patience ended, or -1: a tensor, so that looking at it can wait.
        self._broken = torch.full((), -1, dtype=torch.int64, device=device)

    def run(self) -> State:
        """Do the updates that are left; the result is bit for bit that of an uninterrupted run.

        Raises:
            Interrupted: asked to stop; the state is saved.
            TrainingError: loss or gradient not finite in `PATIENCE` updates of one optimiser in a row; the last
                checkpoint is kept. Fewer such updates are skipped and counted.
        """
        budget = None if self.options.seconds is None else Budget(self.options.seconds, self.device)
        self._restore()
        state, self._saved, self._logged = self.state, time.monotonic(), (self.state.step, time.monotonic())
        self._skipped = int(state.skips.total)
        with self._journal() as journal:
            while state.step < self.updates:
                self.update()
                if budget is not None and state.settled is None:
                    self._settle(budget.updates(state.step, self.updates), journal)
                last = state.step == self.updates
                if last or state.step % self.options.log_every == 0:
                    self._log(journal)
                stop, late = self._agree(self.stopping, self._late)
                every = self.options.checkpoint_updates
                if last or stop or late or (every and state.step % every == 0):
                    self._save()
                if stop:
                    raise Interrupted(f"{self.label}: saved after update {state.step} of {self.updates}")
        return state

    def _settle(self, updates: int | None, journal: Journal) -> None:
        """From now on there are so many updates, once that is known; learning rate and averages go by them."""
        if updates is None:
            return
        self.state.settled = updates
        self._go_by(updates)
        journal.expect(updates)
        if distributed.is_main():
            self.fence()
            write_updates(self.out, updates, self.options)

    def _go_by(self, updates: int) -> None:
        self.updates = updates
        if self.state.ema is not None:
            self.state.ema.decay = max_decay(updates, self.options.ema_half_life, self.options.ema_decay)

    def finish(self) -> None:
        """Leave `method.networks` whole, with the weights to keep: the averages if there are any."""
        if self.state.ema is not None:
            self.state.ema.copy_to_networks()
        if self._shards is not None:
            self._shards.gather()
        for network in self.method.networks.values():
            keep_activations(network)

    def update(self) -> None:
        """One optimiser update on the next batch."""
        n, options, state = self.state.step, self.options, self.state
        batch = self.draw(n)
        name = self.method.active(n)
        optimizer = state.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, n, self.updates)
        optimizer.zero_grad(set_to_none=True)
        logs = self._backward(batch, n)
        state.scaler.unscale_(optimizer)
        norm = clip_(optimizer, options.grad_clip)
        good = torch.isfinite(norm)
        if not state.scaler.is_enabled():  # else it does the same
            optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]  # fused Adam then leaves all as it is
        state.scaler.step(optimizer)
        state.scaler.update()
        state.step = n + 1
        if state.ema is not None:
            state.ema.update(state.step)
        state.meter.add({**logs, "grad_norm": norm}, good)
        # fp16 gradients overflow by design: the scaler lowers its scale, and only the loss tells of trouble.
        self._watch(name, torch.isfinite(logs["loss"]) if self.options.precision == "fp16" else good)

    def draw(self, n: int) -> Batch:
        """This process's share of the batch of update `n`."""
        rank, world = distributed.rank(), distributed.world_size()
        torch.manual_seed(mix(self.seed, n, rank))  # what dropout draws from
        self._expect(n, rank, world)
        positions = self._positions(n, rank, world)
        seeds = self.order.seeds(positions).to(self.device)
        x, cond = self.split.take(self.order.indices(positions), seeds)
        return self.method.draw(x, cond, seeds, n)

    def _expect(self, n: int, rank: int, world: int) -> None:
        """Announce the batches of this and the next updates to a split that reads files."""
        last = min(n + self.split.ahead, self.updates)
        for later in range(max(n, self._announced), last):
            self.split.expect(self.order.indices(self._positions(later, rank, world)))
        self._announced = max(last, self._announced)

    def _positions(self, n: int, rank: int, world: int) -> Tensor:
        """Places in the stream of samples; stored targets are met again from the first once all were."""
        positions = self.order.positions(n, rank, world)
        return positions if self.stored is None else positions % self.stored.count

    def _targets(self, n: int, parts: list[Batch]) -> list[Tensor | None]:
        """Targets of each part of this process's share of the batch; None where they are to be computed."""
        if self.stored is None:
            return [None] * len(parts)
        found = self.stored.read(self._positions(n, distributed.rank(), distributed.world_size())).to(self.device)
        size = len(parts[0])
        return [found[i * size : (i + 1) * size] for i in range(len(parts))]

    def _backward(self, batch: Batch, n: int) -> dict[str, Tensor]:
        """Gradients of the mean loss over the batch, in `parts` parts; returns the means of what is logged."""
        parts = batch.chunk(self.parts)
        targets = self._targets(n, parts)
        total: dict[str, Tensor] = {}
        for i, (part, target) in enumerate(zip(parts, targets, strict=True)):
            with self._sync(last=i == len(parts) - 1):
                with self._autocast():
                    loss, logs = self._loss(part, n, target)
                torch.autograd.backward(self.state.scaler.scale(_spoilt_if_broken(loss) / len(parts)))
            for name, value in {**logs, "loss": loss.detach()}.items():
                total[name] = total.get(name, 0) + value / len(parts)
        return total

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.options.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients travel between processes once an update, with the last part."""
        if last or not isinstance(self._loss, DistributedDataParallel):
            return nullcontext()
        return self._loss.no_sync()

    def _watch(self, optimizer: str, good: Tensor) -> None:
        ended = self.state.skips.count(optimizer, good) >= PATIENCE
        self._broken = torch.where((self._broken < 0) & ended, self.state.step, self._broken)
        if self.device.type == "cpu":
            self._check_finite()

    def _check_finite(self) -> None:
        broken = int(self._broken)
        if broken >= 0:
            raise TrainingError(
                f"{self.label}: loss or gradient not finite {PATIENCE} times in a row, at update {broken} of "
                f"{self.updates} again; the checkpoints before it are kept in {self.out / 'checkpoints'}; "
                "try a lower lr or precision=fp32"
            )

    def _agree(self, *questions: Callable[[], bool]) -> list[bool]:
        """Whether any process says yes to each; where there are several, they are asked every `AGREE_EVERY` updates."""
        if distributed.world_size() > 1 and self.state.step % AGREE_EVERY:
            return [False] * len(questions)
        return distributed.any_process([ask() for ask in questions], self.device)

    def _late(self) -> bool:
        seconds = self.options.checkpoint_seconds
        return bool(seconds) and time.monotonic() - self._saved >= seconds

    def _journal(self) -> Journal:
        silent = not distributed.is_main()
        return Journal(self.out, self.console, self.label, self.updates, self.state.step, silent=silent, **self._shown)

    def _log(self, journal: Journal) -> None:
        self._check_finite()
        (step, then), self._logged = self._logged, (self.state.step, time.monotonic())
        speed = (self.state.step - step) * self.options.batch_size / max(self._logged[1] - then, 1e-9)
        rate = learning_rate(self.options, self.state.step - 1, self.updates)
        skipped = int(self.state.skips.total)
        counted = {"skipped": skipped, "unreadable": self.split.unreadable}
        if skipped > self._skipped:
            text = f"{self.label}  {skipped} updates skipped so far: loss or gradient not finite"
            self.console.print(text, style="yellow", highlight=False)
        self._skipped = skipped
        if distributed.is_main():
            self.fence()
        journal.write(self.state.step, {**self.state.meter.means(), "lr": rate, **_not_zero(counted)}, speed)

    def _save(self) -> None:
        self._check_finite()
        self._saved = time.monotonic()
        folder, found = self.out / "checkpoints", checkpoint_of(self.state)
        main, rank, world = distributed.is_main(), distributed.rank(), distributed.world_size()
        split = [name for name, tensor in found.tensors.items() if is_sharded(tensor)]
        with distributed.together(self.device):
            if main:
                self.fence()
            if split:
                mine = found.tensors if main else split
                save_part(folder, found.step, {name: local(found.tensors[name]) for name in mine}, rank, world)
        with distributed.together(self.device):
            if main and split:
                save_index(folder, found, split, world)
            elif main:
                save_checkpoint(folder, found)

    def _restore(self) -> None:
        distributed.barrier()  # nobody reads while the first process may still write from a call before
        found = load_latest(self.out / "checkpoints", lambda text: self.console.print(text, style="yellow"))
        if found is not None:
            load_state(self.state, found)
            if self.state.settled is not None:
                self._go_by(self.state.settled)
            if self.state.step < self.updates:
                text = f"{self.label}  going on after update {found.step} of {self.updates}"
                self.console.print(text, highlight=False)


def _not_zero(counted: dict[str, int]) -> dict[str, float]:
    return {name: float(count) for name, count in counted.items() if count}


def parts_of(options: TrainingConfig, world: int, key: str = "", even: int = 1) -> int:
    """In how many equal parts each of `world` processes computes its share of a batch, one after the other.

    `accumulate`, or as many more as `micro_batch` asks for: so an update's batch stays what it is on fewer GPUs.
    even: what the size of a part must be a multiple of.

    Raises:
        ConfigError: the batch cannot be shared like that; names `key`, the stage.
    """
    whole, limit = options.batch_size, options.micro_batch or options.batch_size
    if whole % (world * options.accumulate):
        many = f"{world} processes x accumulate={options.accumulate}"
        right = f"a multiple of {world * options.accumulate} ({many})"
        raise ConfigError(f"{key}.batch_size={whole}: must be {right}")
    share = whole // world
    for size in range(min(limit, share // options.accumulate), 0, -1):
        if share % size == 0 and size % even == 0:
            return share // size
    raise ConfigError(f"{key}.batch_size={whole}: the share of each of {world} processes, {share}, must be even")


def _spoilt_if_broken(loss: Tensor) -> Tensor:
    """The loss such that, if it is not finite, no gradient is: each process then sees that one of them failed."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def mix(*numbers: int) -> int:
    """A seed in [0, 2^63) from several numbers; different ones for all practical purposes."""
    seed = 0
    for number in numbers:
        seed = ((seed ^ number) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % 2**64
        seed ^= seed >> 29
    return seed % 2**63


def _parallel(loss: _Loss, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return loss
    # Methods with several networks train one of them at a time: the others' weights then get no gradient.
    several = len(loss.networks) > 1
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(loss, device_ids=ids, find_unused_parameters=several)
