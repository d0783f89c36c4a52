"""experiments/digits_moments from the command line to the page, debug-size."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_configs import MOMENTS

from fewstep.lab.classifier import load_classifier
from fewstep.lab.cli import main
from fewstep.lab.config import DataConfig
from fewstep.lab.data import load_data
from fewstep.lab.metrics import Moments, frechet_distance
from fewstep.models import load
from fewstep.samplers import ancestral
from fewstep.schedules import Karras, sample_seeds, seeded_noise

pytestmark = pytest.mark.slow  # the fixture: a whole run
KARRAS = "stages.moments.schedule={type: Karras, sigma_max: 20}"
SMALL = [
    "preset=debug", "stages.classifier.updates=20", "stages.sweep.workers=1", "stages.compare.workers=1",
    "stages.sweep.steps=4", "stages.guide.updates=2", "stages.halve.updates=2", "stages.halve.updates_at={}",
    KARRAS, KARRAS.replace("moments", "instant"),
]  # fmt: skip
NOISE = (1, 8, 8)


def command(verb: str, out: Path, *more: str) -> list[str]:
    return [verb, str(MOMENTS), *SMALL, f"out={out}", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "moments"
    assert main(command("report", out)) == 0
    return out


@pytest.fixture(scope="module")
def results(finished: Path) -> dict[str, Any]:
    return dict(json.loads((finished / "compare" / "results.json").read_text()))


def row(results: dict[str, Any], stage: str, steps: int, w: float = 0.0) -> dict[str, Any]:
    (found,) = (r for r in results["rows"] if (r["stage"], r["steps"], r["w"]) == (stage, steps, w))
    return dict(found)


def test_everyone_is_sampled_as_it_was_trained_to_be(results: dict[str, Any]) -> None:
    """A moments student by ddim, or at a w that it never saw, would be measured as something that nobody trained."""
    found = {(r["stage"], r["steps"]): r["sampler"] for r in results["rows"]}
    students = {(stage, steps) for stage in ("moments", "instant", "halve") for steps in (2, 1)}
    assert set(found) == students | {("teacher", 4)}
    assert {name for name, sampler in found.items() if sampler == "ddim"} == {("halve", 2), ("halve", 1)}
    assert sorted(r["w"] for r in results["rows"] if (r["stage"], r["steps"]) == ("halve", 2)) == [0.0, 0.3]
    assert [r["w"] for r in results["rows"] if r["stage"] in ("moments", "instant")] == [0.0] * 4
    assert row(results, "moments", 2)["nfe"] == 2
    assert row(results, "moments", 2)["training"]["student_updates"] == 4  # of 8: the others are the auxiliary's
    assert row(results, "instant", 2)["training"]["student_updates"] == 6


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_those_of_the_saved_student(finished: Path, results: dict[str, Any], seed: int) -> None:
    """From the model's folder to the FID by another way: sampler, schedule, seeds, judge, held-out images."""
    student = load(finished / "moments" / "steps_2" / "model")
    assert student.schedule == Karras(sigma_max=20)
    images = []
    for start, stop in ((0, 25), (25, 40)):
        seeds = sample_seeds(2, seed, torch.arange(start, stop))
        images.append(
            ancestral(student, seeded_noise(seeds, NOISE), 2, torch.arange(start, stop) % 10, 0.0, seeds=seeds)
        )
    judge = load_classifier(finished / "classifier" / "model")
    with torch.no_grad():
        ours = judge(torch.cat(images).clamp(-1, 1))[0]
        theirs = judge(load_data(DataConfig()).heldout.images)[0]
    expected = frechet_distance(Moments.of(ours.double()), Moments.of(theirs.double()))
    measured = row(results, "moments", 2)
    assert measured["seeds"][seed]["fid_heldout"] == pytest.approx(expected, rel=1e-3)


def test_means_spreads_and_targets_are_of_the_seeds(results: dict[str, Any]) -> None:
    for found in results["rows"]:
        one, other = (seed["fid_heldout"] for seed in found["seeds"])
        assert one != other  # independent noises, not the same set twice
        assert found["mean"]["fid_heldout"] == pytest.approx((one + other) / 2, rel=1e-4)
        assert found["std"]["fid_heldout"] == pytest.approx(abs(one - other) / 2**0.5, rel=1e-3)
    to_teacher, to_other = results["targets"]
    teacher = next(r for r in results["rows"] if r["stage"] == "teacher")
    fids = [row(results, "moments", 2)["mean"]["fid_heldout"], teacher["mean"]["fid_heldout"]]
    assert to_teacher["value"] == pytest.approx(fids[0] / fids[1], rel=1e-4)
    assert to_teacher["pass"] == (to_teacher["value"] <= 1.1)
    assert to_other["kind"] == "at_least"


def test_the_teacher_that_is_compared_is_the_sweeps_best(finished: Path, results: dict[str, Any]) -> None:
    sweep = json.loads((finished / "sweep" / "results.json").read_text())
    assert {(r["noise_level"], r["w"]) for r in sweep["rows"]} == {(n, w) for n in (0, 0.5) for w in (0, 0.3)}
    assert len({r["fid_heldout"] for r in sweep["rows"]}) > 1  # the noise level reached the sampler
    best = min(sweep["rows"], key=lambda r: r["fid_heldout"])
    teacher = next(r for r in results["rows"] if r["stage"] == "teacher")
    assert all(teacher[key] == best[key] for key in ("noise_level", "w", "steps"))


def test_sweep_is_its_own_stage_that_other_students_do_not_ask_for_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its 128 steps of nine teachers cost more than what most changes to a distillation do."""
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    for folder in ("moments", "compare", "report"):
        shutil.rmtree(out / folder)
    capsys.readouterr()
    assert main(command("evaluate", out, "stages.moments.warmup=2")) == 0
    said = capsys.readouterr().out
    assert "sweep  done before" in said
    assert "instant  done before" in said
    assert (out / "compare" / "results.json").is_file()
    assert not (out / "report").exists()


def test_report_shows_every_row_and_picture(finished: Path, results: dict[str, Any]) -> None:
    page = (finished / "report" / "index.html").read_text()
    for picture in ("samples", "quality", "sweep", "training"):
        assert f'src="{picture}.png"' in page
        assert (finished / "report" / f"{picture}.png").stat().st_size > 5000
    table = (finished / "report" / "table.md").read_text()
    for found in results["rows"]:
        mean, std = found["mean"], found["std"]
        assert f"{mean['fid_heldout']:.3f} ± {std['fid_heldout']:.3f}" in table
        assert f"{mean['recall']:.3f} ± {std['recall']:.3f}" in table
    assert "not Inception" in table
    assert len(table.splitlines()) - 6 == len(results["rows"]) == 9


def test_sample_takes_a_student_as_it_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without options it must be its own sampler, steps and w; a w that it cannot have must not be ignored."""
    from safetensors.torch import load_file

    model = finished / "moments" / "steps_2" / "model"
    assert main(["sample", "--model", str(model), "--num", "6", "--out", str(tmp_path)]) == 0
    found = load_file(tmp_path / "samples.safetensors")
    expected = ancestral(
        load(model), seeded_noise(found["seeds"], NOISE), 2, found["classes"], 0.0, seeds=found["seeds"]
    )
    assert torch.equal(found["images"], expected.clamp(-1, 1))
    assert main(["sample", "--model", str(model), "--w", "1", "--out", str(tmp_path)]) == 2
    assert "distilled without w" in capsys.readouterr().err
    assert main(["sample", "--model", str(model), "--steps", "4", "--out", str(tmp_path)]) == 2
    assert "was trained for 2 steps" in capsys.readouterr().err
    assert main(["sample", "--model", str(model), "--sampler", "ddim", "--out", str(tmp_path), "--strict"]) == 2
    assert "trained as 'moments'" in capsys.readouterr().err
