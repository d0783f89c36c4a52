"""A real SLURM cluster in this machine for tests, and the smallest experiment that its jobs can do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.lab.cli import main
from fewstep.lab.cluster import slurm
from fewstep.lab.cluster.monitor import DONE, ENDED, Part, look
from fewstep.models import load

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "slurm_dev_cluster.sh"
UPDATES = 240
TEACHER = [
    "preset=debug", "threads=1", "tensorboard=false", "~stages.classifier", "~stages.guide", "~stages.halve",
    "~stages.evaluate", "~stages.report", f"stages.teacher.updates={UPDATES}", "stages.teacher.log_every=20",
    "stages.teacher.checkpoint_updates=40", "stages.teacher.checkpoint_seconds=0",
]  # fmt: skip
SITE = ["cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_node=1", "cluster.time=60"]
PATIENCE = 600.0  # seconds; nothing is timed, this only ends a test that hangs


class Cluster:
    """The cluster, and what tests do to it."""

    def __init__(self, root: Path, port: int) -> None:
        self._environment = {
            "SLURM_DEV_ROOT": str(root),
            "SLURM_DEV_PORT": str(port),
            "SLURM_DEV_DB": "0",
            "SLURM_DEV_NODES": "2",
        }
        os.environ["SLURM_CONF"] = str(root / "etc" / "slurm.conf")

    def tool(self, *arguments: str) -> str:
        """Run tools/slurm_dev_cluster.sh."""
        done = subprocess.run(
            ["bash", str(TOOL), *arguments],
            env={**os.environ, **self._environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def clear(self) -> None:
        """End every job that a test left."""
        rows = [row.id for row in slurm.queue() or [] if row.state in slurm.LIVE]
        if rows:
            slurm.cancel(*rows)


def installed() -> bool:
    """Whether the daemons are there; Debian keeps them out of users' PATH."""
    return shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None


def submit(out: Path, *overrides: str, stages: list[str] = TEACHER) -> int:
    """`fewstep submit` of the small experiment to the cluster."""
    return main(["submit", str(ROOT / "experiments" / "digits"), *stages, *SITE, f"out={out}", *overrides])


def until(what: Callable[[], bool], text: str, patience: float = PATIENCE) -> None:
    """Wait for it."""
    end = time.monotonic() + patience
    while not what():
        assert time.monotonic() < end, text
        time.sleep(0.2)


def settled(out: Path, settle: float = 4.0) -> dict[str, Part]:
    """The run's parts by stage once nothing changes any more: Slurm may call a job failed that it then runs again."""
    end, since = time.monotonic() + PATIENCE, None
    while time.monotonic() < end:
        parts = look(out)
        if all(part.state == DONE for part in parts):
            return {part.stage: part for part in parts}
        over = all(part.state in {*ENDED, DONE} for part in parts)
        since = (since or time.monotonic()) if over else None
        if since is not None and time.monotonic() - since > settle:
            return {part.stage: part for part in parts}
        time.sleep(0.5)
    raise AssertionError(f"not settled within {PATIENCE:g} s: {look(out)}")


def finished(out: Path, *stages: str) -> None:
    """Wait until these stages are done; fail at once with what `status` knows where they cannot be any more."""
    parts = settled(out)
    assert all(parts[stage].state == DONE for stage in stages), parts


def reached(out: Path, step: int, stage: str = "teacher") -> Callable[[], bool]:
    """Whether the training of the stage has written a checkpoint of at least that many updates."""

    def look_there() -> bool:
        found = [int(path.stem) for path in (out / stage / "checkpoints").glob("[0-9]*.safetensors")]
        return max(found, default=0) >= step

    return look_there


def job_of(out: Path, stage: str = "teacher") -> str:
    """Id of the stage's job in the last submission."""
    folder = sorted((out / ".cluster").glob("[0-9]*"))[-1]
    jobs = json.loads((folder / "submission.json").read_text())["jobs"]
    return str(next(job["id"] for job in jobs if job["stage"] == stage))


def kill_process(job: str, rank: int = 0) -> None:
    """SIGKILL to one process of a job, as the kernel does when memory runs out."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:  # gone, or another user's
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        if wanted <= set(environment.split(b"\0")) and b"submitit.core._submit" in command:
            os.kill(int(folder.name), signal.SIGKILL)
            return
    raise AssertionError(f"job {job} has no process of rank {rank}")


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved model."""
    return load(folder / "model").state_dict()


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Every weight is the same to the last bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def steps_told(folder: Path) -> list[int]:
    """Steps in metrics.jsonl, in the order of its lines."""
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
