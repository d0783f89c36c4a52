"""What can be known of jobs without SLURM: states, fences, what submitit is told, private folders, progress."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lab_configs import altered, digits
from rich.console import Console
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch re-exports it without saying so

from fewstep.lab import record
from fewstep.lab.cluster import ledger, monitor, slurm
from fewstep.lab.cluster.attempt import Attempt, Superseded
from fewstep.lab.cluster.ledger import Job, Submission
from fewstep.lab.cluster.rendezvous import meet
from fewstep.lab.cluster.slurm import Row
from fewstep.lab.cluster.submit import parameters, patient
from fewstep.lab.cluster.table import table
from fewstep.lab.config import Config, ConfigError

KEY = "abcd1234"


def row(state: str, name: str = f"fewstep:run:teacher:{KEY}", job: str = "7") -> Row:
    return Row(job, state, "n1", "None", name)


# What squeue said on the dev cluster while jobs were lost, preempted, cancelled and forgotten; and what it meant.
SEEN = [
    (["RUNNING", "NODE_FAIL", "PENDING", "RUNNING"], ["running", "node lost", "requeued", "running"]),
    (["RUNNING", "PREEMPTED", "COMPLETING", "PENDING"], ["running", "preempted", "completing", "requeued"]),
    (["RUNNING", "COMPLETING", "CANCELLED"], ["running", "completing", "cancelled"]),
    (["RUNNING", "TIMEOUT", None], ["running", "time limit", "lost"]),
    (["FAILED", "OUT_OF_MEMORY", "COMPLETED"], ["failed", "failed", "failed"]),
]


@pytest.mark.parametrize(("seen", "states"), SEEN)
def test_states_that_slurm_went_through(seen: list[str | None], states: list[str]) -> None:
    # Broken: NODE_FAIL before a requeue, or a preempted job, is taken for the end (submitit does).
    rows = [None if state is None else row(state) for state in seen]
    found = [monitor.state_of(False, each, answers=True, cancelled=False, restarted=True) for each in rows]
    assert found == states


def test_the_folder_outranks_slurm_and_silence_is_not_the_end() -> None:
    # Broken: a job whose process died after its last word counts as failed; or a controller's restart ends everything.
    for row_ in (row("FAILED"), row("NODE_FAIL"), None):
        assert monitor.state_of(True, row_, answers=True, cancelled=False) == "done"
    assert monitor.state_of(False, None, answers=False, cancelled=False) == "unknown"
    assert monitor.state_of(False, None, answers=True, cancelled=True) == "cancelled"


def submitted(out: Path, config: Config, *stages: str) -> Submission:
    """A submission whose jobs nobody sent."""
    submission = ledger.new(out, "slurm")
    submission.key = KEY
    submission.jobs = [Job(stage, str(7 + i), f"fewstep:run:{stage}:{KEY}") for i, stage in enumerate(stages)]
    submission.save()
    ledger.write_config(submission, config)
    return submission


def test_a_reused_id_of_another_job_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, debug_config: Config
) -> None:
    # Broken: after a crash of the controller someone's running job with our old id keeps `resume` from working.
    submission = submitted(tmp_path, debug_config, "teacher")
    monkeypatch.setattr(slurm, "queue", lambda: [row("RUNNING", name="fewstep:run:teacher:ffffffff")])
    assert monitor.at_work(tmp_path) is None
    assert {part.stage: part.state for part in monitor.look(tmp_path)}["teacher"] == "lost"
    monkeypatch.setattr(slurm, "queue", lambda: [row("RUNNING")])
    found = monitor.at_work(tmp_path)
    assert found is not None
    assert found.folder == submission.folder


def test_status_reads_progress_and_errors_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken: progress or the time left is wrong, a line cut short by a crash breaks the table, an error is not shown.
    halvings = ["stages.halve.steps=[2,1]", "stages.halve.updates=100", "stages.halve.updates_at={1: 50}"]
    config = digits("~stages.evaluate", "~stages.report", *halvings)
    submission = submitted(tmp_path, config, "teacher", "guide", "halve")
    for name, lines in {"steps_2": [], "steps_1": [(10, 100.0), (20, 105.0)]}.items():
        folder = tmp_path / "halve" / name
        folder.mkdir(parents=True)
        told = "".join(json.dumps({"step": step, "time": at}) + "\n" for step, at in lines)
        (folder / "metrics.jsonl").write_text(told + '{"step": 3')
    record.finish(tmp_path / "halve" / "steps_2", 1.0)
    (submission.logs / "7_0.error").write_text("ConfigError: of an earlier start\n")
    (submission.logs / "7_1.error").write_text("TrainingError: not finite\n")
    guide, halve = (f"fewstep:run:{stage}:{KEY}" for stage in ("guide", "halve"))
    rows = [row("FAILED"), row("CANCELLED", guide, "8"), row("RUNNING", halve, "9")]
    monkeypatch.setattr(slurm, "queue", lambda: rows)
    parts = {part.stage: part for part in monitor.look(tmp_path)}
    assert parts["teacher"].error == "TrainingError: not finite"
    assert (parts["guide"].state, parts["guide"].error) == ("cancelled", "teacher: failed")
    assert parts["halve"].progress == monitor.Progress(120, 150, 15.0)  # 30 updates at 2 a second
    console = Console(width=160, record=True, quiet=False, file=(tmp_path / "table").open("w"))
    console.print(table(list(parts.values())))
    assert "120/150 (80%)" in (text := console.export_text())
    assert "15 s" in text


def test_an_older_attempt_neither_claims_nor_writes(tmp_path: Path) -> None:
    # Broken: the copy of a job that a frozen node still runs writes beside the requeued one.
    first, second, resumed = Attempt(1, 0, "99"), Attempt(1, 1, "99"), Attempt(2, 0, "98")
    for attempt in (first, second):
        attempt.claim(tmp_path)
        attempt.check(tmp_path)
    with pytest.raises(Superseded, match=r"belongs to submission 1, job 99, restart 1"):
        first.check(tmp_path)
    with pytest.raises(Superseded):
        first.claim(tmp_path)
    resumed.claim(tmp_path)
    with pytest.raises(Superseded):
        second.check(tmp_path)


def test_submitit_is_told_what_a_requeueing_job_needs(tmp_path: Path) -> None:
    # Broken: processes hang when one is killed, a job is not requeued, waits for ever for a failed one, or a stage that
    # does not train takes four nodes.
    cluster = digits(
        "cluster=slurm", "cluster.nodes=4", "cluster.gpus_per_node=8", "cluster.cpus_per_node=64", "cluster.mem_gb=1.5",
        "cluster.partition=gpu", "cluster.sbatch.hold=true",
    ).cluster  # fmt: skip
    submission = ledger.new(tmp_path, "slurm")
    train = parameters(submission, cluster, "teacher", ["5", "6"], training=True)
    assert (train["nodes"], train["ntasks_per_node"], train["gpus_per_node"], train["cpus_per_task"]) == (4, 8, 8, 8)
    assert train["dependency"] == "afterok:5:6"
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=8"} <= set(train["srun_args"])
    more = train["additional_parameters"]
    assert (more["requeue"], more["kill-on-invalid-dep"], more["hold"]) == (True, "yes", True)
    assert (train["mem"], train["partition"], train["signal_delay_s"]) == ("1536MB", "gpu", 120)
    other = parameters(submission, cluster, "evaluate", [], training=False)
    assert (other["nodes"], other["ntasks_per_node"], other["gpus_per_node"], other["cpus_per_task"]) == (1, 1, 1, 64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster=slurn"], "cluster=slurn: no such choice; known: debug, local, slurm"),
        (["cluster.nodes=2"], "cluster.nodes=2: cluster=local has one node; use cluster=slurm"),
        (["cluster=slurm", "cluster.time=0"], "cluster.time=0: must be 1 or more"),
        (["cluster=slurm", "cluster.time=2"], "cluster.signal_seconds=120: must be less than the 2 minutes of time"),
        (["cluster=slurm", "cluster.cpus_per_node=4"], "cluster.cpus_per_node=4: must be at least the 8 tasks"),
        (["cluster.setup=[module load cuda]"], "cluster.setup=.*runs no shell"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits(*overrides)


def test_pickles_are_read_in_private_folders_alone(tmp_path: Path) -> None:
    # Broken: anyone who may write there runs code as the user.
    (tmp_path / ".cluster").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="must belong to you alone"), ledger.locked(tmp_path):
        pass
    (tmp_path / ".cluster").chmod(0o700)
    with ledger.locked(tmp_path):
        with pytest.raises(ConfigError, match="another `fewstep submit` is at work"), ledger.locked(tmp_path):
            pass
        assert ledger.new(tmp_path, "slurm").logs.stat().st_mode & 0o077 == 0


def test_the_config_that_was_submitted_comes_back_whole(tmp_path: Path, debug_config: Config) -> None:
    # Broken: a job runs another experiment than was submitted.
    config = altered(debug_config, "stages.halve.updates_at", {4: 12})
    assert ledger.read_config(submitted(tmp_path, config, "teacher")) == config
    changed = altered(config, "stages.teacher.lr", 0.5)
    assert record.first_change(config, altered(config, "cluster.time", 5)) is None
    assert record.first_change(config, changed) == ("stages.teacher.lr", config.stages["teacher"].lr, 0.5)


def test_processes_meet_without_a_port_being_chosen_beforehand(tmp_path: Path) -> None:
    # Broken: two jobs on a node draw the same port.
    met: list[TCPStore] = []

    def come(rank: int) -> None:
        met.append(meet(tmp_path / "place", rank, 3, 60.0))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({store.port for store in met}) == 1
    met[0].set("said", "by one")
    assert [store.get("said") for store in met] == [b"by one"] * 3


def test_a_warning_during_the_imports_does_not_end_the_process() -> None:
    # Broken: a job that is preempted, or near its limit, while it starts counts as crashed, and after a few as failed.
    program = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print(' '.join(__import__('sys').argv[1:]))"
    command = f"{patient(shlex.quote(sys.executable))} -c {shlex.quote(program)} 'one word' two"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "one word two\n")
