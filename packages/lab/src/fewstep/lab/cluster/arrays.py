"""Sharded work as job arrays: each element makes its share of what is missing, whatever ran before.

Files are whole or absent and the same whoever makes them, so elements need no fence, and one that runs again goes on.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from fewstep.lab.cluster import ledger, monitor, slurm
from fewstep.lab.cluster.config import ClusterConfig
from fewstep.lab.cluster.job import console, job, leave_for_later, requeued_in_time
from fewstep.lab.cluster.ledger import Submission
from fewstep.lab.cluster.submit import handed_in, send, send_probe
from fewstep.lab.config import Config
from fewstep.lab.progress import Tell, teller


class Shards(Protocol):
    """Work that falls into shards, done by one job each; its fields are plain, since submitit pickles it."""

    @property
    def stage(self) -> str:
        """What `status` calls it."""

    def __call__(
        self, folder: Path, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """Do what is missing of one shard; False if stopped before its end. folder: of the submission."""


@dataclass(frozen=True)
class ShardJob:
    """One element of the array, whose limit is `minutes` and that Slurm warns `signal_seconds` before."""

    folder: str
    work: Shards
    shard: int
    shards: int
    minutes: int
    signal_seconds: int

    def __call__(self) -> None:
        """Make what is missing of this shard."""
        submission = Submission(Path(self.folder), "slurm")
        name = f"{self.work.stage}.{self.shard}"
        with job(submission) as stop:
            tell = teller(submission.logs / f"{name}.jsonl")
            with requeued_in_time(submission, self.minutes, self.signal_seconds):
                whole = self.work(submission.folder, self.shard, self.shards, stop, console(), tell)
            leave_for_later(submission, 0 if whole else 128 + (stop.number or 0))
            (submission.logs / f"{name}.done").touch()


def submit_shards(
    cluster: ClusterConfig,
    out: Path,
    shards: int,
    work: Shards,
    console: Console,
    *,
    command: Sequence[str],
    config: Config | None = None,
    then: Shards | None = None,
) -> int:
    """Send an array of `shards` jobs, unless one is at work in `out`; returns the exit code.

    command: the words after `fewstep` that this is the answer to. config: kept for the jobs. then: work of one more
    job, once all of the array is done.

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
            submission.command = list(command)
            before = [] if _seen(out) else send_probe(submission, cluster, 1)
            limits = (cluster.time, cluster.signal_seconds)
            pieces = [ShardJob(str(submission.folder), work, shard, shards, *limits) for shard in range(shards)]
            sent = send(submission, cluster, work.stage, pieces, before, sharded=True)
            if then is not None:
                last = [ShardJob(str(submission.folder), then, 0, 1, *limits)]
                send(submission, cluster, then.stage, last, [sent.id], sharded=True)
    said = f"{sent.stage}  job {sent.id}, {shards} shards\nfewstep status {shlex.quote(str(out))}"
    console.print(said, markup=False, soft_wrap=True)
    return 0


def _seen(out: Path) -> bool:
    """Whether a node has already written into the folder."""
    return any((out / ledger.FOLDER).glob("*/jobs/*.jsonl"))
