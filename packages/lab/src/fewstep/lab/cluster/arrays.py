"""Sharded work as job arrays: each element makes its share of what is missing, whatever ran before.

Files are whole or absent and the same whoever makes them, so elements need no fence, and one that runs again goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from fewstep.lab.cluster import ledger, monitor, slurm
from fewstep.lab.cluster.config import ClusterConfig
from fewstep.lab.cluster.job import console, job, leave_for_later
from fewstep.lab.cluster.ledger import Submission
from fewstep.lab.cluster.submit import handed_in, send
from fewstep.lab.config import Config


class Shards(Protocol):
    """Work that falls into shards, done by one job each; its fields are plain, since submitit pickles it."""

    @property
    def stage(self) -> str:
        """What `status` calls it."""

    def __call__(self, folder: Path, shard: int, shards: int, stop: Callable[[], bool], console: Console) -> bool:
        """Do what is missing of one shard; False if stopped before its end. folder: of the submission."""


@dataclass(frozen=True)
class ShardJob:
    """One element of the array."""

    folder: str
    work: Shards
    shard: int
    shards: int

    def __call__(self) -> None:
        """Make what is missing of this shard."""
        submission = Submission(Path(self.folder), "slurm")
        with job(submission) as stop:
            whole = self.work(submission.folder, self.shard, self.shards, stop, console())
            leave_for_later(submission, 0 if whole else 128 + (stop.number or 0))
            (submission.logs / f"{self.work.stage}.{self.shard}.done").touch()


def submit_shards(
    cluster: ClusterConfig,
    out: Path,
    shards: int,
    work: Shards,
    console: Console,
    *,
    config: Config | None = None,
    then: Shards | None = None,
) -> int:
    """Send an array of `shards` jobs, unless one is at work in `out`; returns the exit code.

    config: kept for the jobs. then: work of one more job, once all of the array is done.

    Raises:
        ConfigError: no SLURM here.
        slurm.SlurmError: sbatch refused, in its own words.
    """
    slurm.require()
    with ledger.locked(out):
        at_work = monitor.at_work(out)
        if at_work is not None:
            console.print(f"{out}: submission {at_work.number} is at work on it; nothing new was sent", markup=False)
            return 0
        with handed_in(out, cluster, config) as submission:
            pieces = [ShardJob(str(submission.folder), work, shard, shards) for shard in range(shards)]
            sent = send(submission, cluster, work.stage, pieces, sharded=True)
            if then is not None:
                last = [ShardJob(str(submission.folder), then, 0, 1)]
                send(submission, cluster, then.stage, last, [sent.id], sharded=True)
    console.print(f"{sent.stage}  job {sent.id}, {shards} shards\nfewstep status {out}", markup=False)
    return 0
