"""Two processes train as one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lab_configs import DIGITS, MOMENTS

from fewstep.lab.cli import main
from fewstep.models import load

# No evaluation, and a teacher and a guide of a few updates: what is shared between processes is the training.
SHORT = [
    "~stages.classifier", "~stages.halve", "~stages.evaluate", "~stages.report",
    "stages.teacher.log_every=1", "stages.guide.log_every=1", "stages.teacher.updates=9", "stages.guide.updates=9",
    "stages.guide.accumulate=2",
]  # fmt: skip


def arguments(out: Path, *more: str) -> list[str]:
    return ["run", str(DIGITS), "preset=debug", f"out={out}", *SHORT, *more]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def torchrun(processes: int, *arguments: str) -> None:
    """What `torchrun --nproc-per-node` does, without its seconds of start-up: the environment, and one port."""
    everyone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "fewstep.lab", *arguments],
            env={**os.environ, **everyone, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(processes)
    ]
    for process in started:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_make_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    # Broken: more GPUs train on repeated images or noise, or the embedding of w gets no gradient behind DDP
    # (diffusers #6278); either shows in the losses and weights.
    assert main(arguments(tmp_path / "one")) == 0
    torchrun(2, *arguments(tmp_path / "two"))
    for stage in ("teacher", "guide"):
        one, two = losses(tmp_path / "one" / stage), losses(tmp_path / "two" / stage)
        assert two == pytest.approx(one, rel=2e-4)
        ours, theirs = (load(tmp_path / name / stage / "model").state_dict() for name in ("one", "two"))
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-2, atol=2e-4)
    assert json.loads((tmp_path / "two/guide/run.json").read_text())[0]["world_size"] == 2


MATCHING = [
    "run", str(MOMENTS), "preset=debug", "stages.teacher.updates=4", "stages.moments.steps=[2]",
    *(f"~stages.{name}" for name in ("classifier", "sweep", "guide", "halve", "compare", "report")),
    *(f"stages.{name}.{key}" for name in ("moments", "instant") for key in ("updates=4", "log_every=1", "warmup=0")),
]  # fmt: skip


@pytest.mark.slow
def test_moment_matching_on_two_processes_is_that_on_one(tmp_path: Path) -> None:
    # Broken: two networks in turns hang or drift behind DDP; the instant form's gradient by the teacher, which DDP's
    # hooks never see, is each process's own, so that the student is matched to half the batch.
    assert main([*MATCHING, f"out={tmp_path / 'one'}"]) == 0
    torchrun(2, *MATCHING, f"out={tmp_path / 'two'}")
    for stage in ("moments", "instant"):
        one, two = (losses(tmp_path / name / stage / "steps_2") for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-2)
        assert len(one) == 4
