"""Latents in the place of images: made once by the run's autoencoder, kept on disk, decoded after sampling.

`space: latent` has every denoiser trained on what the stage of kind autoencoder left in `latents/`: shards of latents
with checksums, and an index that names the autoencoder by its own. A model's folder holds a copy of that autoencoder.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from fewstep.lab.checkpoint import write_text
from fewstep.lab.config import (
    AutoencoderConfig,
    ClassifierConfig,
    Config,
    ConfigError,
    PretrainedAutoencoderConfig,
    StageConfig,
    TextEncoderConfig,
)
from fewstep.lab.context import Interrupted, never
from fewstep.lab.data import Split, load_data
from fewstep.lab.shards import Shard, read_shard, write_shard
from fewstep.models import Autoencoder, DiffusersAutoencoder, load_autoencoder

FORMAT = 1
MEMORY = 2**31  # bytes of latents that every process keeps in memory, at most; more stay in files
PICTURES = ClassifierConfig | AutoencoderConfig | TextEncoderConfig  # trainings that never see latents
PIXELS = 16 * 512 * 512  # encoded or decoded at once, at most: an autoencoder keeps hundreds of numbers of each
AutoencoderStage = AutoencoderConfig | PretrainedAutoencoderConfig
LATENT = "latent"
FOLDER, INDEX, BEGUN, INSIDE = "latents", "index.json", "begun.json", "autoencoder"


def autoencoder_stage(config: Config) -> AutoencoderStage | None:
    """The stage whose latents take the place of images; None in pixel space."""
    if config.space != LATENT:
        return None
    return next(stage for stage in config.stages.values() if isinstance(stage, AutoencoderStage))


def sample_shape(config: Config) -> tuple[int, int, int]:
    """(C, H, W) of what denoisers work on: of the images or, in latent space, of the latents."""
    data, stage = config.data, autoencoder_stage(config)
    if stage is None:
        return data.channels, data.image_size, data.image_size
    if isinstance(stage, PretrainedAutoencoderConfig):
        return read_autoencoder(stage, data.image_size, weights=False).latent_shape
    size = data.image_size // 2 ** (len(stage.channel_mult) - 1)
    return stage.latent_channels, size, size


def read_autoencoder(
    stage: PretrainedAutoencoderConfig, image_size: int, *, weights: bool = True
) -> DiffusersAutoencoder:
    """The autoencoder that the stage names, on the CPU; `weights=False`: what its settings say, on the meta device.

    Raises:
        ConfigError: the folder, or something in it, is missing, damaged, or of a kind that is not known.
    """
    try:
        return DiffusersAutoencoder.read(stage.path, image_size, weights=weights)
    except Exception as error:  # diffusers raises errors of many types
        raise ConfigError(f"stages.{stage.name}.path={stage.path}: {' '.join(str(error).split())}") from error


def training_split(config: Config, stage: StageConfig) -> Split:
    """What a stage trains on: images or, a denoiser's in latent space, their latents.

    Raises:
        ConfigError: the latents are missing or damaged, or were made with another autoencoder.
    """
    split, source = load_data(config.data).train, autoencoder_stage(config)
    if source is None or isinstance(stage, PICTURES):
        return split
    folder = Path(config.out) / source.name
    return read_latents(folder / FOLDER / "train", split, load_autoencoder(folder / "model").digest)


def give_autoencoder(config: Config, model: Path) -> None:
    """Put the run's autoencoder, in latent space, beside the weights in a model's folder: it can be sampled alone."""
    source = autoencoder_stage(config)
    if source is not None:
        shutil.copytree(Path(config.out) / source.name / "model", model / INSIDE, dirs_exist_ok=True)


def autoencoder_of(model: Path, device: torch.device) -> Autoencoder | None:
    """The autoencoder in a model's folder; None if the model works on images."""
    return load_autoencoder(model / INSIDE, device) if (model / INSIDE).is_dir() else None


def run_autoencoder(config: Config, device: torch.device) -> Autoencoder | None:
    """The run's own; None in pixel space."""
    source = autoencoder_stage(config)
    return None if source is None else load_autoencoder(Path(config.out) / source.name / "model", device)


@torch.inference_mode()
def decode(autoencoder: Autoencoder | None, latents: Tensor) -> Tensor:
    """Images (B, C, H, W) float32 on the CPU, not clamped; the latents themselves where there is no autoencoder."""
    if autoencoder is None:
        return latents
    parts = latents.split(_at_once(autoencoder))
    return torch.cat([autoencoder.decode(part.to(autoencoder.shift.device)).float().cpu() for part in parts])


def encode(autoencoder: Autoencoder | None, images: Tensor) -> Tensor:
    """Latents of images (B, C, H, W); the images themselves where there is no autoencoder."""
    return images if autoencoder is None else torch.cat(list(means(autoencoder, [images])))


def latent_mask(mask: Tensor, autoencoder: Autoencoder) -> Tensor:
    """1 at every latent position of which any pixel is to be painted. Shape: mask (1, 1, H, W) -> (1, 1, H / f, W / f).

    Raises:
        ConfigError: a mask of another size than the images, or neither black nor white somewhere.
    """
    found, size = tuple(mask.shape[-2:]), autoencoder.image_shape[1:]
    if found != size:
        raise ConfigError(f"mask: has {found} pixels, must have the images' {size}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ConfigError("mask: must be black and white, with nothing between")
    return F.max_pool2d(mask, autoencoder.factor)


@torch.inference_mode()
def means(autoencoder: Autoencoder, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The posterior's means (B, C, H, W) float32 on the CPU, of each batch of images."""
    device, most = autoencoder.shift.device, _at_once(autoencoder)
    for batch in batches:
        yield torch.cat([autoencoder.encode(part.to(device)).mean.float().cpu() for part in batch.split(most)])


def _at_once(autoencoder: Autoencoder) -> int:
    """Images that it is given at once, at most."""
    _, height, width = autoencoder.image_shape
    return max(1, PIXELS // (height * width))


def write_latents(
    folder: Path, autoencoder: Autoencoder, split: Split, chunk: int, stopping: Callable[[], bool] = never
) -> None:
    """Keep the latents of a split's images: shards of `chunk`, and last the index that names the autoencoder.

    What is kept are the posterior's means: the decoder has learned to bear its spread around them. A call that was
    stopped is gone on with, if it was for the same.

    Raises:
        Interrupted: `stopping` said so; finished shards are kept.
    """
    index = {"format": FORMAT, "autoencoder": autoencoder.digest, "count": len(split), "chunk": chunk}
    text = json.dumps(index, indent=1) + "\n"
    begun = folder / BEGUN
    if not begun.is_file() or begun.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(begun, text)
    count = -(-len(split) // chunk)
    first = next((i for i in range(count) if read_shard(_shard(folder, i)) is None), count)
    began = time.perf_counter()
    for i, latents in enumerate(means(autoencoder, split.batches(chunk, first)), first):
        write_shard(_shard(folder, i), Shard(latents, time.perf_counter() - began))
        began = time.perf_counter()
        if stopping():
            raise Interrupted(f"{folder}: stopped after {i + 1} of {count} files of latents; they are kept")
    begun.replace(folder / INDEX)


def read_latents(folder: Path, split: Split, digest: str) -> Split:
    """The split with latents in the place of its images.

    digest: of the autoencoder that is to decode what is learned from them.

    Raises:
        ConfigError: a file is missing or damaged, or the latents are another autoencoder's or of other images.
    """
    again = f"delete {folder.parent.parent} and run again"
    try:
        index = json.loads((folder / INDEX).read_text())
        made, count, chunk = index["autoencoder"], index["count"], index["chunk"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / INDEX}: missing or damaged ({error}); {again}") from error
    if made != digest:
        text = f"{folder}: latents of another autoencoder (SHA-256 {made[:12]}, the run's is {digest[:12]})"
        raise ConfigError(f"{text}; {again}")
    if count != len(split):
        raise ConfigError(f"{folder}: latents of {count} images, the data set has {len(split)}; {again}")
    files = LatentFiles([_shard(folder, i) for i in range(-(-count // chunk))], count, chunk)
    return replace(split, images=files.all() if files.size <= MEMORY else files)


class LatentFiles:
    """Latents that stay in their files; `data.Stored`, of those too many for the memory of every process.

    What was read lies in the system's cache of files, once for all processes. A file's checksum is looked at when it is
    first asked for.

    paths: the files, each of `chunk` latents but the last. count: latents in all.
    """

    ahead = 0
    unreadable: Sized = ()

    def __init__(self, paths: list[Path], count: int, chunk: int) -> None:
        self._paths, self._count, self._chunk = paths, count, chunk
        self._rows: dict[int, Any] = {}
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise self._damaged(missing[0])

    def __len__(self) -> int:
        return self._count

    def expect(self, indices: Tensor) -> None:
        """Nothing: they are read when they are asked for."""

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, H, W) float32 at `indices` (B,), and these.

        Raises:
            ConfigError: a file is damaged.
        """
        places = [divmod(index, self._chunk) for index in indices.tolist()]
        return torch.cat([self._file(number)[row : row + 1] for number, row in places]), indices

    def all(self) -> Tensor:
        """All of them, in memory."""
        return torch.cat([self._whole(path) for path in self._paths])

    @property
    def size(self) -> int:
        """Bytes of the files, which are those of the latents but for their headers."""
        return sum(path.stat().st_size for path in self._paths)

    def _file(self, number: int) -> Any:
        if number not in self._rows:
            path = self._paths[number]
            self._whole(path)
            self._rows[number] = safe_open(path, framework="pt").get_slice("images")
        return self._rows[number]

    def _whole(self, path: Path) -> Tensor:
        found = read_shard(path)
        if found is None:
            raise self._damaged(path)
        return found.images

    @staticmethod
    def _damaged(path: Path) -> ConfigError:
        return ConfigError(f"{path}: missing or damaged; delete {path.parents[2]} and run again")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"
