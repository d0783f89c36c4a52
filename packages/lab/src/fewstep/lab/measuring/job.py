"""Features of a set of images, in shards that are whole or absent, and what they come to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewstep.lab.config import ConfigError
from fewstep.lab.distributed import pick_device
from fewstep.lab.measuring.images import Images
from fewstep.lab.metrics import (
    ClipScore,
    Extractor,
    Moments,
    StreamedInceptionScore,
    StreamedMoments,
    load_extractor,
    refuse_broken,
)
from fewstep.lab.progress import SamplingProgress, Tell, unheard
from fewstep.lab.shards import FeatureCache, FeatureShard

FOLDER = "features"
KEPT = 10_000  # samples, spread evenly, whose features KID, precision and recall take: 82 MB of Inception's


@dataclass(frozen=True)
class Extraction:
    """What an extractor sees in a set of images, in chunks of consecutive ones, kept below `out`.

    features, weights: see `load_extractor`. clip: of `ClipScore`, where images have prompts.
    """

    images: Images
    features: str
    out: str
    chunk: int
    device: str = "auto"
    weights: str | None = None
    clip: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the networks, which a job loads itself."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @cached_property
    def extractor(self) -> Extractor:
        """The network."""
        return load_extractor(self.features, pick_device(self.device), Path(self.weights) if self.weights else None)

    @cached_property
    def score(self) -> ClipScore | None:
        """CLIP, if it was asked for."""
        return None if self.clip is None else ClipScore.load(self.clip, pick_device(self.device))

    def of(self, images: Images) -> Extraction:
        """The same of other images, with the network that is loaded here once."""
        other = replace(self, images=images)
        other.__dict__["extractor"] = self.extractor  # as cached_property does, which a frozen dataclass lets alone
        return other

    @property
    def cache(self) -> FeatureCache:
        """Where the shards lie."""
        return FeatureCache(Path(self.out) / FOLDER)

    @cached_property
    def key(self) -> dict[str, Any]:
        """What the shards depend on."""
        found = {"format": 1, "images": self.images.identity, "features": self.extractor.name}
        clip = {} if self.score is None else {"clip": self.score.weights}
        return {**found, "weights": self.extractor.weights, **clip}

    def ranges(self) -> list[tuple[int, int]]:
        """(start, stop) of every chunk."""
        count = self.images.count
        return [(start, min(start + self.chunk, count)) for start in range(0, count, self.chunk)]

    def size(self, shard: int, shards: int) -> int:
        """Images of the shard."""
        return sum(high - low for low, high in self.ranges()[shard::shards])

    def make(
        self,
        shard: int,
        shards: int,
        stop: Callable[[], bool],
        console: Console,
        tell: Tell = unheard,
        *,
        bar: bool = True,
    ) -> bool:
        """Make what is missing of every `shards`-th chunk from `shard` on; False if stopped before the end."""
        began, seconds, made = time.perf_counter(), {"making": 0.0, "extractor": 0.0}, 0
        total = self.size(shard, shards)
        with SamplingProgress(console, total, bar=bar) as shown:
            for low, high in self.ranges()[shard::shards]:
                tell(shown.made, total)
                if stop():
                    return False
                found = self.cache.get(self.key, low, high)
                if found is None:
                    found = self._look(low, high)
                    self.cache.put(self.key, low, high, found)
                    made += high - low
                    seconds = {name: value + found.seconds[name] for name, value in seconds.items()}
                    shown.advance("features", high - low, 1, sum(found.seconds.values()))
                else:
                    shown.advance("features", high - low, 1, 0.0, cached=True)
        tell(total, total)
        console.print(_speed(made, seconds, time.perf_counter() - began), highlight=False)
        return True

    def whole(self) -> bool:
        """Whether nothing is missing."""
        return all(self.cache.get(self.key, low, high) is not None for low, high in self.ranges())

    def shards(self) -> Iterator[tuple[int, FeatureShard]]:
        """(start, shard) of all in order; raises ConfigError for one that is missing or damaged."""
        for low, high in self.ranges():
            found = self.cache.get(self.key, low, high)
            if found is None:
                path = self.cache.path(self.key, low, high)
                raise ConfigError(f"{path}: missing or damaged; run the same command again")
            yield low, found

    def _look(self, low: int, high: int) -> FeatureShard:
        clock = [time.perf_counter()]
        images = self.images.read(low, high)
        clock.append(time.perf_counter())
        finite = images.flatten(1).isfinite().all(1)
        seen = self.extractor(images.nan_to_num())
        tensors = {"features": seen.features} | ({} if seen.logits is None else {"logits": seen.logits})
        if self.score is not None:
            tensors["alignment"] = self.score(images.nan_to_num(), self.images.prompts(low, high))
        clock.append(time.perf_counter())
        broken = (low + (~finite).nonzero().flatten()).tolist()
        return FeatureShard(tensors, broken, {"making": clock[1] - clock[0], "extractor": clock[2] - clock[1]})


def _speed(made: int, seconds: dict[str, float], total: float) -> str:
    if made == 0:
        return "all features were there"
    rest = total - sum(seconds.values())
    parts = {"making images": seconds["making"], "extractor": seconds["extractor"], "the rest": rest}
    shares = ", ".join(f"{name} {part / total:.1%}" for name, part in parts.items())
    return f"{made:,} images, {made / total:,.1f} images/s: {shares}"


@dataclass
class Summary:
    """What streams together from the shards of an extraction: memory does not grow with their number.

    kept: features (at most KEPT, D) of samples that are spread evenly. alignment: mean cosine with the prompts.
    """

    count: int
    moments: Moments
    kept: Tensor
    score: StreamedInceptionScore | None
    alignment: float | None
    seconds: dict[str, float] = field(default_factory=dict)


def summarise(work: Extraction, splits: int) -> Summary:
    """Read all shards once. splits: parts of the inception score.

    Raises:
        ConfigError: a shard is missing or damaged.
        ValueError: samples that are not finite, with their number.
    """
    count, streamed = work.images.count, StreamedMoments()
    finite = torch.ones(count, dtype=torch.bool)
    score, alignment = StreamedInceptionScore(count, splits), torch.zeros(0)
    has_classes, kept = False, []
    seconds = {"making": 0.0, "extractor": 0.0}
    for start, shard in work.shards():
        features = shard.tensors["features"]
        streamed.add(features)
        kept.append(features[spread(start, start + len(features), count)])
        if "logits" in shard.tensors:
            has_classes = True
            score.add(start, shard.tensors["logits"])
        alignment = torch.cat([alignment, shard.tensors.get("alignment", torch.zeros(0))])
        finite[shard.broken] = False
        seconds = {name: value + shard.seconds[name] for name, value in seconds.items()}
    refuse_broken(finite)
    mean = float(alignment.double().mean()) if len(alignment) else None
    return Summary(count, streamed.moments(), torch.cat(kept), score if has_classes else None, mean, seconds)


def spread(start: int, stop: int, count: int) -> Tensor:
    """Which of start, ..., stop - 1 are kept so that min(KEPT, count) of `count` are, spread evenly: (B,) bool."""
    index, most = torch.arange(start, stop), min(KEPT, count)
    return index * most // count != (index - 1) * most // count
