"""tools/readme_results.py: the README's figures are a run's own, and nothing else of the README changes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab_results import results

from fewstep.lab.report import Material
from fewstep.lab.report.summary import markdown

TOOL = Path(__file__).parents[2] / "tools/readme_results.py"
README = "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with a README and a finished run."""
    for folder in ("evaluate", "report", "teacher", "halve/steps_4"):
        (tmp_path / "runs/r" / folder).mkdir(parents=True)
    (tmp_path / "runs/r/evaluate/results.json").write_text(json.dumps(results()))
    (tmp_path / "runs/r/report/table.md").write_text(markdown(Material("t", results())))
    (tmp_path / "runs/r/report/readme.png").write_bytes(b"picture")
    (tmp_path / "runs/r/teacher/metrics.jsonl").write_text("teacher")
    (tmp_path / "runs/r/halve/steps_4/metrics.jsonl").write_text("four")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def tool(clone: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, "runs/r", "experiments/e"], cwd=clone, capture_output=True, text=True, timeout=60
    )


def test_table_picture_and_circumstances_replace_what_was_there(clone: Path) -> None:
    """A figure without the number of samples, the features, commit and hardware behind it cannot be compared."""
    for _ in range(2):  # again: the same, not twice
        assert tool(clone).returncode == 0
        text = (clone / "README.md").read_text()
        assert text.startswith("before\n")
        assert text.endswith("<!-- results:end -->\nafter\n")
        assert "old" not in text
        assert text.count("| 4 steps |") == text.count("(experiments/e/results/readme.png)") == 1
        for part in (
            "by DPM-Solver++(2M) 64 from the same 128 noises", "in brackets, its ratio", "1,000 samples",
            "not Inception", "512 DDIM steps extrapolated from 8;",
        ):  # fmt: skip
            assert part in text
        for part in ("seed 0", "commit `0123456789`", "An Example CPU, 2 threads"):
            assert part in text


def test_measurements_are_kept_with_the_experiment(clone: Path) -> None:
    """What the README shows must be there to check, with the loss curves of every training."""
    tool(clone)
    kept = clone / "experiments/e/results"
    assert json.loads((kept / "results.json").read_text()) == results()
    assert (kept / "training/teacher.jsonl").read_text() == "teacher"
    assert (kept / "training/halve_steps_4.jsonl").read_text() == "four"


def test_a_readme_without_markers_is_left_alone(clone: Path) -> None:
    """Writing at a guessed place would destroy text."""
    (clone / "README.md").write_text("mine")
    done = tool(clone)
    assert done.returncode != 0
    assert "results:begin" in done.stderr
    assert (clone / "README.md").read_text() == "mine"
