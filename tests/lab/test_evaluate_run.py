"""Evaluation and report of a debug-size run, from the command line to the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_configs import DIGITS

from fewstep.lab.cli import main
from fewstep.models import GuidedDenoiser, load
from fewstep.samplers import ddim, dpmpp_2m
from fewstep.schedules import sample_seeds, seeded_noise

pytestmark = pytest.mark.slow  # the fixture: a whole run
# 97 training images: the teacher is sampled as many times. One process: starting others costs more than the work.
SMALL = [
    "preset=debug", "data.heldout=1700", "stages.classifier.updates=20", "stages.halve.steps=[2,1]",
    "stages.evaluate.headline=2", "stages.evaluate.workers=1", "stages.evaluate.floor=true",
    "stages.evaluate.targets.paired=[{w:3,steps:2,at_most:0.45}]", "stages.evaluate.curve_weights=[0,1]",
]  # fmt: skip


def command(out: Path) -> list[str]:
    return ["report", str(DIGITS), *SMALL, f"out={out}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main(command(out)) == 0
    return out


@pytest.fixture(scope="module")
def results(finished: Path) -> dict[str, Any]:
    return dict(json.loads((finished / "evaluate" / "results.json").read_text()))


def test_every_figure_of_the_issue_is_a_number(results: dict[str, Any]) -> None:
    """A figure that is asked for and silently absent would pass as reached."""
    names = [target["name"] for target in results["targets"]]
    asked = (
        "teacher: FID to held-out, w = 0", "dpmpp_2m 8 steps against ddim 16: RMSE, w = 0", "RMSE, w = 3",
        "paired error over best undistilled, w = 3, 2 steps", "stage one alone, 8 steps: paired error, w = 0",
        "Frechet distance to teacher over best undistilled, w = 0, 2 steps", "guidance response over teacher's",
        "FID to held-out over teacher's, w = 0, 2 steps", "ddim over its denoiser calls, seconds, batch 4",
    )  # fmt: skip
    for figure in asked:
        assert any(figure in name for name in names), figure
    assert all(isinstance(target["value"], float) for target in results["targets"])
    assert all(row["floor"] > 0 for row in results["teacher"])
    assert results["data"] == {"name": "digits", "classes": 10, "train": 97, "heldout": 1700}
    assert results["teacher_data"]["teacher"]["samples"] == 97
    assert {row["student_steps"] for row in results["curve"]} == {None, 2, 1}
    assert "not Inception" in results["features"]


def test_paired_errors_can_be_made_again_from_the_saved_models(finished: Path, results: dict[str, Any]) -> None:
    """A user with the models and the stated noise, classes, w, clamping and sampler gets the table's numbers."""
    teacher = load(finished / "teacher" / "model")
    guided = GuidedDenoiser(teacher, teacher.null_cond)
    noise = seeded_noise(sample_seeds(1, 0, torch.arange(20)), (1, 8, 8))
    labels = torch.arange(20) % 10
    truth = dpmpp_2m(guided, noise, 8, labels, 3.0).clamp(-1, 1)
    made = {
        ("student", 2): ddim(load(finished / "halve/steps_2/model"), noise, 2, labels, 3.0),
        ("baseline", 2): ddim(guided, noise, 1, labels, 3.0),
    }
    for (role, steps), images in made.items():
        wanted = {"role": role, "student_steps": steps, "w": 3.0, "sampler": "ddim"}
        (row,) = (row for row in results["rows"] if all(row[key] == value for key, value in wanted.items()))
        expected = (images.clamp(-1, 1) - truth).square().mean().sqrt().item()
        assert row["paired_error"] == pytest.approx(expected, rel=1e-3)
        assert row["nfe"] == 2


def test_a_damaged_shard_is_made_again(finished: Path, results: dict[str, Any], tmp_path: Path) -> None:
    """Killed anywhere before the results: the same command makes what is missing, and the same numbers come out."""
    out = tmp_path / "digits"
    shutil.copytree(finished, out)
    cache = out / "evaluate" / "cache"
    shards = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    damaged = max(shards, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-5])
    for name in ("DONE", "results.json"):
        (out / "evaluate" / name).unlink()
    assert main(["evaluate", *command(out)[1:]]) == 0
    assert {path for path, time in shards.items() if path.stat().st_mtime_ns != time} == {damaged}
    again = json.loads((out / "evaluate" / "results.json").read_text())
    for section in ("paired_ratios", "distance_ratios", "stage_shares", "guidance_response", "teacher_data", "judge"):
        assert _without_speed(again[section]) == _without_speed(results[section])


def _without_speed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_speed(item) for key, item in value.items() if key != "images_per_second"}
    return [_without_speed(item) for item in value] if isinstance(value, list) else value


def test_report_of_the_run(finished: Path, results: dict[str, Any]) -> None:
    """What the evaluate stage writes is what the report reads: figures, samples, curves of every training."""
    folder = finished / "report"
    html = (folder / "index.html").read_text()
    for name in ("quality", "fid_is", "stages", "speed", "training", "samples_0", "samples_3", "readme"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    (student,) = (r for r in results["rows"] if (r["role"], r["w"], r["steps"]) == ("student", 3.0, 2))
    assert f'<td class="number">{student["paired_error"]:.3f}</td>' in html
    assert f"{student['paired_error']:.3f} (" in (folder / "table.md").read_text()
    assert "num_samples: 40" in html  # the configuration
