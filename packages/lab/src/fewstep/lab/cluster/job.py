"""What runs on the nodes: one stage (or one shard) of a submitted run, on every task of its job.

submitit would pickle the state in its signal handler on the first task, and count every signal of a short job as its
last. Here a handler only sets a flag: the stage saves at its next step, all processes agreeing, and the job then puts
itself back into the queue. Nothing but the run's own folders is needed to go on.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import submitit
import torch
from rich.console import Console

from fewstep.lab.checkpoint import write_text
from fewstep.lab.cluster import ledger, slurm
from fewstep.lab.cluster.attempt import Attempt, Superseded
from fewstep.lab.cluster.ledger import Submission, read_config
from fewstep.lab.cluster.rendezvous import meet
from fewstep.lab.distributed import OtherProcessError
from fewstep.lab.runner import run_experiment, run_stage
from fewstep.lab.signals import StopFlag, stop_on_signals

LATER = 75  # exit code of a job that stopped with its work saved (EX_TEMPFAIL)
LAST_SECONDS = 10  # before the time limit: whoever is still saving is requeued all the same
PATIENCE = (2, 5, 10, 20, 30)  # seconds between attempts to be requeued by a controller that is away
STARTED = "FEWSTEP_STARTED"  # when the job's script began: not all versions of Slurm tell when it will end
_PEER = re.compile(r"closed by peer|reset by peer|Broken pipe|NCCL|[Tt]imed? ?out")  # another process died first


@dataclass(frozen=True)
class StageJob:
    """The job of one stage; all of it is two strings, so that submitit's pickle holds nothing of ours."""

    folder: str
    stage: str

    def __call__(self) -> None:
        """Run the stage, or go on with it."""
        submission = Submission(Path(self.folder), "slurm")
        with job(submission) as stop:
            config = read_config(submission)
            store = _rendezvous(submission)
            attempt = Attempt.here(submission.number)
            with requeued_in_time(submission, config.cluster.time, config.cluster.signal_seconds):
                code = run_stage(config, self.stage, attempt, stop, console(), store)
            leave_for_later(submission, code)


@dataclass(frozen=True)
class RunJob:
    """All stages one after the other: what `cluster=local` starts in the background."""

    folder: str

    def __call__(self) -> None:
        """Run what is not done."""
        submission = Submission(Path(self.folder), "local")
        with job(submission):
            store = _rendezvous(submission)
            code = run_experiment(read_config(submission), console=console(), store=store)
            if code:
                sys.exit(LATER)


@contextmanager
def job(submission: Submission) -> Iterator[StopFlag]:
    """Within: signals only set a flag, and the line that a mistake or failure is goes where `status` finds it."""
    _set_ranks()
    _go_to(submission)
    _say_if_gpus_are_idle()
    with stop_on_signals() as stop:
        try:
            yield stop
        except Superseded as error:
            print(error, file=sys.stderr)
            sys.exit(LATER)
        except Exception as error:
            _write_error(submission, error)
            raise


def _say_if_gpus_are_idle() -> None:
    if os.environ.get("SLURM_JOB_GPUS") and not torch.cuda.is_available() and not int(os.environ["RANK"]):
        print("warning: the job has GPUs, but torch sees none here: it computes on the CPU", file=sys.stderr)


def _go_to(submission: Submission) -> None:
    """Not before: python would look for modules there first."""
    place = ledger.read(submission.folder).cwd
    try:
        os.chdir(place)
    except OSError as error:
        print(f"{place}: not on this node, so relative paths lead nowhere ({error.strerror})", file=sys.stderr)


def _set_ranks() -> None:
    """What torchrun would announce."""
    task = submitit.JobEnvironment()
    local = task.num_tasks // task.num_nodes
    found = {"RANK": task.global_rank, "WORLD_SIZE": task.num_tasks, "LOCAL_RANK": task.local_rank}
    os.environ.update({name: str(value) for name, value in {**found, "LOCAL_WORLD_SIZE": local}.items()})


def _rendezvous(submission: Submission) -> object | None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return meet(_file(submission, "rendezvous"), rank, world) if world > 1 else None


def _file(submission: Submission, suffix: str) -> Path:
    """A file of this start of this job."""
    identity = submitit.JobEnvironment().job_id
    return submission.logs / f"{identity}_{os.environ.get('SLURM_RESTART_COUNT', '0')}.{suffix}"


def _write_error(submission: Submission, error: Exception) -> None:
    """One line; not what merely follows from another process's death, which the batch script answers by a restart."""
    followed = isinstance(error, OtherProcessError) or _PEER.search(str(error))
    if followed and int(os.environ["WORLD_SIZE"]) > 1:
        return
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    try:
        write_text(_file(submission, "error"), text + "\n")
    except OSError as full:
        print(full, file=sys.stderr)


def leave_for_later(submission: Submission, code: int) -> None:
    """Where the work stopped with exit code `code` of a signal: back into the queue, and out without a result."""
    if not code:
        return
    if int(os.environ["RANK"]):
        sys.exit(0)  # srun would kill the first process, which may not have asked for the requeue yet
    requeue_once(submission)
    sys.exit(LATER)


def requeue_once(submission: Submission) -> None:
    """Back into the queue, unless this job was cancelled or Slurm has already seen to it.

    A controller that does not answer is asked again: it may be on its way back, and nobody else requeues the job.
    """
    identity = os.environ["SLURM_JOB_ID"]
    cancelled = submission.logs / f"{os.environ.get('SLURM_ARRAY_JOB_ID', identity)}.cancelled"
    for wait in (*PATIENCE, 0):
        state = slurm.state(identity)
        if cancelled.exists() or state not in ("RUNNING", None):
            return
        try:
            slurm.requeue(identity)
            return print(f"job {identity}: saved and requeued", flush=True)
        except slurm.SlurmError as error:
            print(f"job {identity}: not requeued: {error}", file=sys.stderr)
        time.sleep(wait)


@contextmanager
def requeued_in_time(submission: Submission, minutes: int, signal_seconds: int) -> Iterator[None]:
    """Within: shortly before the time limit the job is requeued even if it is still saving, or in a long step.

    It then goes on from what it saved last, where Slurm alone would end it for good.
    """
    if int(os.environ["RANK"]):
        yield
        return
    started = float(os.environ.get(STARTED, time.time()))  # before the seconds or minutes of imports
    limit = float(os.environ.get("SLURM_JOB_END_TIME", started + 60 * minutes))
    margin = min(LAST_SECONDS, signal_seconds / 2)
    timer = threading.Timer(limit - margin - time.time(), requeue_once, (submission,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def console() -> Console:
    """Where a job's words go: plain lines into its log."""
    return Console(highlight=False, width=160)
