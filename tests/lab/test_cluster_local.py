"""`cluster=local`: an experiment in the background of this machine, looked at, ended and gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import ROOT, TEACHER, UPDATES, assert_same_bits, reached, settled, steps_told, until, weights

from fewstep.lab.cli import main
from fewstep.lab.cluster.monitor import look

pytestmark = pytest.mark.slow


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A run's folder; what a test leaves at work there is ended."""
    yield tmp_path / "run"
    if (tmp_path / "run" / ".cluster").exists():
        main(["cancel", str(tmp_path / "run")])


def submit(out: Path, *overrides: str) -> int:
    return main(["submit", str(ROOT / "experiments/digits"), *TEACHER, "cluster=local", f"out={out}", *overrides])


def test_a_run_in_the_background_is_cancelled_and_resumed_to_the_bits_of_one_in_the_foreground(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Broken: the command waits, or the run dies with it; `cancel` loses what was computed or leaves a process; a
    # cancelled run counts as failed; a second submission starts beside the first.
    assert submit(out) == 0
    assert submit(out) == 0
    assert "nothing new was sent" in capsys.readouterr().out
    until(reached(out, 40), "no checkpoint")
    assert main(["cancel", str(out)]) == 0
    assert settled(out)["teacher"].state == "cancelled"
    assert not (out / "teacher" / "DONE").exists()
    assert main(["resume", str(out)]) == 0
    assert settled(out)["teacher"].state == "done"
    assert steps_told(out / "teacher") == list(range(20, UPDATES + 1, 20))
    whole = tmp_path / "whole"
    assert main(["run", str(ROOT / "experiments/digits"), *TEACHER, f"out={whole}"]) == 0
    assert_same_bits(weights(out / "teacher"), weights(whole / "teacher"))


def test_two_processes_in_the_background_share_a_training_and_a_mistake_is_shown(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Broken: the processes do not find each other; or nobody learns why a run in the background ended.
    pair = ["cluster.tasks_per_node=2", "cluster.cpus_per_node=2", "stages.teacher.updates=10"]
    assert submit(out, *pair, "stages.teacher.lr=1e30") == 0
    part = settled(out)["teacher"]
    assert part.state == "failed"
    assert "not finite" in part.error
    assert json.loads((out / "teacher" / "run.json").read_text())[0]["world_size"] == 2
    capsys.readouterr()
    assert main(["logs", str(out), "teacher"]) == 0
    assert "TrainingError" in capsys.readouterr().out
    assert [each.stage for each in look(out)] == ["teacher"]
