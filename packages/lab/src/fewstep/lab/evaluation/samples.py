"""The samples of an evaluation: made once, kept in shards, met chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewstep.lab.evaluation.chunks import Chunk, make_missing
from fewstep.lab.evaluation.plan import Draw
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.latents import decode
from fewstep.lab.metrics import Features, Moments, extract, squared_errors
from fewstep.lab.progress import Tell, unheard
from fewstep.lab.sampling import SampleSpec, knowingly, nfe_of, sample_shards, timed_chunk
from fewstep.lab.shards import Shard, ShardCache
from fewstep.models import Autoencoder


@dataclass
class Samples:
    """Sets of samples by what they are (`Draw`); whatever is asked for twice is sampled once.

    sizes: the sets and how many samples each has. judge: name of the registered feature extractor, "" where nobody asks
    for `features`. Memory holds one chunk of images and the features of every set. prompts: sets of them by name, for
    models that take text. workers: processes that sample, see `fewstep.lab.workers`.
    """

    sizes: Mapping[Draw, int]
    models: Mapping[str, Model]
    cache: ShardCache
    judge: str
    shape: tuple[int, int, int]
    classes: tuple[int, ...]
    seed: int
    chunk: int
    device: torch.device
    workers: int = 1
    autoencoder: Autoencoder | None = None
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _features: dict[Draw, Features] = field(default_factory=dict)
    _speed: dict[Draw, float] = field(default_factory=dict)

    def spec(self, draw: Draw) -> SampleSpec:
        """What determines the samples of this set besides the model."""
        return SampleSpec(
            draw.sampler, draw.steps, draw.w, self.seed, draw.noises, self.shape, self.classes, self.chunk,
            draw.noise_level, self.prompts.get(draw.prompts, ()),
        )  # fmt: skip

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images, also where models work on latents."""
        return self.shape if self.autoencoder is None else self.autoencoder.image_shape

    def nfe(self, draw: Draw) -> int:
        """Network evaluations per image."""
        return nfe_of(draw.sampler, draw.steps, draw.w, self.models[draw.model].two_branches)

    def make(self, console: Console, bar: bool, stopping: Callable[[], bool], tell: Tell = unheard) -> None:
        """Sample what is not there yet; `tell` is told of network evaluations.

        Raises:
            Interrupted: `stopping` said so; finished chunks are kept.
        """
        chunks = [
            Chunk(draw.label, self.nfe(draw), self.key(draw), start, stop, self._job(draw, start, stop))
            for draw, size in self.sizes.items()
            for start, stop in self.spec(draw).ranges(size)
        ]
        make_missing(chunks, _make_chunk, self.cache, self.workers, console, stopping, bar=bar, tell=tell)

    def batches(self, draw: Draw, count: int) -> Iterator[Tensor]:
        """Samples 0, ..., count - 1 in chunks (B, C, H, W), decoded where they are latents, not clamped."""
        for shard, _ in self._shards(draw):
            yield decode(self.autoencoder, shard.images[:count])
            count -= len(shard.images)
            if count <= 0:
                return

    def read(self, draw: Draw, start: int, stop: int) -> Tensor:
        """Samples start, ..., stop - 1, all of one chunk that is there or is made, as `batches` gives them."""
        end = min(start + self.chunk, self.sizes[draw])
        shard = self.cache.get(self.key(draw), start, end)
        if shard is None:
            _make_chunk(*self._job(draw, start, end))
            shard = self.cache.get(self.key(draw), start, end)
            assert shard is not None  # it was just written
        return decode(self.autoencoder, shard.images[: stop - start])

    def features(self, draw: Draw, count: int) -> Features:
        """What the judge sees in samples 0, ..., count - 1."""
        if draw not in self._features:
            self._features[draw] = extract(self.judge, self.batches(draw, self.sizes[draw]))
        return Features(*(layer[:count] for layer in self._features[draw]))

    def moments(self, draw: Draw, count: int) -> Moments:
        """Mean and covariance of those features."""
        return Moments.of(self.features(draw, count).features)

    def labels(self, count: int) -> Tensor:
        """Classes (count,) of samples 0, ..., count - 1, the same in every set."""
        return torch.tensor(self.classes)[torch.arange(count) % len(self.classes)]

    def squared_errors(self, a: Draw, b: Draw, count: int) -> Tensor:
        """Mean squared pixel difference (count,) between samples of two sets from the same noises."""
        pairs = zip(self.batches(a, count), self.batches(b, count), strict=True)
        return torch.cat([squared_errors(first, second) for first, second in pairs])

    def images_per_second(self, draw: Draw) -> float:
        """Speed at which this set was sampled, in chunks of `chunk`; of those that were not forgotten."""
        if draw not in self._speed:
            found = [self.cache.get(self.key(draw), *each) for each in self.spec(draw).ranges(self.sizes[draw])]
            there = [shard for shard in found if shard is not None]
            seconds = sum(shard.seconds for shard in there)
            self._speed[draw] = sum(len(shard.images) for shard in there) / max(seconds, 1e-9)
        return self._speed[draw]

    def first(self, draw: Draw, count: int) -> Samples:
        """A set alone, of the chunks that hold its first `count` samples."""
        return replace(self, sizes={draw: min(self.sizes[draw], -(-count // self.chunk) * self.chunk)})

    def share(self, shard: int, shards: int) -> Samples:
        """Every `shards`-th set from `shard` on, in the order of what they cost."""
        dearest = sorted(self.sizes, key=lambda draw: -self.sizes[draw] * self.nfe(draw))
        return replace(self, sizes={draw: self.sizes[draw] for draw in dearest[shard::shards]})

    def forget(self, draw: Draw, kept: int) -> None:
        """Delete the chunks of a set that hold none of its first `kept` samples."""
        for start, stop in self.spec(draw).ranges(self.sizes[draw]):
            if start >= kept:
                self.cache.path(self.key(draw), start, stop).unlink(missing_ok=True)

    def _job(self, draw: Draw, start: int, stop: int) -> tuple[Model, SampleSpec, int, int, torch.device, ShardCache]:
        return self.models[draw.model], self.spec(draw), start, stop, self.device, self.cache

    def key(self, draw: Draw) -> dict[str, Any]:
        """Everything that determines the samples of a set but their number."""
        return self.spec(draw).key(self.models[draw.model].digest, self.device)

    def _shards(self, draw: Draw) -> Iterator[tuple[Shard, bool]]:
        model = self.models[draw.model]
        spec, size = self.spec(draw), self.sizes[draw]
        return sample_shards(lambda: model.denoiser, spec, size, self.device, self.cache, model.digest)


def _make_chunk(
    model: Model, spec: SampleSpec, start: int, stop: int, device: torch.device, cache: ShardCache
) -> float:
    """Make one shard; returns the seconds that sampling took."""
    with knowingly():
        shard = timed_chunk(model.denoiser, spec, start, stop, device)
    cache.put(spec.key(model.digest, device), start, stop, shard)
    return shard.seconds
