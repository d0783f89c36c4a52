"""FID, IS and class accuracy of sets of samples, from features that lie in shards: memory does not grow with a set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from fewstep.lab.context import Interrupted, never
from fewstep.lab.evaluation.plan import Draw
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.measuring.job import Extraction, summarise
from fewstep.lab.metrics import (
    FewSamplesError,
    Gaussian,
    Statistics,
    class_accuracy,
    fewer_than_features,
    frechet_distance,
)
from fewstep.lab.metrics.extractors import CLASSIFIER

SPLITS = 10  # parts that the inception score of a published extractor is the mean of, as in papers
QUIET = Console(quiet=True)
Stopping = Callable[[], bool]


@dataclass(frozen=True)
class SampleSet:
    """The first `count` images of a set, as `fewstep.lab.measuring` reads them."""

    samples: Samples
    draw: Draw
    count: int

    @property
    def resolution(self) -> int:
        """That of the images, also where models work on latents."""
        return self.samples.image_shape[-1]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the samples but their number."""
        return self.samples.key(self.draw)

    def prompts(self, start: int, stop: int) -> list[str]:
        """What they are sampled from."""
        return self.samples.spec(self.draw).texts(start, stop)

    def read(self, start: int, stop: int) -> Tensor:
        """A chunk."""
        return self.samples.read(self.draw, start, stop)


@dataclass(frozen=True)
class Scores:
    """What sets of samples are held against: `reference`, in the features that `heldout` is an extraction of."""

    heldout: Extraction
    reference: Gaussian
    allow_few_samples: bool = False

    @classmethod
    def of(
        cls, heldout: Extraction, statistics: Path | None, samples: int, allow_few_samples: bool, stopping: Stopping
    ) -> Scores:
        """Against statistics or, without any, against the held-out images, whose features are made here if needed.

        samples: how many a set is to have.

        Raises:
            Interrupted: `stopping` said so.
            ValueError: statistics of another extractor or resolution.
            FewSamplesError: fewer samples, or images behind the reference, than features.
        """
        extractor = heldout.extractor
        if statistics is None or extractor.name == CLASSIFIER:  # how well that one knows the classes is reported
            make(heldout, stopping)
        if statistics is None:
            reference: Gaussian = summarise(heldout, 1).moments
        else:
            reference = found = Statistics.load(statistics)
            found.refuse_other(statistics, extractor.name, extractor.weights, heldout.images.resolution)
        lacking = fewer_than_features(samples, len(reference.mean), reference.count)
        if lacking is not None and not allow_few_samples:
            raise FewSamplesError(
                f"{lacking} of {extractor.name}: FID must be of as many at least; or set allow_few_samples=true, "
                "which is marked in every table"
            )
        return cls(heldout, reference, allow_few_samples)

    @property
    def own(self) -> bool:
        """Whether the extractor is a classifier of our own, which knows the classes of the data."""
        return self.heldout.extractor.name == CLASSIFIER

    def of_set(self, samples: Samples, draw: Draw, count: int) -> Extraction:
        """The features of the first `count` samples of a set."""
        return self.heldout.of(SampleSet(samples, draw, count))

    def measure(self, samples: Samples, draw: Draw, count: int) -> dict[str, float]:
        """Of the first `count` samples of a set; class accuracy of our own classifiers and data with classes alone.

        Raises:
            ValueError: samples that are not finite; names the set.
        """
        work = self.of_set(samples, draw, count)
        make(work, never)
        try:
            found = summarise(work, 1 if self.own else min(SPLITS, count))
        except ValueError as error:
            raise ValueError(f"{draw.label}: {error}") from error
        row = {"fid_heldout": frechet_distance(found.moments, self.reference, allow_few_samples=self.allow_few_samples)}
        if found.score is not None:
            row["is"] = found.score.score().mean
        if self.own and not samples.prompts:
            row["accuracy"] = accuracy(work, samples.labels(count))
        return row


def make(work: Extraction, stopping: Stopping) -> None:
    """The features that are missing.

    Raises:
        Interrupted: `stopping` said so; finished chunks are kept.
    """
    if not work.make(0, 1, stopping, QUIET, bar=False):
        raise Interrupted("stopped while features were made; those that are there are kept")


def accuracy(work: Extraction, labels: Tensor) -> float:
    """Share of images whose logits are greatest at their label."""
    right = 0.0
    for start, shard in work.shards():
        logits = shard.tensors["logits"]
        right += class_accuracy(logits, labels[start : start + len(logits)]) * len(logits)
    return right / len(labels)
