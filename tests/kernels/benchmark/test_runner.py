"""A run loses nothing but the task that fails: not to errors, crashes, hangs, nor to its own clock."""

import json
import time
from pathlib import Path

import pytest

from fewstep.kernels.benchmark.results import Results
from fewstep.kernels.benchmark.runner import LEFT, Run, Stage
from fewstep.kernels.benchmark.task import CHECK, TIME, Settings

TESTS = Path(__file__).parents[2]
HERE = {"PYTHONPATH": str(TESTS)}
MADE = {"device": "d", "versions": {}, "commit": "c"}


def run_of(path: Path, *names: str, seconds: float = 120.0, longest: float = 60.0) -> Run:
    deadline = time.monotonic() + seconds
    settings = Settings("cpu", "tiny", ops=names)
    return Run(settings, Results(path, MADE), deadline, longest, lambda text: None)


def stage(workers: int = 1, seconds: float = 120.0, kinds: tuple[str, ...] = (CHECK, TIME)) -> Stage:
    return Stage("benchmark_tasks", kinds, workers, seconds, HERE)


def test_errors_and_crashes_cost_their_own_task_only(tmp_path: Path) -> None:
    """On a lent GPU one bad kernel would otherwise cost the figures of all that come after it."""
    path = tmp_path / "results.json"
    run = run_of(path, "a_good", "b_broken", "c_good", "d_spoiled", "e_good", "f_crash", "g_good")
    run.walk(stage())
    found = json.loads(path.read_text())
    rows = {row["op"]: row for row in found["rows"]}
    assert set(rows) == {"a_good", "b_broken", "c_good", "e_good", "f_crash", "g_good"}
    assert run.failed == ["b_broken triton", "d_spoiled triton", "f_crash triton"]
    assert found["notes"]["b_broken triton"] == "RuntimeError: two lines"
    assert found["notes"]["f_crash triton"] == "its process ended: -11"
    # an error of Python's leaves the process usable; one of CUDA's, or a crash, does not
    pids = [rows[name]["process"] for name in ("a_good", "c_good", "e_good", "g_good")]
    assert pids[0] == pids[1]
    assert len(set(pids)) == 3


def test_a_task_that_hangs_is_stopped(tmp_path: Path) -> None:
    """A compiler that never returns must not use up the machine."""
    run = run_of(tmp_path / "results.json", "a_hang", "b_good", longest=3.0)
    run.walk(stage())
    assert {key[0] for key in run.results.rows} == {"a_hang", "b_good"}
    assert run.results.notes["a_hang triton"].startswith("stopped after 3")


def test_the_clock_stops_a_run_and_what_is_left_is_named(tmp_path: Path) -> None:
    """A run on borrowed time must end by itself, and an unmeasured shape must not look like one that does not exist."""
    run = run_of(tmp_path / "results.json", "a_good", "b_hang", "c_good", seconds=15.0, longest=500.0)
    began = time.monotonic()
    run.walk(stage())
    run.finish("benchmark_tasks")
    assert time.monotonic() - began < 40
    assert {"b_hang triton", "c_good triton"} <= set(run.results.notes)
    assert {run.results.notes[name] for name in ("b_hang triton", "c_good triton")} == {LEFT}
    assert run.failed == []


def test_a_stage_that_ran_out_leaves_its_tasks_to_a_later_one(tmp_path: Path) -> None:
    """Stages have shares of the clock: time that one leaves over goes to what another could not do."""
    run = run_of(tmp_path / "results.json", "a_good", "late_good", "b_good")
    run.walk(stage(seconds=0.0))
    assert run.results.rows == {}
    run.walk(stage(kinds=(TIME,)))
    assert {key[0] for key in run.results.rows} == {"late_good"}
    run.walk(stage(workers=2), stage(workers=1))
    assert {key[0] for key in run.results.rows} == {"a_good", "late_good", "b_good"}


def test_a_task_without_memory_beside_others_is_done_again_alone(tmp_path: Path) -> None:
    """Checks share the device by many processes: the largest shapes would be wrong for no fault of theirs."""
    run = run_of(tmp_path / "results.json", "a_full", "b_good")
    run.walk(stage(workers=2))
    assert run.failed == []
    assert run.done == {"b_good triton"}
    run.walk(stage())
    assert run.failed == ["a_full triton"]                         # alone, and still too large: once is enough
    assert "OutOfMemoryError" in run.results.notes["a_full triton"]
    run.walk(stage())
    assert run.failed == ["a_full triton"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers inherit the path on which the tasks are found."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
