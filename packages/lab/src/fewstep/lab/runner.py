"""Walks the stages of an experiment: skips the finished, goes on with the half done, refuses to mix configs."""

import fcntl
import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from fewstep.lab import distributed, record
from fewstep.lab.cluster.attempt import Attempt, Superseded
from fewstep.lab.config import Config, ConfigError, TrainingConfig
from fewstep.lab.context import Interrupted, StageContext, unfenced
from fewstep.lab.networks import build_denoiser
from fewstep.lab.pretrained import brings_own_network
from fewstep.lab.signals import StopFlag, stop_on_signals
from fewstep.lab.validate import stage_order, untrained_weights


def run_experiment(
    config: Config,
    *,
    until: str | None = None,
    strict: bool = False,
    console: Console,
    store: dist.Store | None = None,  # type: ignore[name-defined]  # as in a torch without it
) -> int:
    """Do the stages that are not done, up to and with `until`; returns the exit code, 128 + signal if interrupted.

    store: where several processes meet, if not at torchrun's address.

    Raises:
        ConfigError: before any compute: a device that is not there, a folder made with another config, another run
            at work in the folder. With `strict`, also what is otherwise a warning.
    """
    names = _stages(config, until)
    device = distributed.pick_device(config.device)
    _set_up(config, device)
    distributed.start(device, store)
    try:
        _say_if_untrained(config, names, console, strict)
        with locked(Path(config.out)), stop_on_signals() as stop:
            for name in names:
                record.refuse_mixing(config, name, Path(config.out) / name)
            return _walk(config, names, device, console, stop, strict)
    finally:
        distributed.stop()


def run_stage(
    config: Config,
    name: str,
    attempt: Attempt,
    stop: StopFlag,
    console: Console,
    store: dist.Store | None = None,  # type: ignore[name-defined]  # as in a torch without it
) -> int:
    """Do one stage as a job of its own; returns the exit code, 128 + signal if interrupted.

    The folder is `attempt`'s until a newer one claims it, and takes no lock: one of a process that a lost node left
    behind would keep its successor out.

    Raises:
        ConfigError: a stage that it needs is not done, or the folder was made with another config.
        Superseded: a newer attempt has the folder.
    """
    out = Path(config.out)
    device = distributed.pick_device(config.device)
    _set_up(config, device)
    missing = [need for need in config.stages[name].needs if not record.is_done(out / need)]
    if missing:
        raise ConfigError(f"stages.{name}.needs={missing}: not done in {out}; run them first")
    record.refuse_mixing(config, name, out / name)
    distributed.start(device, store)
    try:
        if distributed.is_main() and not record.is_done(out / name):
            attempt.claim(out / name)
        return _walk(config, [name], device, console, stop, strict=False, fence=partial(attempt.check, out / name))
    finally:
        distributed.stop()


def _stages(config: Config, until: str | None) -> list[str]:
    if not brings_own_network(config):
        build_denoiser(config, config.network)  # the network's config is checked here, before anything runs
    order = stage_order(config)
    if until is None:
        return order
    if until not in order:
        raise ConfigError(f"--until {until}: no such stage; known: {', '.join(order)}")
    return order[: order.index(until) + 1]


def _set_up(config: Config, device: torch.device) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic and device.type == "cuda")


def _say_if_untrained(config: Config, names: list[str], console: Console, strict: bool) -> None:
    """Before the hours of training, not after them: w that an evaluation asks for and no student will know."""
    for name in names:
        if not record.is_done(Path(config.out) / name):
            _warn(untrained_weights(config, name), console, strict)


def _walk(
    config: Config,
    names: list[str],
    device: torch.device,
    console: Console,
    stop: StopFlag,
    strict: bool,
    fence: Callable[[], None] = unfenced,
) -> int:
    if not distributed.is_main():
        console = Console(quiet=True)
    for name in names:
        stage, out = config.stages[name], Path(config.out)
        inputs = {need: out / need for need in stage.needs}
        ctx = StageContext(config, stage, inputs, out / name, device, console, stop, fence, strict=strict)
        if record.is_done(ctx.out):
            console.print(f"{name}  done before", highlight=False)
            continue
        try:
            _run_stage(ctx)
        except Interrupted as interrupted:
            console.print(f"{interrupted}; the same command goes on from there", highlight=False)
            return 128 + (stop.number or signal.SIGTERM)  # or another process was told
    return 0


def _run_stage(ctx: StageContext) -> None:
    began, name = time.monotonic(), ctx.stage.name
    _say_if_not_the_same(ctx)
    distributed.barrier()
    if distributed.is_main():
        record.begin(ctx.config, name, ctx.out)
    # Stages that train share their work between processes; the others are the first one's alone.
    if isinstance(ctx.stage, TrainingConfig) or distributed.is_main():
        try:
            importlib.import_module(f"fewstep.lab.stages.{ctx.stage.kind}").run(ctx)
        except Superseded:
            raise
        except BaseException:
            if distributed.is_main():
                record.interrupt(ctx.out, time.monotonic() - began)
            raise
    if distributed.is_main():
        seconds = time.monotonic() - began
        ctx.fence()
        record.finish(ctx.out, seconds)
        ctx.console.print(f"{name}  done in {seconds:.1f} s", highlight=False)
    distributed.barrier()


def _say_if_not_the_same(ctx: StageContext) -> None:
    difference = record.other_circumstances(ctx.out)
    if difference is not None:
        text = f"{ctx.out}: {difference}: going on, but not to the same bits as an uninterrupted run"
        _warn(text, ctx.console, ctx.strict)


def _warn(text: str | None, console: Console, strict: bool) -> None:
    if text is None:
        return
    if strict:
        raise ConfigError(f"{text} (--strict)")
    if distributed.is_main():
        console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One run at a time in a folder; the system lifts the lock with the process, however that ends.

    Raises:
        ConfigError: another is at work there.
    """
    if not distributed.is_main():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"out={out}: another run is at work there; wait for it or choose another out=") from error
        yield
