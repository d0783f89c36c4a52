"""What can be known of jobs without SLURM: states, fences, what submitit is told, private folders, progress."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lab_configs import DIGITS, altered, digits
from rich.console import Console
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch re-exports it without saying so

from fewstep.lab import record
from fewstep.lab.cli import main
from fewstep.lab.cluster import job, ledger, monitor, slurm
from fewstep.lab.cluster.attempt import Attempt, Superseded
from fewstep.lab.cluster.choice import chosen
from fewstep.lab.cluster.ledger import Job, Submission
from fewstep.lab.cluster.rendezvous import meet
from fewstep.lab.cluster.slurm import Row
from fewstep.lab.cluster.submit import parameters, patient
from fewstep.lab.cluster.table import table
from fewstep.lab.config import Config, ConfigError
from fewstep.lab.progress import PROGRESS, teller
from fewstep.lab.runner import locked

KEY = "abcd1234"


def row(state: str, name: str = f"fewstep:run:teacher:{KEY}", identity: str = "7") -> Row:
    return Row(identity, state, "n1", "None", name)


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


def test_what_squeue_has_forgotten_is_known_from_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, debug_config: Config
) -> None:
    # Broken: five minutes after its end (MinJobAge) a probe that succeeded is "lost", a job that failed too.
    submission = submitted(tmp_path, debug_config, "probe", "teacher", "guide")
    waiting = row("PENDING", f"fewstep:run:teacher:{KEY}", "8")
    for rows, log, states in (
        ([waiting], None, ("done", "pending")),
        ([], "8_0_log.out", ("done", "lost")),
        ([], "8_0.error", ("done", "failed")),
    ):
        monkeypatch.setattr(slurm, "queue", lambda rows=rows: rows)
        if log is not None:
            (submission.logs / log).write_text("TrainingError: not finite\n")
        parts = {part.stage: part for part in monitor.look(tmp_path)}
        assert (parts["probe"].state, parts["teacher"].state) == states
    assert (parts["guide"].state, parts["guide"].error) == ("cancelled", "teacher: failed")
    assert parts["teacher"].error == "TrainingError: not finite"


def test_a_row_for_each_shard_says_how_far_it_is_and_which_of_them_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken: nobody sees how long an array will take, or why what puts its pieces together never ran.
    submission = ledger.new(tmp_path, "slurm")
    submission.jobs = [Job("sample", "7", "a", shards=3), Job("collect", "8", "b", shards=1)]
    submission.save()
    for done, at in ((100, 1000.0), (200, 1004.0)):
        with (submission.logs / "sample.1.jsonl").open("a") as file:
            file.write(json.dumps({"step": done, "total": 500, "time": at}) + "\n")
    (submission.logs / "sample.0.done").touch()
    (submission.logs / "7_2_0.error").write_text("OSError: No space left on device\n")
    rows = [row("RUNNING", "a", "7_1"), row("FAILED", "a", "7_2"), row("CANCELLED", "b", "8")]
    monkeypatch.setattr(slurm, "queue", lambda: rows)
    first, second, third, collect = monitor.look(tmp_path)
    assert (first.state, third.state, third.error) == ("done", "failed", "OSError: No space left on device")
    assert second.progress == monitor.Progress(200, 500, 12.0)  # 25 a second
    assert (collect.state, collect.error) == ("cancelled", "sample 2: failed")


def test_a_stage_that_samples_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, debug_config: Config
) -> None:
    submitted(tmp_path, debug_config, "evaluate")
    (tmp_path / "evaluate").mkdir()
    tell = teller(tmp_path / "evaluate" / PROGRESS)
    tell(0, 160)
    tell(40, 160)
    monkeypatch.setattr(slurm, "queue", lambda: [row("RUNNING", f"fewstep:run:evaluate:{KEY}")])
    part = {part.stage: part for part in monitor.look(tmp_path)}["evaluate"]
    assert (part.state, part.progress.done, part.progress.total) == ("running", 40, 160)


def test_near_its_limit_a_job_requeues_itself_whatever_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken: a step or chunk longer than the warning ends the job for good at its time limit.
    asked: list[Submission] = []
    monkeypatch.setattr(job, "requeue_once", asked.append)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 1.2))
    submission = ledger.new(tmp_path, "slurm")
    for rank, times in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        with job.requeued_in_time(submission, minutes=60, signal_seconds=2):
            time.sleep(0.4)
        assert len(asked) == times
    monkeypatch.delenv("SLURM_JOB_END_TIME")  # Slurm 22.05 does not tell; imports may have taken longer than is left
    monkeypatch.setenv(job.STARTED, str(time.time() - 3600 + 1.2))
    with job.requeued_in_time(submission, minutes=60, signal_seconds=2):
        time.sleep(0.4)
    assert len(asked) == 2
    with job.requeued_in_time(submission, minutes=61, signal_seconds=2):
        pass
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 1.2))
    with job.requeued_in_time(submission, minutes=60, signal_seconds=2):
        pass
    time.sleep(0.4)
    assert len(asked) == 2  # nothing to requeue any more


def test_a_job_asks_again_to_be_requeued_while_the_controller_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken: the controller is restarted in the second in which a job has saved, and the job counts as failed.
    submission, asked = ledger.new(tmp_path, "slurm"), []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr(job, "PATIENCE", (0, 0))

    def requeue(identity: str) -> None:
        asked.append(identity)
        if len(asked) < 3:
            raise slurm.SlurmError("scontrol: no answer")

    def states(*found: str | None) -> None:
        asked.clear()
        left = list(found)
        monkeypatch.setattr(slurm, "state", lambda identity: left.pop(0))

    monkeypatch.setattr(slurm, "requeue", requeue)
    states(None, None, "RUNNING")
    job.requeue_once(submission)
    assert asked == ["7", "7", "7"]
    states(None, "COMPLETING")  # Slurm has seen to it meanwhile
    job.requeue_once(submission)
    assert asked == ["7"]
    submission.logs.mkdir(parents=True, exist_ok=True)
    (submission.logs / "7.cancelled").touch()
    states("RUNNING")
    job.requeue_once(submission)
    assert not asked


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
    assert train["setup"][0] == "export FEWSTEP_STARTED=$(date +%s)"  # before `module load`, too
    other = parameters(submission, cluster, "evaluate", [], training=False)
    assert (other["nodes"], other["ntasks_per_node"], other["gpus_per_node"], other["cpus_per_task"]) == (1, 1, 1, 64)


def submit(out: Path, *overrides: str) -> int:
    return main(["submit", str(DIGITS), "preset=debug", f"out={out}", *overrides])


def test_no_slurm_or_gpus_on_this_machine_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(tmp_path, "cluster=slurm") == 2
    assert capsys.readouterr().err == (
        "fewstep: cluster=slurm: no SLURM on this machine (sbatch is not in PATH); use cluster=local\n"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert submit(tmp_path, "cluster=local", "cluster.gpus_per_node=2", "cluster.cpus_per_node=2") == 2
    assert capsys.readouterr().err == "fewstep: cluster.gpus_per_node=2: this machine has 1 CUDA devices\n"
    assert not (tmp_path / ".cluster").exists()


def test_a_run_and_a_submission_of_it_keep_out_of_each_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], debug_config: Config
) -> None:
    # Broken: two trainings write into one folder, since jobs take no lock and `fewstep run` claims nothing.
    with ledger.locked(tmp_path):
        submitted(tmp_path, debug_config, "teacher")
    run = ["run", str(DIGITS), "preset=debug", f"out={tmp_path}"]
    monkeypatch.setattr(slurm, "queue", lambda: [row("RUNNING")])
    assert main(run) == 2
    assert "submission 1 is at work there" in capsys.readouterr().err
    monkeypatch.setattr(slurm, "queue", list)
    with locked(tmp_path):
        assert submit(tmp_path, "cluster=local") == 2
    assert "another run is at work there" in capsys.readouterr().err


def test_a_cluster_in_a_file_of_ones_own(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("kind: slurm\npartition: gpu\ntime: 240\n")
    found = chosen([f"cluster={site}", "cluster.time=30"])
    assert (found.kind, found.partition, found.time) == ("slurm", "gpu", 30)
    site.write_text("kind: slurm\npartitoin: gpu\n")
    with pytest.raises(ConfigError, match="partitoin"):
        chosen([f"cluster={site}"])


def test_a_job_goes_to_where_it_was_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken: relative paths (data, targets, references) lead nowhere on a node, or elsewhere after a `resume`.
    monkeypatch.chdir(tmp_path)
    submission = ledger.new(tmp_path / "run", "slurm")
    submission.save()
    monkeypatch.chdir("/")
    job._go_to(submission)
    assert Path.cwd() == tmp_path
    assert resumed_from(submission, tmp_path / "elsewhere", monkeypatch) == tmp_path


def resumed_from(submission: Submission, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `fewstep resume` of a command goes on when it is given in `place`."""
    place.mkdir()
    submission.command = ["sample", "--nothing"]
    submission.save()
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit):  # that command's own words against --nothing
        main(["resume", str(submission.folder.parents[1])])
    return Path.cwd()


@pytest.mark.parametrize("made", ["stage", "shard", "neither"])
def test_what_is_done_is_done_however_its_processes_ended(tmp_path: Path, made: str) -> None:
    # Broken: torch aborts after the last word of a job, and all that hangs on it is cancelled.
    cluster = digits("cluster=slurm", "cluster.retries=0").cluster
    submission = ledger.new(tmp_path / "my runs", "slurm")
    lines = parameters(submission, cluster, "teacher", [], training=True)["teardown"]
    if made == "stage":
        (tmp_path / "my runs" / "teacher").mkdir()
        (tmp_path / "my runs" / "teacher" / "DONE").touch()
    if made == "shard":
        (submission.logs / "teacher.3.done").touch()
    ids = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    script = "\n".join(["(exit 134)", *lines])
    done = subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"], **ids})
    assert done.returncode == (134 if made == "neither" else 0)


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


@pytest.mark.parametrize("text", ["later: 3\n", "stages: [\n", "stages: {teacher: {kind: unheard_of}}\n", "- 1\n"])
def test_a_config_of_another_version_is_one_line(
    tmp_path: Path, debug_config: Config, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    submission = submitted(tmp_path, debug_config, "teacher")
    (submission.folder / "config.yaml").write_text(text)
    assert main(["resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{submission.folder / 'config.yaml'}: not a config of this version" in said
    assert said.count("\n") == 1


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
