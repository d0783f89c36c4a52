"""The few commands of Slurm that are asked directly: squeue, scancel, scontrol.

Not sacct: many sites have no accounting, and it takes NODE_FAIL for final while the job is about to run again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from fewstep.lab.config import ConfigError

SECONDS = 20  # patience with a controller that is away: its clients block for many seconds
LIVE = frozenset({
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED",
    "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT", "PREEMPTED",
})  # fmt: skip
_FIELDS = "%i|%T|%N|%r|%j"


class SlurmError(RuntimeError):
    """Slurm refused or does not answer; the message is its own words."""


@dataclass(frozen=True)
class Row:
    """One job (or element of an array, `id` "12_3") as the controller knows it."""

    id: str
    state: str
    nodes: str
    reason: str
    name: str


def require() -> None:
    """Raise unless this machine is a part of a cluster.

    Raises:
        ConfigError: it has no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("cluster=slurm: no SLURM on this machine (sbatch is not in PATH); use cluster=local")


def queue() -> list[Row] | None:
    """This user's jobs, also finished ones that the controller still remembers; None if it does not answer.

    All of them and not a list of ids: squeue fails as a whole where it has forgotten one.
    """
    options = ["--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--format={_FIELDS}"]
    try:
        text = _ask("squeue", *options)
    except SlurmError:
        return None
    return [Row(*line.split("|", 4)) for line in text.splitlines() if line.count("|") >= 4]


def sbatch(*options: str) -> str:
    """Send a job that is all options; returns its id.

    Raises:
        SlurmError: refused.
    """
    return _ask("sbatch", "--parsable", *options).strip().split(";")[0]


def cancel(*jobs: str) -> None:
    """End these jobs, by id.

    Raises:
        SlurmError: the controller does not answer, or a job is not the user's.
    """
    _ask("scancel", "--quiet", *jobs)


def requeue(job: str) -> None:
    """Put a running job back into the queue; Slurm then ends this run of it.

    Raises:
        SlurmError: it cannot be.
    """
    _ask("scontrol", "requeue", job)


def state(job: str) -> str | None:
    """State of one job by its raw id; None if the controller does not know it or does not answer."""
    try:
        text = _ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    except SlurmError:
        return None
    return text.split("\n")[0].strip() or None


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except FileNotFoundError as error:
        raise SlurmError(f"{command[0]}: not on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]}: no answer within {SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        raise SlurmError(own_words(error.stderr) or f"{command[0]}: exit code {error.returncode}") from error
    return done.stdout


def own_words(text: str) -> str:
    """What a command of Slurm wrote on stderr, in one line."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()).replace("; sbatch: error: ", "; ")
