"""`fewstep evaluate --grid --shards N cluster=slurm`: the sets of a grid as a job array, and one job that measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fewstep.lab.config_shards import ConfigShards

if TYPE_CHECKING:
    from fewstep.lab.config import Config
    from fewstep.lab.progress import Tell


def submit_grid(config: Config, grid: str, shards: int, console: Console, words: list[str]) -> int:
    """Send the sets of the stage `grid` as `shards` jobs, and after them its measurement; returns the exit code.

    Raises:
        ConfigError: a stage that it needs is not done, or there is no SLURM here.
    """
    from fewstep.lab import record
    from fewstep.lab.cluster.arrays import submit_shards
    from fewstep.lab.config import ConfigError

    config.out = str(Path(config.out).absolute())
    missing = [need for need in config.stages[grid].needs if not record.is_done(Path(config.out) / need)]
    if missing:
        right = f"1 while {', '.join(missing)} are not done in {config.out}; `fewstep submit` them first"
        raise ConfigError(f"--shards {shards}: must be {right}")
    work, out = Sets(grid), Path(config.out) / grid
    return submit_shards(
        config.cluster, out, shards, work, console, command=words, config=config, then=Measuring(grid)
    )


@dataclass(frozen=True)
class Sets(ConfigShards):
    """The samples and features of a stage of kind grid."""

    grid: str
    stage: str = "sets"

    def make(
        self, config: Config, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """Make what is missing of every `shards`-th set; False if stopped before the end."""
        from fewstep.lab.context import Interrupted, StageContext
        from fewstep.lab.distributed import pick_device
        from fewstep.lab.stages.grid import make_share

        stage, out = config.stages[self.grid], Path(config.out)
        inputs = {need: out / need for need in stage.needs}
        ctx = StageContext(config, stage, inputs, out / self.grid, pick_device(config.device), console, stop)
        try:
            make_share(ctx, shard, shards, tell)
        except Interrupted:
            return False
        return True


@dataclass(frozen=True)
class Measuring(ConfigShards):
    """The stage itself, which finds every set made."""

    grid: str
    stage: str = "grid"

    def make(
        self, config: Config, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """Walk to its end; False if stopped before."""
        from fewstep.lab.runner import run_experiment

        return run_experiment(config, until=self.grid, console=console) == 0
