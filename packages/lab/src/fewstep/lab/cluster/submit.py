"""From a config to jobs in the queue: one per stage, each after those that it needs."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import submitit
import torch
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fewstep.lab import record
from fewstep.lab.cluster import ledger, monitor, slurm, snapshot
from fewstep.lab.cluster.attempt import holder_of
from fewstep.lab.cluster.config import ClusterConfig
from fewstep.lab.cluster.job import STARTED, RunJob, StageJob
from fewstep.lab.cluster.ledger import PROBE, Job, Submission
from fewstep.lab.config import Config, ConfigError, TrainingConfig
from fewstep.lab.runner import locked
from fewstep.lab.validate import stage_order

LOCAL_MINUTES = 60 * 24 * 365  # no limit


def submit(config: Config) -> tuple[Submission | None, bool]:
    """Send what is not done; returns the submission and whether it is new.

    None where nothing is left to do. The same experiment submitted again while it is at work joins the jobs that are.

    Raises:
        ConfigError: no SLURM here, or for `cluster=local` not as many GPUs; the folder was made, or is being made, with
            another config, or by `fewstep run`.
        slurm.SlurmError: sbatch refused, in its own words; nothing is left in the queue.
    """
    if config.cluster.kind == "slurm":
        slurm.require()
    elif config.cluster.gpus_per_node > torch.cuda.device_count():
        here = f"this machine has {torch.cuda.device_count()} CUDA devices"
        raise ConfigError(f"cluster.gpus_per_node={config.cluster.gpus_per_node}: {here}")
    out = Path(config.out).absolute()
    config.out = str(out)
    with ledger.locked(out):
        order = stage_order(config)
        for stage in order:
            record.refuse_mixing(config, stage, out / stage)
        at_work = monitor.at_work(out)
        if at_work is not None:
            _refuse_another(ledger.read_config(at_work), config, at_work)
            return at_work, False
        with locked(out):  # no `fewstep run` is at work there
            pass
        missing = [stage for stage in order if not record.is_done(out / stage)]
        return (_send(config, out, missing), True) if missing else (None, False)


def _refuse_another(submitted: Config, config: Config, at_work: Submission) -> None:
    change = record.first_change(submitted, config)
    if change is not None:
        key, before, now = change
        raise ConfigError(
            f"{key}={now}: {config.out} is being made with {before} (submission {at_work.number}); choose another out= "
            f"or name=, or `fewstep cancel {config.out}` first"
        )


def _send(config: Config, out: Path, missing: Sequence[str]) -> Submission:
    with handed_in(out, config.cluster, config) as submission:
        if submission.kind == "local":
            _send_locally(config, submission, missing)
        else:
            _send_graph(config, submission, missing)
    return submission


@contextmanager
def handed_in(out: Path, cluster: ClusterConfig, config: Config | None) -> Iterator[Submission]:
    """A new submission with its config, if any, and code; if sending its jobs fails within, none stays in the queue.

    Raises:
        slurm.SlurmError: sbatch refused, in its own words.
    """
    submission = ledger.new(out, cluster.kind)
    if config is not None:
        ledger.write_config(submission, config)
    snapshot.take(submission.folder / "code")
    try:
        yield submission
    except BaseException as error:
        _take_back(submission)
        if isinstance(error, FailedJobError | FailedSubmissionError):
            raise slurm.SlurmError(slurm.own_words(str(error))) from error
        raise


def _send_graph(config: Config, submission: Submission, missing: Sequence[str]) -> None:
    seen = any(holder_of(Path(config.out) / stage) for stage in config.stages)
    before = [] if seen else send_probe(submission, config.cluster, config.cluster.nodes)
    for stage in missing:
        needs = [submission.job(need) for need in config.stages[stage].needs]
        after = [job.id for job in needs if job is not None] or before
        training = isinstance(config.stages[stage], TrainingConfig)
        send(submission, config.cluster, stage, [StageJob(str(submission.folder), stage)], after, training=training)


def send_probe(submission: Submission, cluster: ClusterConfig, nodes: int) -> list[str]:
    """A job of seconds, before all others: whether the nodes see the submission's folder; its id, if any is sent.

    It needs no file there to say so.
    """
    if not cluster.probe:
        return []
    asked = {key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint")}
    options = [f"--{key}={value}" for key, value in asked.items() if value is not None]
    name = job_name(submission, PROBE)
    look = f"srun --ntasks-per-node=1 test -d {shlex.quote(str(submission.folder))}"
    fixed = [f"--job-name={name}", f"--nodes={nodes}", "--time=5", "--output=/dev/null", "--chdir=/"]
    text = slurm.sbatch(*options, *fixed, f"--wrap={look}")
    _keep(submission, Job(PROBE, text, name))
    return [text]


def send(
    submission: Submission,
    cluster: ClusterConfig,
    stage: str,
    work: Sequence[Callable[[], None]],
    after: Sequence[str] = (),
    *,
    training: bool = False,
    sharded: bool = False,
) -> Job:
    """Send one job, an array where there are several pieces of `work`, that starts once those of `after` succeeded."""
    executor = submitit.SlurmExecutor(submission.logs, python=patient(cluster.python or shlex.quote(sys.executable)))
    executor.update_parameters(**parameters(submission, cluster, stage, after, training=training))
    with redirect_stderr(StringIO()):  # sbatch's words are in the error that submitit raises, too
        first, *_ = executor.submit_array(list(work)) if len(work) > 1 else [executor.submit(work[0])]
    identity = first.job_id.split("_")[0]
    tasks = cluster.nodes * cluster.tasks if training else 1
    job = Job(stage, identity, job_name(submission, stage), tasks, len(work) if sharded else 0)
    _keep(submission, job)
    return job


def patient(python: str) -> str:
    """The command `python`, deaf to Slurm's warning until it listens to it: else the signal would end an import."""
    return f"""sh -c 'trap "" USR2; exec "$0" "$@"' {python}"""


def parameters(
    submission: Submission, cluster: ClusterConfig, stage: str, after: Sequence[str], *, training: bool
) -> dict[str, Any]:
    """What submitit is told. Jobs that do not train take one task of one node, with all that it was to have there."""
    tasks = cluster.tasks if training else 1
    cpus = cluster.cpus_per_node // tasks
    return {
        "job_name": job_name(submission, stage),
        "time": cluster.time,
        "nodes": cluster.nodes if training else 1,
        "ntasks_per_node": tasks,
        "cpus_per_task": cpus,
        "gpus_per_node": (cluster.gpus_per_node if training else min(1, cluster.gpus_per_node)) or None,
        "mem": None if cluster.mem_gb is None else f"{round(1024 * cluster.mem_gb)}MB",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "dependency": "afterok:" + ":".join(after) if after else None,
        "signal_delay_s": cluster.signal_seconds,
        "array_parallelism": cluster.parallel,
        "wckey": None,
        "setup": [f"export {STARTED}=$(date +%s)", *cluster.setup, *_setup(submission, cpus)],
        "teardown": _teardown(submission, stage, cluster.retries),
        # srun takes neither of these over from sbatch: a killed process ends the others, and CPUs are each task's own.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}", *cluster.srun_args],
        "additional_parameters": {
            "requeue": True,
            "kill-on-invalid-dep": "yes",
            "chdir": str(submission.folder),
            **cluster.sbatch,
        },
    }


def _setup(submission: Submission, cpus: int) -> list[str]:
    code = shlex.quote(_code(submission))
    return [f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus}}}", f"export PYTHONPATH={code}:$PYTHONPATH"]


def _code(submission: Submission) -> str:
    return str(submission.folder / "code")


def _teardown(submission: Submission, stage: str, retries: int) -> list[str]:
    """After srun: a job one of whose processes was killed, and that no process calls a failure, starts again.

    What is done is done, however its processes ended: torch's may abort after their last word.
    """
    logs = shlex.quote(str(submission.logs))
    stage_done = shlex.quote(str(submission.folder.parents[1] / stage / "DONE"))
    shard_done = f"{logs}/{shlex.quote(stage)}.${{SLURM_ARRAY_TASK_ID:-0}}.done"
    return [
        "code=$?",
        f"[ -e {stage_done} ] || [ -e {shard_done} ] && exit 0",
        "id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        f"error={logs}/${{id:-$SLURM_JOB_ID}}_${{SLURM_RESTART_COUNT:-0}}.error",
        f"crashes={logs}/$SLURM_JOB_ID.crashes",
        'if [ $code -ge 128 ] && [ ! -e "$error" ]; then',
        '  echo "exit code $code, start ${SLURM_RESTART_COUNT:-0}" >>"$crashes"',
        f'  [ "$(wc -l <"$crashes")" -le {retries} ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ] &&',
        "    scontrol requeue $SLURM_JOB_ID",
        "fi",
        "exit $code",
    ]


def _send_locally(config: Config, submission: Submission, missing: Sequence[str]) -> None:
    # What is started inherits both: it outlives the terminal, and runs the snapshot.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.environ["PYTHONPATH"] = os.pathsep.join([_code(submission), os.environ.get("PYTHONPATH", "")])
    cluster = config.cluster
    executor = submitit.LocalExecutor(submission.logs)
    executor.update_parameters(
        timeout_min=LOCAL_MINUTES, tasks_per_node=cluster.tasks, gpus_per_node=cluster.gpus_per_node
    )
    job = executor.submit(RunJob(str(submission.folder)))
    _keep(submission, *(Job(stage, job.job_id, "", cluster.tasks) for stage in missing))


def job_name(submission: Submission, stage: str) -> str:
    """The job's name in Slurm; with the submission's key in it, a reused id is never taken for ours."""
    return f"fewstep:{submission.folder.parents[1].name}:{stage}:{submission.key}"


def _keep(submission: Submission, *jobs: Job) -> None:
    submission.jobs += jobs
    submission.save()


def _take_back(submission: Submission) -> None:
    """Part of a graph is no use: what was sent is cancelled."""
    if submission.kind == "slurm" and submission.jobs:
        slurm.cancel(*(job.id for job in submission.jobs))
    submission.jobs.clear()
    submission.save()
