"""What a set of samples comes to against reference statistics or images: `results.json` and a line for each figure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.lab.checkpoint import write_tensors, write_text
from fewstep.lab.config import ConfigError
from fewstep.lab.distributed import pick_device
from fewstep.lab.evaluation import FORMAT
from fewstep.lab.evaluation.circumstances import circumstances
from fewstep.lab.measuring.images import ModelImages, open_images
from fewstep.lab.measuring.job import Extraction, Summary, summarise
from fewstep.lab.metrics import (
    FewSamplesError,
    Statistics,
    fewer_than_features,
    frechet_distance,
    kernel_distance,
    precision_recall,
    standardised,
)
from fewstep.lab.metrics.extractors import CLASSIFIER
from fewstep.lab.progress import Tell
from fewstep.lab.sampling import nfe_of
from fewstep.lab.stages.results import tidy

KID_SUBSETS = 100
SHOWN = 20  # samples in the report


@dataclass(frozen=True)
class Measurement:
    """samples: whose features are taken. reference: path of statistics (.npz), or of images. splits: parts of IS."""

    samples: Extraction
    reference: str
    splits: int = 10
    allow_few_samples: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Without what is read from files, which a job reads itself."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @cached_property
    def statistics(self) -> Statistics | None:
        """The reference, if it is statistics."""
        path = Path(self.reference)
        return Statistics.load(path) if path.suffix in (".npz", ".pkl") else None

    def works(self) -> list[Extraction]:
        """The extractions: of the reference first, if it is images."""
        if self.statistics is not None:
            return [self.samples]
        return [replace(self.samples, images=open_images(self.reference), clip=None), self.samples]

    def check(self) -> None:
        """Refuse, before any compute, what cannot be compared.

        Raises:
            ConfigError: no such reference, or a CLIP score of images without prompts.
            ValueError: it is of another extractor or resolution.
            FewSamplesError: fewer samples, or images behind the reference, than features.
        """
        images, extractor = self.samples.images, self.samples.extractor
        clip = self.samples.clip
        if clip is not None and not images.prompts(0, 1):
            raise ConfigError(f"--clip {clip}: must be left out: what these images are to show is not known")
        if self.statistics is None:
            here, there = images.resolution, self.works()[0].images.resolution
            if here != there:
                raise ConfigError(f"--reference {self.reference}: resolution={there}: must be {here}, as the samples'")
            return
        self.statistics.refuse_other(Path(self.reference), extractor.name, extractor.weights, images.resolution)
        lacking = fewer_than_features(images.count, len(self.statistics.mean), self.statistics.count)
        if lacking is not None and not self.allow_few_samples:
            raise FewSamplesError(
                f"{lacking} of {extractor.name}, --reference {self.reference}: FID must be of as many samples "
                "at least; KID is not biased by few: give --reference images in place of statistics; or set "
                "--allow-few-samples, which is marked in every table"
            )

    def write(self, console: Console) -> None:
        """Write `results.json` from the shards and the first samples for the report; print what it holds."""
        began = time.perf_counter()
        summary = summarise(self.samples, self.splits)
        row = {**self._cost(summary), **self._measured(summary)}
        summary.seconds["collecting"] = time.perf_counter() - began
        results = {"format": FORMAT, "kind": "measure", **self._origin(summary), "rows": [row]}
        path = Path(self.samples.out) / "results.json"
        first = self.samples.images.read(*self.samples.ranges()[0])[:SHOWN]
        write_tensors(path.with_name("grids.safetensors"), {"samples": first.clamp(-1, 1)})
        write_text(path, json.dumps(tidy(results), indent=1, allow_nan=False) + "\n")
        for name in ("fid", "is", "kid", "precision", "recall", "clip_score"):
            if row[name] is not None:
                console.print(f"{name:12}{row[name]:.4f}", highlight=False)
        if row["fid"] is None or row["few_samples"]:
            console.print(f"FID: {row['few_samples']}", highlight=False)
        console.print(str(path), markup=False, highlight=False)

    def _measured(self, samples: Summary) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys(("kid", "kid_std", "kid_samples", "precision", "recall", "few_samples"))
        reference: Any = self.statistics
        if reference is None:
            images = summarise(self.works()[0], 1)
            reference, kept = images.moments, (samples.kept.double(), images.kept.double())
            # The features of our own classifiers are of any size; KID of Inception's is that of papers.
            scaled = kept
            if self.samples.extractor.name == CLASSIFIER:
                scaled = (standardised(kept[0], kept[1]), standardised(kept[1], kept[1]))
            kid = kernel_distance(*scaled, KID_SUBSETS)
            precision, recall = precision_recall(*kept)
            found |= {"kid": kid.mean, "kid_std": kid.std, "kid_samples": len(kept[0]), "kid_subset": kid.subset_size}
            found |= {"precision": precision, "recall": recall}
        lacking = fewer_than_features(samples.count, len(samples.moments.mean), reference.count)
        taken = lacking is None or self.allow_few_samples
        found["few_samples"] = lacking if taken else f"{lacking}; refused, see KID, or set --allow-few-samples"
        found["fid"] = frechet_distance(samples.moments, reference, allow_few_samples=True) if taken else None
        score = samples.score and samples.score.score()
        found |= {"is": score and score.mean, "is_std": score and score.std, "is_splits": self.splits}
        return {**found, "clip_score": samples.alignment}

    def _cost(self, summary: Summary) -> dict[str, Any]:
        images, seconds = self.samples.images, summary.seconds
        shared = {"samples": summary.count, "extractor_share": seconds["extractor"] / max(sum(seconds.values()), 1e-9)}
        if not isinstance(images, ModelImages):
            return shared
        spec = images.spec
        nfe = nfe_of(spec.sampler, spec.steps, spec.w, images.two_branches)
        cost = {"sampler": spec.sampler, "steps": spec.steps, "w": spec.w or 0.0, "nfe": nfe, "seed": spec.seed}
        return {**shared, "model": images.model, **cost, "images_per_second": summary.count / seconds["making"]}

    def _origin(self, summary: Summary) -> dict[str, Any]:
        """What has to be known to make the figures again."""
        statistics, extractor, images = self.statistics, self.samples.extractor, self.samples.images
        count = statistics.count if statistics is not None else self.works()[0].images.count
        digest = None if statistics is None else statistics.digest
        spec = asdict(images.spec) if isinstance(images, ModelImages) else None
        seed = images.spec.seed if isinstance(images, ModelImages) else 0
        return {
            "features": extractor.name,
            "weights": extractor.weights,
            "reference": {"path": self.reference, "count": count, "resolution": images.resolution,
                          "digest": digest},
            "spec": spec,
            "seconds": summary.seconds,
            "circumstances": circumstances(seed, pick_device(self.samples.device)),
        }


@dataclass(frozen=True)
class Extracting:
    """The work of a job array."""

    measurement: Measurement
    stage: str = "measure"

    def __call__(
        self, folder: Path, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """Make what is missing of this shard."""
        works = self.measurement.works()
        total, before = sum(work.size(shard, shards) for work in works), 0
        for work in works:
            if not work.make(shard, shards, stop, console, _after(before, total, tell), bar=False):
                return False
            before += work.size(shard, shards)
        return True


def _after(before: int, total: int, tell: Tell) -> Tell:
    return lambda done, _: tell(before + done, total)


@dataclass(frozen=True)
class Collecting:
    """The last job."""

    measurement: Measurement
    stage: str = "collect"

    def __call__(
        self, folder: Path, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """Write `results.json`."""
        self.measurement.write(console)
        return True
