"""Students of several stages and the teacher at its best against data, over several sampling seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.lab.budget import updates_of
from fewstep.lab.config import CompareConfig, HalveConfig, MomentsConfig, RatioTarget
from fewstep.lab.evaluation.distances import Reference, describe
from fewstep.lab.evaluation.plan import Draw
from fewstep.lab.evaluation.rows import Row, select
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.metrics import Target, class_spread
from fewstep.lab.metrics.targets import Kind

TEACHER = "teacher"


@dataclass(frozen=True)
class Contestant:
    """One row: a student of a stage, or the teacher (stage TEACHER), sampled as `draw` says.

    training: what its training took, see `training_of`; None for the teacher.
    """

    stage: str
    draw: Draw
    training: dict[str, Any] | None = None

    def draws(self, sampling_seeds: int) -> list[Draw]:
        """The same from as many independent sets of noises."""
        one = self.draw
        return [Draw(one.model, one.sampler, one.steps, one.w, i, one.noise_level) for i in range(sampling_seeds)]


def training_of(folder: Path, stage: MomentsConfig | HalveConfig, steps: int) -> dict[str, Any]:
    """Updates of all networks together, those of the student, and seconds of the call that finished its training."""
    updates = updates_of(folder, stage.updates_for(steps))
    alternating = isinstance(stage, MomentsConfig) and stage.method == "alternating"
    seconds = float(json.loads((folder / "DONE").read_text())["seconds"])
    return {"updates": updates, "student_updates": updates // 2 if alternating else updates, "seconds": seconds}


def compare(samples: Samples, contestants: list[Contestant], options: CompareConfig, reference: Reference) -> list[Row]:
    """A row for each: what it is and cost, `seeds` (every measure of each set of samples), their `mean` and `std`."""
    return [_row(samples, each, options, reference) for each in contestants]


def _row(samples: Samples, one: Contestant, options: CompareConfig, reference: Reference) -> Row:
    seeds = [_measured(samples, draw, options.num_samples, reference) for draw in one.draws(options.sampling_seeds)]
    values = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    return {
        **describe(samples, one.draw),
        "stage": one.stage,
        "noise_level": one.draw.noise_level,
        "training": one.training,
        "seeds": seeds,
        "mean": {name: statistics.fmean(found) for name, found in values.items()},
        "std": {name: statistics.stdev(found) if len(found) > 1 else 0.0 for name, found in values.items()},
    }


def _measured(samples: Samples, draw: Draw, count: int, reference: Reference) -> Row:
    features, labels = samples.features(draw, count), samples.labels(count)
    heldout = class_spread(reference.heldout.found.features, reference.heldout.labels)
    spread = class_spread(features.features, labels) / heldout
    found = reference.distances(features, labels)
    return {name: value for name, value in found.items() if name not in ("samples", "kid_std")} | {"spread": spread}


def verdicts(rows: list[Row], asked: list[RatioTarget]) -> Iterator[Target]:
    """Every target with its ratio of means; of a stage with several w, that of the lowest FID."""
    for target in asked:
        over = TEACHER if target.over == TEACHER else f"{target.over}, {target.steps} steps"
        value = _best(rows, target.stage, target.steps)["mean"][target.measure]
        other = _best(rows, target.over, None if target.over == TEACHER else target.steps)["mean"][target.measure]
        name = f"{target.stage}, {target.steps} steps: {NAMES[target.measure]} over that of {over}"
        limit = target.at_least if target.at_most is None else target.at_most
        assert limit is not None  # validate has made sure of one
        kind: Kind = "at_least" if target.at_most is None else "at_most"
        yield Target(name, value / other if other else math.nan, limit, kind, target.aim)


def _best(rows: list[Row], stage: str, steps: int | None) -> Row:
    wanted = {"stage": stage} if steps is None else {"stage": stage, "steps": steps}
    return min(select(rows, **wanted), key=lambda row: float(row["mean"]["fid_heldout"]))


NAMES = {
    "fid_heldout": "FID to held-out",
    "fid_train": "FID to training images",
    "kid": "KID",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "class accuracy",
    "spread": "spread within classes",
}
