"""Distances to data and to the teacher, in the judge's features; class accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.lab.data import Data, Split
from fewstep.lab.evaluation.plan import OTHER, Draw, Plan
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.metrics import (
    Features,
    Moments,
    class_accuracy,
    extract,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    standardised,
)

BATCH = 512  # images that the judge sees at once
MOST = 10_000  # images of a set that precision and recall take: they hold all distances between two of these in memory


@dataclass(frozen=True)
class SplitFeatures:
    """A split as the judge sees it."""

    found: Features
    labels: Tensor

    @classmethod
    def of(cls, judge: str, split: Split) -> SplitFeatures:
        """Features of every image, by the extractor registered as `judge`."""
        return cls(extract(judge, split.batches(BATCH)), split.labels)

    @cached_property
    def moments(self) -> Moments:
        """Mean and covariance of the features."""
        return Moments.of(self.found.features)

    @property
    def accuracy(self) -> float:
        """Share of images whose class the judge recognises."""
        return class_accuracy(self.found.logits, self.labels)


@dataclass(frozen=True)
class Reference:
    """The data, and how finely it is compared with.

    KID, precision and recall are against held-out images; KID in features that are standardised by theirs, precision
    and recall of at most `MOST` images of each set, spread evenly.
    allow_few_samples: also FID of fewer samples than features.
    """

    train: SplitFeatures
    heldout: SplitFeatures
    kid_subsets: int
    allow_few_samples: bool = False

    @classmethod
    def of(cls, judge: str, data: Data, kid_subsets: int, allow_few_samples: bool = False) -> Reference:
        """Features of both splits."""
        train, heldout = (SplitFeatures.of(judge, split) for split in (data.train, data.heldout))
        return cls(train, heldout, kid_subsets, allow_few_samples)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images of each split."""
        return {"train": len(self.train.labels), "heldout": len(self.heldout.labels)}

    def fid(self, a: Moments, b: Moments) -> float:
        """Frechet distance of two sets."""
        return frechet_distance(a, b, allow_few_samples=self.allow_few_samples)

    def distances(self, found: Features, labels: Tensor) -> dict[str, Any]:
        """Everything that is measured of a set of images against the data: JSON-able."""
        moments = Moments.of(found.features)
        heldout = self.heldout.found.features
        kid = kernel_distance(standardised(found.features, heldout), standardised(heldout, heldout), self.kid_subsets)
        precision, recall = precision_recall(spread(found.features), spread(heldout))
        return {
            "samples": len(labels),
            "fid_heldout": self.fid(moments, self.heldout.moments),
            "fid_train": self.fid(moments, self.train.moments),
            "kid": kid.mean,
            "kid_std": kid.std,
            "is": inception_score(found.logits),
            "precision": precision,
            "recall": recall,
            "accuracy": class_accuracy(found.logits, labels),
        }

    def of_training_images(self) -> dict[str, Any]:
        """What perfect samples would reach: the training images themselves against held-out ones."""
        return self.distances(self.train.found, self.train.labels)


def spread(features: Tensor) -> Tensor:
    """At most `MOST` rows of features (N, D), spread evenly."""
    count = len(features)
    return features if count <= MOST else features[torch.arange(MOST) * count // MOST]


def describe(samples: Samples, draw: Draw) -> dict[str, Any]:
    """What a row is of, what it costs, and how fast it was sampled."""
    return {
        "model": draw.model,
        "sampler": draw.sampler,
        "steps": draw.steps,
        "w": draw.w,
        "nfe": samples.nfe(draw),
        "images_per_second": samples.images_per_second(draw),
    }


def data_row(samples: Samples, draw: Draw, count: int, reference: Reference) -> dict[str, Any]:
    """`describe` and `Reference.distances` of samples 0, ..., count - 1."""
    measured = reference.distances(samples.features(draw, count), samples.labels(count))
    return {**describe(samples, draw), **measured}


def teacher_distance(samples: Samples, plan: Plan, draw: Draw, count: int) -> float:
    """Frechet distance to the teacher's samples of the same w from other noises, equally many."""
    pair = samples.moments(draw, count), samples.moments(plan.reference(draw.w, OTHER), count)
    return frechet_distance(*pair, allow_few_samples=plan.options.allow_few_samples)


def teacher_rows(samples: Samples, plan: Plan, reference: Reference) -> list[dict[str, Any]]:
    """The teacher at every w; `floor` is the distance between two independent sets of its samples, or None."""
    count = plan.options.num_samples
    rows = []
    for w in plan.options.weights:
        floor = teacher_distance(samples, plan, plan.reference(w), count) if plan.options.floor else None
        rows.append({**data_row(samples, plan.reference(w, OTHER), count, reference), "floor": floor})
    return rows


def teacher_against_data(samples: Samples, plan: Plan, reference: Reference) -> dict[str, Any] | None:
    """The teacher at w = 0 on as many samples as there are training images, beside those images; None without w = 0."""
    if 0.0 not in plan.options.weights:
        return None
    row = data_row(samples, plan.reference(0.0, OTHER), plan.training_images, reference)
    ideal = reference.of_training_images()
    return {"teacher": row, "training_images": ideal, "ratio": row["fid_heldout"] / ideal["fid_heldout"]}


def curve_rows(samples: Samples, plan: Plan, reference: Reference) -> list[dict[str, Any]]:
    """FID, IS and the rest over w, for the teacher (`student_steps` None) and the students, of equally many samples."""
    rows = []
    for w in plan.options.curve_weights:
        draws: list[tuple[int | None, Draw]] = [(None, plan.curve_teacher(w))]
        draws += [(steps, plan.student(steps, w)) for steps in plan.options.steps]
        for steps, draw in draws:
            rows.append({"student_steps": steps, **data_row(samples, draw, plan.curve_samples, reference)})
    return rows
