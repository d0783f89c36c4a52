"""Figures over w x steps: for each stage of students one column per student, and undistilled samplers at equal cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fewstep.lab.config import AlignmentTarget, GridConfig, GridTarget
from fewstep.lab.context import Interrupted, never
from fewstep.lab.evaluation.alignment import SHARES, UNSEEN, alignment
from fewstep.lab.evaluation.distances import describe
from fewstep.lab.evaluation.pairs import pair_row
from fewstep.lab.evaluation.plan import BASELINES, PAIRED, Draw, Students, equal_calls
from fewstep.lab.evaluation.rows import Row, select
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.evaluation.scores import Scores, Stopping
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.metrics import Target


@dataclass(frozen=True)
class Cell:
    """One place of the grid: the student of `steps` of `stage`, or an undistilled sampler ("teacher") at its cost.

    kind: what the student is for ("deterministic", "stochastic", ...), "undistilled", or "teacher" and "truth", the
    teacher by its reference sampler and by a slower one. steps: those of the column; None for the last two.
    """

    stage: str
    kind: str
    steps: int | None
    draw: Draw

    def draws(self, sampling_seeds: int) -> list[Draw]:
        """The same from so many independent sets of noises."""
        return [replace(self.draw, noises=PAIRED + i) for i in range(sampling_seeds)]

    @property
    def of_unseen(self) -> Draw | None:
        """The same of prompts with combinations that training never met; of students and of the teacher alone."""
        return None if self.kind in ("truth", "undistilled") else replace(self.draw, prompts=UNSEEN)


@dataclass(frozen=True)
class Grid:
    """What is to be measured. teacher: name of its model. students: each stage's, with what they are for.

    composition: samples per cell of prompts with unseen combinations; 0 for data without. checked: whether a checker
    knows what the prompts mean.
    """

    options: GridConfig
    teacher: str
    students: tuple[tuple[Students, str], ...]
    composition: int = 0
    checked: bool = False

    def reference(self, w: float) -> Draw:
        """The teacher as paired errors take it for the truth."""
        return Draw(self.teacher, self.options.reference.sampler, self.options.reference.steps, w)

    def cells(self) -> Iterator[Cell]:
        """Every cell, stage by stage; a student has those of the w that it was trained for."""
        for w in self.options.weights:
            yield Cell(self.teacher, "teacher", None, self.reference(w))
        for w in self.options.truth_weights:
            yield Cell(self.teacher, "truth", None, replace(self.reference(w), **vars(self.options.truth)))
        for students, kind in self.students:
            for w in students.weights(self.options.weights):
                for steps in (steps for steps in self.options.steps if steps in students.models):
                    yield Cell(students.name, kind, steps, Draw(students.models[steps], students.sampler, steps, w))
        for sampler in BASELINES:
            for w in self.options.weights:
                for steps in self.options.steps:
                    draw = Draw(self.teacher, sampler, equal_calls(steps, w), w)
                    yield Cell(self.teacher, "undistilled", steps, draw)

    def requests(self) -> dict[Draw, int]:
        """Every set of samples with its size."""
        count = max(self.options.num_samples, self.options.paired_noises)
        found = {draw: count for cell in self.cells() for draw in cell.draws(self.options.sampling_seeds)}
        unseen = [cell.of_unseen for cell in self.cells()] if self.composition else []
        return found | {draw: self.composition for draw in unseen if draw is not None}


def measure(samples: Samples, grid: Grid, scores: Scores, stopping: Stopping = never) -> list[Row]:
    """A row for each cell: what it is and costs, the mean and deviation over sets of noises, and the paired error.

    Raises:
        Interrupted: `stopping` said so; samples and features are kept.
    """
    same = {name: same_weights(samples.models, students) for students, _ in grid.students for name in [students.name]}
    rows: list[Row] = []
    for cell in grid.cells():
        if stopping():
            raise Interrupted(f"stopped after {len(rows)} places of the grid; samples and features are kept")
        rows.append(_row(samples, grid, cell, scores, same.get(cell.stage, {})))
    return rows


def same_weights(models: Any, students: Students) -> dict[int, int]:
    """Steps of each student whose weights are those of the student of twice as many: it was not trained."""
    weights = {steps: weights_of(models[name]) for steps, name in students.models.items()}
    return {steps: 2 * steps for steps in weights if weights.get(2 * steps) == weights[steps]}


def weights_of(model: Model) -> str:
    """SHA-256 of a model's weights."""
    settings = json.loads((model.folder / "config.json").read_text())
    return str(settings["sha256"])


def _row(samples: Samples, grid: Grid, cell: Cell, scores: Scores, same: dict[int, int]) -> Row:
    options = grid.options
    seeds = [scores.measure(samples, draw, options.num_samples) for draw in cell.draws(options.sampling_seeds)]
    values = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    unseen = cell.of_unseen if grid.composition else None
    aligned = {} if not grid.checked else {
        "alignment": alignment(samples, cell.draws(options.sampling_seeds), options.num_samples),
        "unseen": None if unseen is None else alignment(samples, [unseen], grid.composition),
    }  # fmt: skip
    return {
        **describe(samples, cell.draw),
        "stage": cell.stage,
        "kind": cell.kind,
        "column": cell.steps,
        "same_as": same.get(cell.steps) if cell.steps is not None else None,
        "samples": options.num_samples,
        "seeds": seeds,
        "mean": {name: statistics.fmean(found) for name, found in values.items()},
        "std": {name: statistics.stdev(found) if len(found) > 1 else 0.0 for name, found in values.items()},
        **pair_row(samples, cell.draw, grid.reference(cell.draw.w), options.paired_noises),
        **aligned,
    }


def value(row: Row, measure: str) -> float:
    """A measure of a row: the mean over sets of noises, the paired error, or a share of `alignment` by its name."""
    if measure in SHARES:
        return float(row["alignment"][measure]["share"])
    if measure == UNSEEN:
        return float(row["unseen"]["all"]["share"]) if row["unseen"] else float("nan")
    return float(row["paired_error"] if measure == "paired_error" else row["mean"][measure])


def verdicts(rows: list[Row], asked: list[GridTarget]) -> Iterator[Target]:
    """Every target with its ratio."""
    for target in asked:
        place = {"w": target.w, "column": target.steps}
        pair = [row for name in (target.stage, target.over) for row in select(rows, stage=name, **place)]
        if len(pair) == 2:
            found = [value(row, target.measure) for row in pair]
            what = f"{target.measure} of {target.stage} over that of {target.over}"
            name = f"{what}, {target.steps} steps, w = {target.w:g}"
            yield Target(name, found[0] / found[1], target.at_most)


def alignment_verdicts(rows: list[Row], asked: list[AlignmentTarget]) -> Iterator[Target]:
    """Every target of captions with its share or, against the teacher, its points below; both in [0, 1]."""
    for target in asked:
        teacher = [*select(rows, kind="truth", w=target.w), *select(rows, kind="teacher", w=target.w)][0]
        found = select(rows, stage=target.stage, w=target.w, column=target.steps)[0] if target.steps else teacher
        share, steps = value(found, target.measure), target.steps or found["steps"]
        name = f"captions that hold ({target.measure}) of {target.stage}, {steps} steps, w = {target.w:g}"
        if target.below is None:
            assert target.at_least is not None  # `check_grid` asks for one of the two
            yield Target(name, share, target.at_least, "at_least")
        else:
            name += f", below the teacher's {teacher['steps']} steps of {teacher['sampler']}"
            yield Target(name, value(teacher, target.measure) - share, target.below)
