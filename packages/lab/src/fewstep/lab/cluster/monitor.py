"""How the jobs of a run stand: from its folders first, from squeue second, never from sacct or submitit's pickles.

A stage is done when its folder says so, whatever Slurm thinks of the job (a process may die after its last word). It
has failed only when Slurm has let go of it without that: an error written down while the job is about to run again, and
NODE_FAIL before a requeue, are not final.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fewstep.lab import record
from fewstep.lab.budget import updates_of
from fewstep.lab.cluster import ledger, slurm
from fewstep.lab.cluster.ledger import PROBE, Job, Submission
from fewstep.lab.cluster.slurm import LIVE, Row
from fewstep.lab.config import ConfigError, StageConfig, TrainingConfig
from fewstep.lab.progress import PROGRESS

DONE, RUNNING, PENDING, UNKNOWN = "done", "running", "pending", "unknown"
FAILED, CANCELLED, LOST = "failed", "cancelled", "lost"
LIMIT = "time limit"
ENDED = frozenset({FAILED, CANCELLED, LOST, LIMIT})
TAIL = 65536  # bytes at the end of a file that are looked at
RECENT = 10  # lines of metrics that the speed is taken from


@dataclass(frozen=True)
class Progress:
    """done, total: updates, images, targets, or network evaluations.

    left: seconds at the speed of the last ones, None if not known.
    """

    done: int = 0
    total: int = 0
    left: float | None = None


@dataclass(frozen=True)
class Part:
    """One row: a stage, or one shard of it; `node` is where it runs, `error` the last one in a line."""

    stage: str
    job: str
    state: str
    shard: int | None = None
    node: str = ""
    progress: Progress = Progress()
    error: str = ""


def state_of(
    done: bool, row: Row | None, *, answers: bool, cancelled: bool, restarted: bool = False, error: bool = False
) -> str:
    """A part's state in a word. row: what squeue says of it, if anything; answers: whether it answers at all.

    error: whether its last start wrote one. squeue forgets what ended minutes ago; the folder does not.
    """
    if done:
        return DONE
    if row is None:
        return UNKNOWN if not answers else CANCELLED if cancelled else FAILED if error else LOST
    if row.state == "PENDING":
        return "requeued" if restarted else PENDING
    if row.state in LIVE:
        return row.state.lower()
    if row.state == "NODE_FAIL":
        return "node lost"
    return {"CANCELLED": CANCELLED, "TIMEOUT": LIMIT}.get(row.state, FAILED)


def at_work(out: Path) -> Submission | None:
    """The last submission of the run if jobs of it are queued or running, or nobody can say; else None."""
    for submission in reversed(ledger.submissions(out)):
        if submission.jobs:
            return submission if any(_is_live(submission, job) for job in submission.jobs) else None
    return None


def refuse_submitted(out: Path) -> None:
    """Raise if jobs of the run are known to be queued or running: their stages take no lock, wherever they run.

    Raises:
        ConfigError: which submission, and how to end it.
    """
    submission = at_work(out)
    if submission is not None and (submission.kind == "local" or queue_of(submission) is not None):
        raise ConfigError(f"out={out}: submission {submission.number} is at work there; `fewstep cancel {out}` first")


def _is_live(submission: Submission, job: Job) -> bool:
    if submission.kind == "local":
        return alive(submission, job)
    rows = queue_of(submission)
    return rows is None or any(row.state in {*LIVE, "NODE_FAIL"} for i, row in rows.items() if i in job.elements)


def queue_of(submission: Submission) -> dict[str, Row] | None:
    """What squeue says of this submission's jobs, by id, and of no other that has the same id."""
    rows = slurm.queue()
    if rows is None:
        return None
    names = {job.name for job in submission.jobs}
    return {row.id: row for row in rows if row.name in names}


def alive(submission: Submission, job: Job) -> bool:
    """Whether the process that `cluster=local` started still runs, and is that one."""
    try:
        command = Path(f"/proc/{job.id}/cmdline").read_bytes()
    except OSError:
        return False
    return str(submission.logs).encode() in command


def look(out: Path) -> list[Part]:
    """Every stage of the run as it stands now, in the order of the config.

    Raises:
        FileNotFoundError: nothing was ever submitted there.
    """
    found = ledger.submissions(out)
    if not found:
        raise FileNotFoundError(f"{out}: nothing was submitted there; see `fewstep submit`")
    last = found[-1]
    rows = queue_of(last) if last.kind == "slurm" else {}
    sharded = [job for job in last.jobs if job.shards]
    parts = [_probe_part(last, job, rows, out) for job in last.jobs if job.stage == PROBE]
    if sharded:
        needs: dict[str, list[str]] = {}
        for job in sharded:
            needs[job.stage] = [part.stage for part in parts if part.stage != job.stage][-1:]
            parts += _shard_parts(last, job, rows)
        return _blamed(parts, needs)
    config = ledger.read_config(last)
    for each, stage in config.stages.items():
        mine, done = last.job(each), record.is_done(out / each)
        progress = progress_of(stage, out)
        if mine is None or done:
            state = DONE if done else "not sent"
            parts.append(Part(each, "" if mine is None else mine.id, state, progress=replace(progress, left=None)))
        elif last.kind == "local":
            at_it = any(part.state == RUNNING for part in parts)
            parts.append(_local_part(last, mine, progress, waits=at_it))
        else:
            parts.append(_job_part(last, mine, rows, progress))
    return _blamed(parts, {each: [PROBE, *stage.needs] for each, stage in config.stages.items()})


def _probe_part(submission: Submission, job: Job, rows: Mapping[str, Row] | None, out: Path) -> Part:
    """The probe leaves nothing in the run's folder; once Slurm has forgotten it, others that went on tell of it."""
    row = (rows or {}).get(job.id)
    others = [each for each in (rows or {}).values() if each.id != job.id and each.state in LIVE]
    done = bool(others) or any(submission.logs.glob("*_log.out")) if row is None else row.state == "COMPLETED"
    cancelled = (submission.logs / f"{job.id}.cancelled").exists()
    state = state_of(done, row, answers=rows is not None, cancelled=cancelled)
    error = f"{out} cannot be read on a node: choose an out= that all nodes share" if state == FAILED else ""
    return Part(job.stage, job.id, state, None, "" if row is None else row.nodes, error=error)


def _job_part(submission: Submission, job: Job, rows: Mapping[str, Row] | None, progress: Progress) -> Part:
    """A job that is not done."""
    row = (rows or {}).get(job.id)
    state = _state(submission, job, job.id, row, done=False, answers=rows is not None)
    if state != RUNNING:
        progress = replace(progress, left=None)
    error = "" if state in (RUNNING, PENDING, DONE) else last_error(submission, job.id)
    return Part(job.stage, job.id, state, None, "" if row is None else row.nodes, progress, error)


def _state(submission: Submission, job: Job, element: str, row: Row | None, *, done: bool, answers: bool) -> str:
    return state_of(
        done,
        row,
        answers=answers,
        cancelled=(submission.logs / f"{job.id}.cancelled").exists(),
        restarted=any(submission.logs.glob(f"{element}_*.out")),
        error=any(submission.logs.glob(f"{element}_*.error")),
    )


def _shard_parts(submission: Submission, job: Job, rows: Mapping[str, Row] | None) -> Iterator[Part]:
    """One for each shard."""
    for shard, element in enumerate(job.elements):
        row = (rows or {}).get(element)
        done = (submission.logs / f"{job.stage}.{shard}.done").exists()
        state = _state(submission, job, element, row, done=done, answers=rows is not None)
        made = _pieces(submission.logs / f"{job.stage}.{shard}.jsonl")
        error = "" if state in (RUNNING, PENDING, DONE) else last_error(submission, element)
        number, node = shard if job.shards > 1 else None, "" if row is None else row.nodes
        if state != RUNNING:
            made = replace(made, left=None)
        yield Part(job.stage, element, state, number, node, made, error)


def _pieces(path: Path) -> Progress:
    """How far work has come that a `teller` told of there."""
    lines = _last_metrics(path)
    if not lines:
        return Progress()
    done, total = int(lines[-1]["step"]), int(lines[-1]["total"])
    speed = _speed(lines)
    return Progress(done, total, (total - done) / speed if speed > 0 else None)


def _local_part(submission: Submission, job: Job, progress: Progress, *, waits: bool) -> Part:
    """A stage of a run in one process: the first one that is not done is the one at work."""
    if not alive(submission, job):
        state = CANCELLED if (submission.logs / f"{job.id}.cancelled").exists() else FAILED
        error = "" if state == CANCELLED else last_error(submission, job.id)
        return Part(job.stage, job.id, state, progress=replace(progress, left=None), error=error)
    return Part(job.stage, job.id, PENDING if waits else RUNNING, progress=progress)


def _blamed(parts: list[Part], needs: Mapping[str, list[str]]) -> list[Part]:
    """The parts, of which those that Slurm cancelled because another failed say which. needs: what hangs on what."""
    return [_blamed_part(part, [each for each in parts if each.stage in needs.get(part.stage, ())]) for part in parts]


def _blamed_part(part: Part, needs: list[Part]) -> Part:
    ended = next((need for need in needs if need.state in ENDED), None)
    if ended is None or part.error or part.state not in (CANCELLED, LOST):
        return part
    return replace(part, state=CANCELLED, error=f"{name(ended)}: {ended.state}")


def name(part: Part) -> str:
    """The stage, and which shard of it."""
    return part.stage if part.shard is None else f"{part.stage} {part.shard}"


def trainings(stage: TrainingConfig, folder: Path) -> list[tuple[Path, int]]:
    """(folder, updates) of each training of a stage, in order."""
    steps = getattr(stage, "steps", None)
    if not steps:
        return [(folder, updates_of(folder, stage.updates))]
    folders = {count: folder / f"steps_{count}" for count in steps}
    return [(each, updates_of(each, stage.updates_for(count))) for count, each in folders.items()]


def progress_of(stage: StageConfig, out: Path) -> Progress:
    """How far a stage has come."""
    if not isinstance(stage, TrainingConfig):
        return _pieces(out / stage.name / PROGRESS)
    done, total, speed = 0, 0, 0.0
    for folder, updates in trainings(stage, out / stage.name):
        lines = _last_metrics(folder / "metrics.jsonl")
        reached = updates if record.is_done(folder) else int(lines[-1]["step"]) if lines else 0
        done, total = done + reached, total + updates
        speed = _speed(lines) or speed
    return Progress(done, total, (total - done) / speed if speed > 0 else None)


def _speed(lines: list[dict[str, float]]) -> float:
    """Steps a second over these lines; 0 if they do not tell."""
    if len(lines) < 2 or lines[-1]["time"] <= lines[0]["time"]:
        return 0.0
    return (lines[-1]["step"] - lines[0]["step"]) / (lines[-1]["time"] - lines[0]["time"])


def _last_metrics(path: Path) -> list[dict[str, float]]:
    """The last whole lines of metrics.jsonl."""
    found = []
    for line in _tail(path).splitlines()[-RECENT:]:
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short, at either end
            continue
    return [line for line in found if "step" in line and "time" in line]


def last_error(submission: Submission, element: str) -> str:
    """What went wrong in the last start of that job, in a line: its own account, else the last of its error log."""
    told = sorted(submission.logs.glob(f"{element}_*.error"), key=lambda path: path.stat().st_mtime)
    if told:
        return told[-1].read_text().strip()
    lines = [line for path in submission.logs.glob(f"{element}_*.err") for line in _complaints(_tail(path))]
    return lines[-1] if lines else ""


def _complaints(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if "error:" in line or line.split(":")[0].endswith(("Error", "Killed")):
            yield line.strip()


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
