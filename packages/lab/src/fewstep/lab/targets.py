"""`fewstep targets`: a training stage's teacher targets, computed once, here or as a job array."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console

from fewstep.lab.config_shards import ConfigShards

if TYPE_CHECKING:
    from fewstep.distill import TargetMethod
    from fewstep.lab.config import Config
    from fewstep.lab.progress import Tell
    from fewstep.lab.stored import TargetStore

READS = 3  # files whose reading is timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fewstep targets`."""
    parser.add_argument("experiment", help="folder with config.yaml, e.g. experiments/digits")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="any key of the config")
    parser.add_argument("--stage", required=True, help="of kind guide, or halve: its next halving")
    parser.add_argument("--draws", type=int, default=1, help="noises per image: epochs before one comes again")
    parser.add_argument("--chunk", type=int, default=4096, help="targets per file")
    parser.add_argument("--shards", type=int, default=1, help="jobs that share the work on a cluster")
    parser.add_argument("--out", metavar="DIR", help="default: <run>/targets; train with stages.STAGE.targets=DIR")


def command(args: argparse.Namespace, console: Console) -> int:
    """Make what is missing.

    Raises:
        ConfigError: no such stage, or one without targets of a fixed teacher.
    """
    from fewstep.lab.cluster.arrays import submit_shards
    from fewstep.lab.compose import compose
    from fewstep.lab.config import ConfigError
    from fewstep.lab.progress import unheard
    from fewstep.lab.sample import check_shards, require
    from fewstep.lab.signals import stop_on_signals

    config = compose(args.experiment, args.overrides)
    for name in ("draws", "chunk"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "1 or more")
    check_shards(args.shards, config.cluster)
    if args.stage not in config.stages:
        raise ConfigError(f"--stage {args.stage}: no such stage; known: {', '.join(config.stages)}")
    out = Path(args.out or Path(config.out) / "targets").absolute()
    work = Work(args.stage, str(out), args.draws, args.chunk)
    if config.cluster.kind == "slurm":
        config.out = str(Path(config.out).absolute())
        return submit_shards(config.cluster, out, args.shards, work, console, command=args.words, config=config)
    with stop_on_signals() as stop:
        return 0 if work.make(config, 0, 1, stop, console, unheard) else 128 + (stop.number or 0)


@dataclass(frozen=True)
class Work(ConfigShards):
    """What is to be made of an experiment: targets of `stage` in `root`, `draws` epochs of them in files of `chunk`."""

    stage: str
    root: str
    draws: int
    chunk: int

    def make(
        self, config: Config, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """Make this shard's missing files; says whether none is missing in the end."""
        from fewstep.lab.data import Order
        from fewstep.lab.distributed import pick_device
        from fewstep.lab.inpainting import split_for
        from fewstep.lab.stored import TargetStore, key_of, make

        device = pick_device(config.device)
        method, seed = training_of(config, self.stage, console)
        split = split_for(config, config.stages[self.stage], method).to(device)
        order = Order(len(split), config.stages[self.stage].batch_size, seed)
        store = TargetStore(Path(self.root), key_of(method, order, split), self.draws * len(split), self.chunk)
        store.write_index()
        mine, began = slice(shard, None, shards), time.perf_counter()
        total = _targets(list(store.ranges())[mine])
        there, count, seconds = total - _targets(store.missing(mine)), 0, 0.0
        tell(there, total)
        for made, took in make(method, split, order, store, mine, stop):
            count, seconds = count + made, seconds + took
            tell(there + count, total)
        whole = time.perf_counter() - began
        console.print(f"{self.stage}  {count} targets made in {whole:.1f} s into {store.folder}", markup=False)
        if count:
            console.print(worth(store, count, seconds), markup=False)
        return not store.missing(mine)


def _targets(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def training_of(config: Config, stage: str, console: Console) -> tuple[TargetMethod, int]:
    """The method and seed that the stage would train with next, its networks built as they would be.

    Raises:
        ConfigError: a stage that it needs is not done, or it does not train, or not against a fixed teacher.
    """
    import importlib

    from fewstep.lab import record
    from fewstep.lab.config import ConfigError, TrainingConfig
    from fewstep.lab.context import StageContext
    from fewstep.lab.distributed import pick_device

    options, out = config.stages[stage], Path(config.out)
    if not isinstance(options, TrainingConfig):
        raise ConfigError(f"--stage {stage}: does not train")
    missing = [need for need in options.needs if not record.is_done(out / need)]
    if missing:
        raise ConfigError(f"--stage {stage}: needs {', '.join(missing)}, not done in {out}; `fewstep run` them first")
    inputs = {need: out / need for need in options.needs}
    found: list[tuple[TargetMethod, int]] = []

    def instead(method: object, seed: int) -> None:
        found.append((cast("TargetMethod", method), seed))
        raise _Enough

    device = pick_device(config.device)
    ctx = StageContext(config, options, inputs, out / stage, device, console, instead=instead)
    try:
        importlib.import_module(f"fewstep.lab.stages.{options.kind}").run(ctx)
    except _Enough:
        return found[0]
    raise ConfigError(f"--stage {stage}: all of it is trained")


class _Enough(Exception):
    """The stage has said what it would train."""


def worth(store: TargetStore, count: int, seconds: float) -> str:
    """Targets per second, bytes of each, and after how many uses storing them is cheaper than computing them anew."""
    from fewstep.lab.shards import read_shard

    files = sorted(store.folder.glob("*.safetensors"))[:READS]
    began = time.perf_counter()
    read = sum(len(shard.images) for shard in map(read_shard, files) if shard is not None)
    reading, computing = (time.perf_counter() - began) / max(read, 1), seconds / count
    size = sum(file.stat().st_size for file in files) / max(read, 1)
    pays = f"{computing / (computing - reading):.2f} uses" if reading < computing else "never: reading takes longer"
    return (
        f"{count / seconds:,.0f} targets/s, {size:.0f} bytes each; computing {1e6 * computing:.0f} us, reading "
        f"{1e6 * reading:.1f} us a target: pays beyond {pays}"
    )
