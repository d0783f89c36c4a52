"""The grid of w x steps on models whose samples are known; its table; the stage added to an experiment."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lab_configs import DIGITS
from lab_gaussians import Student, exact, judge, noise_and_labels, plan, samples
from rich.console import Console

from fewstep.lab.classifier import Classifier, save_classifier
from fewstep.lab.compose import compose, compose_grid
from fewstep.lab.config import AlignmentTarget, ConfigError, DataConfig, GridConfig, GridTarget, ReferenceConfig
from fewstep.lab.context import Interrupted, never
from fewstep.lab.data import Data, Split
from fewstep.lab.evaluation import grid as grids
from fewstep.lab.evaluation import samples as sets
from fewstep.lab.evaluation.plan import Students
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.evaluation.scores import Scores
from fewstep.lab.measuring import job
from fewstep.lab.measuring.images import HeldOutImages
from fewstep.lab.measuring.job import Extraction
from fewstep.lab.metrics import Extractor, FewSamplesError, Moments, Statistics, frechet_distance
from fewstep.lab.metrics.extractors import CLASSIFIER
from fewstep.lab.report import grid as report
from fewstep.lab.sampling import own_sampler
from fewstep.lab.stages import grid as stage
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


class Judge(torch.nn.Module):
    """Sees pixels, and classes by their mean; with a weight, since extractors are told apart by theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, logits = judge(images)
        return features * self.one, logits


def scores(root: Path, statistics: Path | None = None, samples: int = 60, few: bool = False) -> Scores:
    labels = torch.arange(90) % 3
    images = exact(seeded_noise(torch.arange(900, 990), (1, 2, 2)), labels, 0.0)
    data = Data(Split(images, labels), Split(images.flip(0), labels.flip(0)))
    heldout = Extraction(HeldOutImages(data, DataConfig(image_size=2)), "judge", str(root), 25, "cpu")
    return Scores.of(heldout, statistics, samples, few, never)


def loaded(*_: object) -> Extractor:
    return Extractor(CLASSIFIER, Judge(), torch.device("cpu"), as_bytes=False)


@pytest.fixture(autouse=True, scope="module")
def _judge() -> Iterator[None]:
    """Every extraction is by pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load_extractor", loaded)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return scores(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, reference: Scores) -> list[dict[str, Any]]:
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
    tmp_path: Path, rows: list[dict[str, Any]], reference: Scores
) -> None:
    """FID of each set recomputed from the known samples: one set counted thrice would have no deviation."""
    row, kept = the(rows, stage="halve", w=1.0, column=1), made(tmp_path)
    expected = []
    for noises in range(3):
        images = exact(*noise_and_labels(kept, 60, noises), 1.0) + 0.1
        expected.append(frechet_distance(Moments.of(images.clamp(-1, 1).flatten(1)), reference.reference))
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


def test_fid_is_held_against_statistics_that_were_asked_for(tmp_path: Path, reference: Scores) -> None:
    """Statistics of other images give other figures, by their mean and covariance; of another size they are refused."""
    pixels = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)).double() / 8 + 0.3
    mean, covariance = pixels.mean(0).numpy(), pixels.T.cov().numpy()
    weights = reference.heldout.extractor.weights
    found = Statistics(mean, covariance, CLASSIFIER, weights, 2, 80)
    found.save(tmp_path / "theirs.npz")
    kept, draw = made(tmp_path), grid().reference(1.0)
    row = scores(tmp_path, tmp_path / "theirs.npz").measure(kept, draw, 60)
    images = torch.cat(list(kept.batches(draw, 60))).clamp(-1, 1).flatten(1)
    assert row["fid_heldout"] == pytest.approx(frechet_distance(Moments.of(images), found), rel=1e-6)
    assert row["fid_heldout"] != pytest.approx(reference.measure(kept, draw, 60)["fid_heldout"], rel=0.1)
    replace(found, resolution=64).save(tmp_path / "large.npz")
    with pytest.raises(ValueError, match=r"large.npz: resolution=64: must be 2, that of the samples"):
        scores(tmp_path, tmp_path / "large.npz")


def test_fewer_samples_than_features_are_refused_before_any_is_drawn(tmp_path: Path) -> None:
    """Four features: of three samples a set FID means nothing, and that is known before a set is sampled."""
    with pytest.raises(FewSamplesError, match=r"fewer samples \(3\) than features \(4\) of classifier"):
        scores(tmp_path, samples=3)
    assert scores(tmp_path, samples=3, few=True).allow_few_samples
    save_classifier(Classifier(1, 10, width=8), tmp_path / "own")
    Statistics(np.zeros(2048), np.eye(2048), "classifier", count=50_000).save(tmp_path / "a.npz")
    alone = ["preset=debug", f"stages.grid.features={tmp_path / 'own'}"]
    settings = [*alone, f"stages.grid.statistics={tmp_path / 'a.npz'}"]
    with pytest.raises(ConfigError, match=r"num_samples=40: must be .*samples \(40\) than features \(2,048\)"):
        compose_grid(STOCHASTIC, [*settings, "stages.grid.allow_few_samples=false"])
    assert compose_grid(STOCHASTIC, [*settings, "stages.grid.allow_few_samples=true"])
    with pytest.raises(ConfigError, match=r"num_samples=15: must be .*samples \(15\) than features \(16\)"):
        compose_grid(STOCHASTIC, [*alone, "stages.grid.num_samples=15", "stages.grid.allow_few_samples=false"])


def test_other_extractors_are_refused_before_training(tmp_path: Path) -> None:
    """Statistics of another network, or a judge of other classes, after days of training the experiment's models."""
    save_classifier(Classifier(1, 7, width=8), tmp_path / "seven")
    save_classifier(Classifier(1, 10, width=8), tmp_path / "own")
    Statistics(np.zeros(2048), np.eye(2048), "inception-v3-compat").save(tmp_path / "a.npz")
    features, said = f"stages.grid.features={tmp_path}", "stages.grid.statistics="
    for settings, wrong in (
        ([features], f"{features}: not a whole classifier"),
        ([f"{features}/seven"], "seven: must be a classifier of data.num_classes=10; this one has 7"),
        ([f"{features}/own", "stages.grid.extractor_weights=w.pt"], "extractor_weights=w.pt: must be left out for the"),
        ([f"{features}/own", f"{said}{tmp_path / 'a.npz'}"], "features=inception-v3-compat: must be classifier"),
        ([f"{features}/own", f"{said}{tmp_path / 'own/config.json'}"], "config.json holds no reference statistics"),
    ):
        with pytest.raises(ConfigError) as caught:
            compose_grid(STOCHASTIC, ["preset=debug", *settings])
        assert wrong in str(caught.value)
        assert str(caught.value).startswith("stages.grid.")


@pytest.mark.parametrize("killed", [False, True])
def test_forgotten_samples_change_no_figure(
    tmp_path: Path, rows: list[dict[str, Any]], killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keep_samples=false` holds one set at a time and the first chunks that paired errors need, of the first noises.

    Killed after some sets and called again, it makes nothing twice.
    """
    kept, options = made(tmp_path), replace(OPTIONS, keep_samples=False, num_samples=60, paired_noises=20)
    stopped, told, drawn = iter([False] * 40 + [True] if killed else []), list[tuple[int, int]](), list[int]()
    ctx: Any = SimpleNamespace(
        stage=options, console=Console(quiet=True), config=SimpleNamespace(progress=False),
        stopping=lambda: next(stopped, False),
    )  # fmt: skip
    draw_chunk = sets._make_chunk
    monkeypatch.setattr(sets, "_make_chunk", lambda *job: drawn.append(job[2]) or draw_chunk(*job))
    if killed:
        with pytest.raises(Interrupted):
            stage.make_sets(ctx, kept, scores(tmp_path), lambda *pieces: told.append(pieces))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    stage.make_sets(ctx, kept, scores(tmp_path), lambda *pieces: told.append(pieces))
    assert sorted(drawn) == sorted([0, 25, 50] * len(kept.sizes))
    assert told[-1] == (60 * len(kept.sizes), 60 * len(kept.sizes))
    files = list(tmp_path.glob("*/*.safetensors"))
    assert {path.name for path in files} == {"0000000-0000025.safetensors"}
    assert len(files) == len([draw for draw in kept.sizes if draw.noises == 0])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.exists())
    stopped = iter([False, False, True])
    with pytest.raises(Interrupted, match="stopped after 2 places of the grid"):
        grids.measure(kept, grid(), scores(tmp_path), lambda: next(stopped))
    found = grids.measure(kept, replace(grid(), options=options), scores(tmp_path))
    for one, other in zip(found, rows, strict=True):
        assert one["mean"] == pytest.approx(other["mean"], rel=1e-9)


def test_the_extractor_is_loaded_once(tmp_path: Path) -> None:
    """Of CLIP or DINOv2 that is a gigabyte, of a hundred sets twice each."""
    by_pixels, kept = scores(tmp_path), made(tmp_path)
    works = [by_pixels.of_set(kept, draw, 60) for draw in kept.sizes]
    assert {id(work.extractor) for work in works} == {id(by_pixels.heldout.extractor)}


def test_published_scores_are_of_few_samples_too_and_nan_names_its_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial run of 6 samples ends in a table; of a hundred sets the one with NaN is found."""
    monkeypatch.setattr(job, "load_extractor", lambda *_: replace(loaded(), name="inception-v3-compat"))
    kept, draw = made(tmp_path), grid().reference(1.0)
    assert scores(tmp_path, samples=6).measure(kept, draw, 6)["is"] >= 1
    start, stop = next(kept.spec(draw).ranges(60))
    shard = kept.cache.get(kept.key(draw), start, stop)
    assert shard is not None
    shard.images[3] = float("nan")
    kept.cache.put(kept.key(draw), start, stop, shard)
    with pytest.raises(ValueError, match=r"teacher dpmpp_2m 40 w=1: 1 of 60 samples hold NaN .* number 3 first"):
        scores(tmp_path).measure(kept, draw, 60)


def test_extractors_without_classes_have_no_score_to_draw(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """DINOv2 gives features alone: the table leaves IS and accuracy out, and FID is drawn against the paired error."""
    bare = [{**row, "mean": {"fid_heldout": row["mean"]["fid_heldout"]}} for row in rows]
    results = {**shown_results(bare), "features": "dinov2-vit-l-14 features",
               "reference": {"path": "/data/imagenet64.npz", "count": 50_000}}  # fmt: skip
    report.write_grid_report(results, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "**FID to imagenet64.npz**" in text
    assert "against the statistics in imagenet64.npz of 50,000 images; dinov2-vit-l-14 features" in text
    assert "inception score" not in text
    assert "accuracy" not in text
    labels = [axes.get_xlabel() for axes in report.pareto(results).axes]
    assert "paired error (RMSE) (lower is better)" in labels


def shown_results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "features": "gaussians, not Inception", "data": {"heldout": 90}, "rows": rows,
        "decoding_images_per_second": None,
        "settings": {**vars(OPTIONS), "reference": vars(OPTIONS.reference)},
    }  # fmt: skip


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
    results = shown_results(rows)
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
    transfer = compose_grid(DIGITS.parent / "digits_transfer", ["preset=debug", "stages.grid.paired_noises=7"])
    added = transfer.stages["grid"]
    assert (added.needs, added.steps) == (["classifier", "teacher", "decoder"], transfer.stages["decoder"].steps)
    assert added.paired_noises == 7
    assert added.weights == [0.0, 0.3, 1.0]  # of the usual ones 3 is beyond the range of its students
    with pytest.raises(ConfigError, match=r"needs=\['teacher', 'halve', .*; or set stages.grid.features"):
        compose_grid(DIGITS.parent / "imagenet64", ["preset=debug"])
    with pytest.raises(ConfigError, match="has no stage of kind grid, evaluate or halve"):
        compose_grid(DIGITS.parent / "imagenet64_moments", ["preset=debug"])


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
        ("digits_stochastic", "stages.grid.features=inception", "stages.grid.features=inception: must be one of incep"),
        (
            "digits_stochastic",
            "+stages.grid={features:inception-v3-compat,extractor_weights:/nowhere}",
            "stages.grid.extractor_weights=/nowhere: must be a file with the weights of inception-v3-compat",
        ),
        ("digits_stochastic", "stages.grid.statistics=a.npz", "stages.grid.statistics=a.npz: must be left out without"),
        ("digits_stochastic", "stages.grid.keep_samples=false", None),
        ("shapes_text", "stages.grid.keep_samples=false", "keep_samples=False: must be true: captions are read back"),
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
