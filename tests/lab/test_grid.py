"""The grid of w x steps on models whose samples are known; its table; the stage added to an experiment."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_configs import DIGITS
from lab_gaussians import Student, exact, noise_and_labels, plan, samples

from fewstep.lab.compose import compose, compose_grid
from fewstep.lab.config import AlignmentTarget, ConfigError, GridConfig, GridTarget, ReferenceConfig
from fewstep.lab.data import Data, Split
from fewstep.lab.evaluation import grid as grids
from fewstep.lab.evaluation.distances import Reference
from fewstep.lab.evaluation.plan import Students
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.metrics import Moments, frechet_distance
from fewstep.lab.report import grid as report
from fewstep.lab.sampling import own_sampler
from fewstep.schedules import Trained, seeded_noise

STOCHASTIC = DIGITS.parent / "digits_stochastic"
OPTIONS = GridConfig(
    num_samples=60, sampling_seeds=3, paired_noises=30, weights=[0.0, 1.0, 5.0], steps=[4, 1],
    reference=ReferenceConfig("dpmpp_2m", 40), chunk=25,
)  # fmt: skip
STUDENTS = Students("halve", {4: "halve/steps_4", 1: "halve/steps_1"}, (0.0, 2.0))
FIXED = Students("fixed", {1: "small/steps_1"}, (1.0, 1.0))


@pytest.fixture(autouse=True)
def _models_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the tests have no files: their digests stand for their weights."""
    monkeypatch.setattr(grids, "weights_of", lambda model: model.digest)


def grid(*targets: GridTarget) -> grids.Grid:
    options = GridConfig(**{**vars(OPTIONS), "targets": list(targets)})
    return grids.Grid(options, "teacher", ((STUDENTS, "deterministic"), (FIXED, "deterministic")))


def made(tmp_path: Path) -> Samples:
    found = samples(tmp_path, plan(), four=Student(0.02), one=Student(0.1))
    found.sizes = grid().requests()
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    samples(tmp_path_factory.mktemp("judge"), plan())  # registers the judge
    labels = torch.arange(90) % 3
    images = exact(seeded_noise(torch.arange(900, 990), (1, 2, 2)), labels, 0.0)
    return Reference.of("gaussians", Data(Split(images, labels), Split(images.flip(0), labels.flip(0))), kid_subsets=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "weights_of", lambda model: model.digest)
        return grids.measure(made(tmp_path_factory.mktemp("grid")), grid(), reference)


def the(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return row


def test_every_place_is_measured_once(rows: list[dict[str, Any]]) -> None:
    """A hole in the grid, a student at a w that it does not know, or a baseline of another cost, would mislead."""
    assert {(r["w"], r["column"]) for r in rows if r["stage"] == "halve"} == {(0, 4), (0, 1), (1, 4), (1, 1)}
    assert {(r["w"], r["column"]) for r in rows if r["stage"] == "fixed"} == {(1, 1)}
    for sampler in ("ddim", "dpmpp_2m"):
        found = [r for r in rows if r["kind"] == "undistilled" and r["sampler"] == sampler]
        assert len({(r["w"], r["column"]) for r in found}) == len(found) == 6
        assert all(r["nfe"] == (r["column"] if r["w"] == 0 or r["column"] > 1 else 2) for r in found)
    assert len(rows) == 4 + 1 + 12 + 3


def test_figures_are_means_over_independent_sets(
    tmp_path: Path, rows: list[dict[str, Any]], reference: Reference
) -> None:
    """FID of each set recomputed from the known samples: one set counted thrice would have no deviation."""
    row, kept = the(rows, stage="halve", w=1.0, column=1), made(tmp_path)
    expected = []
    for noises in range(3):
        images = exact(*noise_and_labels(kept, 60, noises), 1.0) + 0.1
        expected.append(frechet_distance(Moments.of(images.clamp(-1, 1).flatten(1)), reference.heldout.moments))
    assert [seed["fid_heldout"] for seed in row["seeds"]] == pytest.approx(expected, rel=1e-3)
    assert row["mean"]["fid_heldout"] == pytest.approx(statistics.fmean(expected), rel=1e-3)
    assert row["std"]["fid_heldout"] == pytest.approx(statistics.stdev(expected), rel=1e-2)
    assert row["std"]["fid_heldout"] > 0
    assert row["paired_error"] == pytest.approx(0.1, abs=2e-3)
    assert row["paired_noises"] == 30


def test_students_that_were_not_trained_are_marked(rows: list[dict[str, Any]]) -> None:
    """The 1-step stochastic student is the 2-step one: a reader must not take the column for a training of its own."""

    class Copy:
        def __init__(self, digest: str) -> None:
            self.digest = digest

    chain = {"s/4": Copy("a"), "s/2": Copy("b"), "s/1": Copy("b")}
    students = Students("s", {4: "s/4", 2: "s/2", 1: "s/1"}, (0.0, 1.0), "stochastic")
    assert grids.same_weights(chain, students) == {1: 2}
    assert all(row["same_as"] is None for row in rows)


def test_students_are_sampled_by_what_they_were_trained_for() -> None:
    """ddim on a stochastic student takes half of each of its jumps: plausible images, and the wrong figures."""
    kinds = {"deterministic": "ddim", "guided": "ddim", "stochastic": "stochastic", "moments": "ancestral"}
    assert {kind: own_sampler(Trained(kind, 4)) for kind in kinds} == kinds  # type: ignore[arg-type]  # all are kinds
    assert own_sampler(None) == "ddim"
    noisy = Students("noisy", {4: "noisy/steps_4", 1: "noisy/steps_1"}, (0.0, 2.0), "stochastic")
    assert plan(others=(noisy,)).student(4, 1.0, noisy).sampler == "stochastic"
    judged = replace(plan(), students=noisy)
    assert judged.student(4, 1.0).sampler == judged.own_teacher(1, 1.0).sampler == "stochastic"
    found = grids.Grid(OPTIONS, "teacher", ((noisy, "stochastic"),)).cells()
    assert {cell.draw.sampler for cell in found if cell.stage == "noisy"} == {"stochastic"}


def test_targets_are_ratios_of_means(rows: list[dict[str, Any]]) -> None:
    """'No worse than' is held against the mean over sampling seeds of the same w and steps; none for no such place."""
    asked = GridTarget("fixed", "halve", 1.0, 1, "fid_heldout", 1.0)
    (target,) = grids.verdicts(rows, [asked])
    pair = [the(rows, stage=name, w=1.0, column=1)["mean"]["fid_heldout"] for name in ("fixed", "halve")]
    assert target.value == pytest.approx(pair[0] / pair[1])
    assert target.reached is (pair[0] <= pair[1])
    (paired,) = grids.verdicts(rows, [GridTarget("fixed", "halve", 1.0, 1, "paired_error", 0.6)])
    assert paired.value == pytest.approx(0.5, abs=0.02)  # biases of 0.05 and 0.1
    assert list(grids.verdicts(rows, [GridTarget("fixed", "halve", 0.0, 1)])) == []


def held(stage: str, kind: str, column: int | None, share: float, unseen: float = 0.5) -> dict[str, Any]:
    whole, rest = {"share": share}, {"share": unseen}
    return {"stage": stage, "kind": kind, "w": 2.0, "column": column, "alignment": {"all": whole},
            "unseen": {"all": rest}, "steps": column or 64, "sampler": "ddim"}  # fmt: skip


def test_targets_of_captions_are_shares_or_points_below_the_teacher() -> None:
    """Held against the guided teacher's own line, not an undistilled sampler's that has the same name."""
    shown = [
        held("teacher", "teacher", None, 0.9),
        held("halve", "deterministic", 4, 0.88, 0.4),
        held("teacher", "undistilled", 4, 0.1),
    ]
    asked = [
        AlignmentTarget("teacher", 2.0, 0, "all", at_least=0.9),
        AlignmentTarget("halve", 2.0, 4, "all", below=0.03),
        AlignmentTarget("halve", 2.0, 4, "unseen", below=0.03),
        AlignmentTarget("halve", 2.0, 4, "unseen", at_least=0.3),
    ]
    found = list(grids.alignment_verdicts(shown, asked))
    assert [target.value for target in found] == pytest.approx([0.9, 0.02, 0.1, 0.4])
    assert [target.reached for target in found] == [True, True, False, True]
    shown.append({**held("teacher", "truth", None, 0.95), "steps": 256})
    slower = list(grids.alignment_verdicts(shown, asked))
    assert [target.value for target in slower] == pytest.approx([0.95, 0.07, 0.1, 0.4])
    assert slower[1].name.endswith("4 steps, w = 2, below the teacher's 256 steps of ddim")


def test_table_and_pictures_hold_every_figure(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """The README's table is made by this: each cell stands in its row and column with its deviation."""
    results = {
        "features": "gaussians, not Inception", "data": {"heldout": 90}, "rows": rows,
        "decoding_images_per_second": None,
        "settings": {**vars(OPTIONS), "reference": vars(OPTIONS.reference)},
    }  # fmt: skip
    marked = the(rows, stage="halve", w=0.0, column=1)
    shown = [{**row, "same_as": 2 if row is marked else None} for row in rows]
    report.write_grid_report({**results, "rows": shown}, tmp_path)
    text = (tmp_path / "table.md").read_text()
    fid = text.split("**FID to held-out**")[1].split("**inception score**")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in fid.splitlines() if line.startswith("| ")]
    assert lines[0] == ["", "w", "4 steps", "1 step", "teacher"]
    (found,) = (line for line in lines if line[:2] == ["deterministic students (halve)", "0"])
    four = the(rows, stage="halve", w=0.0, column=4)
    assert found[2] == f"{four['mean']['fid_heldout']:.2f} ± {four['std']['fid_heldout']:.2f}"
    assert found[3].endswith("(= 2 steps)")
    assert "not trained; the stochastic student of 1 step is that of 2 steps" in text
    assert not any(line[:2] == ["deterministic students (fixed)", "0"] for line in lines)
    assert "sampling in batches of 25**" in text
    quick = {**results, "rows": [{**row, "images_per_second": 100.0} for row in rows]}
    assert {*report.speed(quick).rows[0][2:]} == {"100"}
    assert {*report.speed({**quick, "decoding_images_per_second": 300.0}).rows[0][2:]} == {"100 (75)"}
    assert (tmp_path / "heat_map.png").stat().st_size > 10_000
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_an_experiment_without_a_grid_gets_one() -> None:
    """`evaluate --grid` measures any experiment's students with as many samples as its evaluation; keys can be set."""
    config = compose_grid(DIGITS, ["preset=debug", "stages.grid.sampling_seeds=2"])
    added, evaluate = config.stages["grid"], config.stages["evaluate"]
    assert (added.needs, added.steps, added.num_samples) == (evaluate.needs, evaluate.steps, evaluate.num_samples)
    assert (added.weights, added.reference, added.sampling_seeds) == ([0.0, 3.0], evaluate.reference, 2)
    assert "grid" not in compose(DIGITS, ["preset=debug"]).stages
    assert json.dumps(compose_grid(STOCHASTIC, ["preset=debug"]).stages["grid"].weights) == "[0.0, 1.0]"
    with pytest.raises(ConfigError, match="no stage of kind grid, nor one of kind evaluate"):
        compose_grid(DIGITS.parent / "digits_transfer", ["preset=debug"])


@pytest.mark.parametrize(
    ("experiment", "override", "said"),
    [
        ("digits_stochastic", "stages.stochastic.students=random", "stages.stochastic.students=random: must be one of"),
        ("digits_stochastic", "stages.grid.needs=[classifier,teacher]", "a stage of kind halve that is not of enc"),
        ("digits_stochastic", "stages.grid.weights=[-1]", "stages.grid.weights=[-1.0]: must be at least one, each 0"),
        ("digits_stochastic", "stages.grid.sampling_seeds=0", "stages.grid.sampling_seeds=0: must be more than 0"),
        ("digits_stochastic", "stages.grid.steps=[4,2]", None),
        ("digits_stochastic", "stages.grid.steps=[2]", "stages.grid.targets[0].steps=4: must be one of 2"),
        ("digits_stochastic", "stages.grid.targets.0.over=teacher", "targets[0].over=teacher: must be one of"),
        (
            "digits_stochastic",
            "+stages.grid.alignment=[{stage:teacher,w:1,at_least:0.9}]",
            "stages.grid.alignment[0]=digits: must be left out: only captioned_shapes is checked",
        ),
        (
            "shapes_text",
            "stages.grid.alignment=[{stage:halve,w:2,steps:2,below:0.1,at_least:0.9}]",
            "stages.grid.alignment[0]=at_least=0.9, below=0.1: must be one of at_least and below, in [0, 1]",
        ),
        (
            "shapes_text",
            "stages.grid.alignment=[{stage:halve,w:2,below:0.1}]",
            "alignment[0].stage=halve: must be one of t",
        ),
        (
            "shapes_text",
            "stages.grid.alignment=[{stage:teacher,w:2,measure:colour,at_least:0.1}]",
            "measure=colour: must",
        ),
        ("shapes_text", "stages.grid.alignment=[{stage:halve,w:2,steps:8,below:0.1}]", "steps=8: must be one of 2, 1"),
        ("shapes_text", "stages.grid.alignment=[{stage:halve,w:2,steps:2,below:0.1}]", None),
        ("shapes_text", "stages.grid.truth_weights=[9]", "stages.grid.truth_weights=9.0: must be one of 0.0, 2.0"),
        ("digits_transfer", "stages.invert.needs=[classifier,teacher,decoder]", "exactly one stage of kind halve"),
        ("digits_transfer", "stages.invert.steps=[8]", "stages.invert.steps=8: must be one of 4, 2"),
        ("digits_transfer", "stages.invert.weights=[5]", "stages.invert.weights=5.0: must be in [0, 1]"),
        ("digits_transfer", "stages.invert.images=1000", "stages.invert.images=1000: must be at most 450"),
        ("digits_transfer", "stages.invert.headline=8", "stages.invert.headline=8: must be one of 4, 2"),
    ],
)
def test_refusals(experiment: str, override: str, said: str | None) -> None:
    """Before hours of training, in a line that names key, value and what would be right."""
    if said is None:
        compose(DIGITS.parent / experiment, ["preset=debug", override])
        return
    with pytest.raises(ConfigError) as caught:
        compose(DIGITS.parent / experiment, ["preset=debug", override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
