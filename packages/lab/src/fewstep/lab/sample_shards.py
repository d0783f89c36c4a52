"""`fewstep sample --shards K cluster=slurm`: the chunks of one set of samples made by a job array, then put together.

Chunks of consecutive indices are what is sampled at once in any case, so the images are bitwise those of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fewstep.lab.config import ConfigError
from fewstep.lab.distributed import pick_device
from fewstep.lab.evaluation.zoo import Model, with_guidance
from fewstep.lab.inpainting import as_generator
from fewstep.lab.latents import autoencoder_of
from fewstep.lab.progress import Tell
from fewstep.lab.sample import decoded, write
from fewstep.lab.sampling import SampleSpec, knowingly, timed_chunk
from fewstep.lab.shards import ShardCache

FOLDER = "shards"


@dataclass(frozen=True)
class Samples:
    """`num` samples of the model in a folder, as `spec` says, into the folder `out`."""

    model: str
    spec: SampleSpec
    num: int
    out: str
    device: str

    @property
    def cache(self) -> ShardCache:
        """Where the chunks lie."""
        return ShardCache(Path(self.out) / FOLDER)

    def place(self) -> tuple[Model, dict[str, Any]]:
        """The model, and the key of its chunks."""
        model = Model(Path(self.model), pick_device(self.device))
        return model, self.spec.key(model.digest, model.device)


@dataclass(frozen=True)
class Sampling:
    """The work of the array."""

    samples: Samples
    stage: str = "sample"

    def __call__(
        self, folder: Path, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """Make the chunks of this shard that are missing."""
        spec, (model, key) = self.samples.spec, self.samples.place()
        autoencoder = autoencoder_of(Path(self.samples.model), model.device)
        denoiser = as_generator(with_guidance(model.network, spec.w), autoencoder)
        made, seconds = 0, 0.0
        mine = list(spec.ranges(self.samples.num))[shard::shards]
        there, total = 0, sum(end - start for start, end in mine)
        for start, end in mine:
            tell(there, total)
            if stop():
                return False
            if self.samples.cache.get(key, start, end) is None:
                with knowingly():
                    chunk = timed_chunk(denoiser, spec, start, end, model.device)
                self.samples.cache.put(key, start, end, chunk)
                made, seconds = made + end - start, seconds + chunk.seconds
            there += end - start
        tell(there, total)
        console.print(f"shard {shard} of {shards}: {made} images, {made / max(seconds, 1e-9):,.0f} images/s")
        return True


@dataclass(frozen=True)
class Collecting:
    """The last job: what `fewstep sample` writes, from the chunks."""

    samples: Samples
    every_image: bool
    stage: str = "collect"

    def __call__(
        self, folder: Path, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """Put the chunks together.

        Raises:
            ConfigError: one is missing or damaged.
        """
        spec, (model, key) = self.samples.spec, self.samples.place()
        images = []
        for start, end in spec.ranges(self.samples.num):
            chunk = self.samples.cache.get(key, start, end)
            if chunk is None:
                path = self.samples.cache.path(key, start, end)
                raise ConfigError(f"{path}: missing or damaged; run the same `fewstep sample` again")
            images.append(chunk.images)
        out = Path(self.samples.out)
        images = decoded(autoencoder_of(Path(self.samples.model), model.device), images, console)
        write(out, torch.cat(images).clamp(-1, 1), spec, self.samples.model, every_image=self.every_image)
        console.print(f"{out / 'grid.png'}  {out / 'samples.safetensors'}", markup=False)
        return True
