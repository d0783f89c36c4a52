"""`fewstep submit`, `status`, `logs`, `cancel` and `resume`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from fewstep.lab.cluster.ledger import Submission
    from fewstep.lab.config import Config

LINES = 20


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The five parsers."""
    submit_parser = commands.add_parser("submit", help="send an experiment's stages to a cluster and return at once")
    submit_parser.add_argument("experiment", help="folder with config.yaml, e.g. experiments/digits")
    _add_overrides(submit_parser, "any key of the config, or group=choice, e.g. cluster=slurm cluster.time=60")
    submit_parser.set_defaults(command=submit)
    on_run(commands, "status", "how the jobs of a run stand", status)
    on_run(commands, "cancel", "end the jobs of a run; what they saved stays", cancel)
    again = on_run(commands, "resume", "send again what is not done, with the config that was submitted", resume)
    _add_overrides(again, "keys of cluster alone, e.g. cluster.time=120")
    told = on_run(commands, "logs", "the last lines that a run's jobs wrote", logs)
    told.add_argument("stage", nargs="?", help="of this stage alone")
    told.add_argument("--lines", type=int, default=LINES, help="per file")


def on_run(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    command: Callable[[argparse.Namespace, Console], int],
) -> argparse.ArgumentParser:
    """A parser of a command on a run's folder."""
    parser = commands.add_parser(name, help=text)
    parser.add_argument("run", type=Path, help="the run's folder, e.g. runs/digits")
    parser.set_defaults(command=command)
    return parser


def _add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)


def submit(args: argparse.Namespace, console: Console) -> int:
    """Compose, send, say which jobs there are."""
    from fewstep.lab.compose import compose

    return _send(compose(args.experiment, args.overrides), console)


def resume(args: argparse.Namespace, console: Console) -> int:
    """Send again what is not done, with the config of the last submission and the code as it is now.

    Of shards, the command that was given is given again: it makes what is missing.
    """
    import os

    from fewstep.lab.cluster import ledger
    from fewstep.lab.cluster.choice import changed, refuse_others

    last, run = _last(args.run), str(args.run.absolute())
    if Path(last.cwd).is_dir():
        os.chdir(last.cwd)  # relative paths of the config began there
    if last.command:
        from fewstep.lab.cli import main

        refuse_others(args.overrides)
        return main([*last.command, "--out", run, *args.overrides])
    config = ledger.read_config(last)
    config.cluster = changed(config.cluster, args.overrides)
    config.out = run
    return _send(config, console)


def _send(config: Config, console: Console) -> int:
    from fewstep.lab.cluster.monitor import refuse_submitted
    from fewstep.lab.cluster.submit import submit as send
    from fewstep.lab.runner import run_experiment

    if config.cluster.kind == "debug":
        refuse_submitted(Path(config.out))
        return run_experiment(config, console=console)
    submission, new = send(config)
    if submission is None:
        console.print(f"{config.out}: everything is done")
        return 0
    if not new:
        console.print(f"{config.out}: submission {submission.number} is at work on it; nothing new was sent")
    for job in submission.jobs:
        console.print(f"{job.stage}  job {job.id}", markup=False)
    console.print(f"fewstep status {shlex.quote(config.out)}", markup=False, soft_wrap=True)
    return 0


def status(args: argparse.Namespace, console: Console) -> int:
    """Print the table."""
    from fewstep.lab.cluster.monitor import look
    from fewstep.lab.cluster.table import table

    console.print(table(look(args.run)))
    return 0


def logs(args: argparse.Namespace, console: Console) -> int:
    """Print the end of every log, under the file's name."""
    from fewstep.lab.config import ConfigError

    submission = _last(args.run)
    known = dict.fromkeys(job.stage for job in submission.jobs)
    if args.stage is not None and args.stage not in known:
        raise ConfigError(f"{args.stage}: not in submission {submission.number}; known: {', '.join(known)}")
    identities = {job.id: job.stage for job in submission.jobs if args.stage in (None, job.stage)}
    for identity in identities:
        for path in sorted([*submission.logs.glob(f"{identity}_*.out"), *submission.logs.glob(f"{identity}_*.err")]):
            console.print(f"==> {path}", style="bold", markup=False, soft_wrap=True)
            lines = path.read_text(errors="replace").splitlines()
            console.print("\n".join(lines[-args.lines :]), markup=False, soft_wrap=True)
    return 0


def cancel(args: argparse.Namespace, console: Console) -> int:
    """End what is queued or running."""
    from fewstep.lab.cluster.monitor import at_work

    submission = at_work(args.run)
    if submission is None:
        console.print(f"{args.run}: no job of it is queued or running")
        return 0
    ended = _end(submission)
    again = f"`fewstep resume {shlex.quote(str(args.run))}` goes on from there"
    console.print(f"{args.run}: cancelled {', '.join(ended)}; {again}", markup=False, soft_wrap=True)
    return 0


def _end(submission: Submission) -> list[str]:
    import os
    import signal

    from fewstep.lab.cluster import slurm
    from fewstep.lab.cluster.monitor import alive, queue_of

    if submission.kind == "local":
        processes = dict.fromkeys(job.id for job in submission.jobs if alive(submission, job))
        for process in processes:
            (submission.logs / f"{process}.cancelled").touch()
            os.kill(int(process), signal.SIGTERM)
        return list(processes)
    rows = queue_of(submission)
    if rows is None:
        raise slurm.SlurmError("squeue does not answer: try again when the controller is back")
    ended = [job for job in submission.jobs if any(rows[i].state in slurm.LIVE for i in job.elements if i in rows)]
    for job in ended:
        (submission.logs / f"{job.id}.cancelled").touch()  # before Slurm's signal, on which it would requeue itself
    slurm.cancel(*(job.id for job in ended))
    return [f"{job.stage} (job {job.id})" for job in ended]


def _last(run: Path) -> Submission:
    from fewstep.lab.cluster.ledger import submissions

    found = submissions(run)
    if not found:
        raise FileNotFoundError(f"{run}: nothing was submitted there; see `fewstep submit`")
    return found[-1]
