"""Sets of images that are read piece by piece, so that memory does not grow with their number."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.lab.compose import compose
from fewstep.lab.config import ConfigError, DataConfig
from fewstep.lab.data import Data, Split, load_data, pixels
from fewstep.lab.datasets.resizing import SUFFIXES
from fewstep.lab.distributed import pick_device
from fewstep.lab.evaluation.zoo import Model, with_guidance
from fewstep.lab.inpainting import as_generator
from fewstep.lab.latents import autoencoder_of, decode
from fewstep.lab.sampling import SampleSpec, in_turn, knowingly, timed_chunk
from fewstep.lab.shards import ShardCache, read_shard
from fewstep.models import Autoencoder
from fewstep.schedules import Denoiser


class Images(Protocol):
    """Images 0, ..., count - 1, square; plain fields, since jobs pickle it."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def resolution(self) -> int:
        """Their height and width."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells them from other images, as JSON can hold it."""

    def prompts(self, start: int, stop: int) -> list[str]:
        """What images start, ..., stop - 1 are to show; [] if that is not known."""

    def read(self, start: int, stop: int) -> Tensor:
        """Those images (B, C, H, W) in about [-1, 1]."""


@dataclass(frozen=True)
class ImageFiles:
    """Every image file below a folder, in the order of their names, all of one square size."""

    folder: str

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Paths below the folder."""
        root = Path(self.folder)
        return tuple(sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in SUFFIXES))

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.files)

    @cached_property
    def resolution(self) -> int:
        """The size of the first one."""
        return self._read(self.files[0]).shape[-1]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """A checksum of names, sizes and times of the files: of a million the list itself would be megabytes."""
        state = [[name, *_state(Path(self.folder) / name)] for name in self.files]
        return {"files": hashlib.sha256(json.dumps(state).encode()).hexdigest()}

    def prompts(self, start: int, stop: int) -> list[str]:
        """None: files do not say what they are to show."""
        return []

    def read(self, start: int, stop: int) -> Tensor:
        """Raises ConfigError for a file that cannot be read, or is of another size than the first."""
        images = [self._read(name) for name in self.files[start:stop]]
        side = self.resolution
        for name, image in zip(self.files[start:stop], images, strict=True):
            _, height, width = image.shape
            if (height, width) != (side, side):
                path = Path(self.folder) / name
                raise ConfigError(f"{path}: {height} x {width}: must be {side} x {side}, as the first")
        return torch.stack(images)

    def _read(self, name: str) -> Tensor:
        try:
            with Image.open(Path(self.folder) / name) as picture:
                levels = np.asarray(picture.convert("RGB")).copy()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{Path(self.folder) / name}: not an image that can be read ({error})") from error
        return torch.from_numpy(levels).permute(2, 0, 1).float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class TensorFiles:
    """Images in `samples.safetensors` as `fewstep sample` writes it, or in the shards of a set, one after the other."""

    paths: tuple[str, ...]

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [_shape(Path(path)) for path in self.paths]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(shape[0] for shape in self._shapes)

    @property
    def resolution(self) -> int:
        """Their width."""
        return self._shapes[0][-1]

    @property
    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of the files."""
        return {"files": [[Path(path).name, *_state(Path(path))] for path in self.paths]}

    def prompts(self, start: int, stop: int) -> list[str]:
        """Those that `fewstep sample` was given, taken in turn."""
        with safe_open(self.paths[0], framework="pt") as file:
            said = (file.metadata() or {}).get("sample", "{}")
        prompts = json.loads(said).get("prompts", [])
        return in_turn(prompts, start, stop)

    def read(self, start: int, stop: int) -> Tensor:
        """From as many files as it takes; raises ConfigError for a shard whose checksum is another."""
        parts, first = [], 0
        for path, (count, *_) in zip(self.paths, self._shapes, strict=True):
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                parts.append(_part(Path(path), low, high))
            first += count
        return torch.cat(parts)


class DataImages(ABC):
    """Images of a split, as networks see them."""

    @property
    @abstractmethod
    def split(self) -> Split:
        """The images with what they are of."""

    @property
    @abstractmethod
    def config(self) -> DataConfig:
        """Where they come from."""

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.split)

    @property
    def resolution(self) -> int:
        """As the experiment has them."""
        return self.config.image_size

    @property
    def identity(self) -> dict[str, Any]:
        """The data's part of the config."""
        return {"data": repr(self.config)}

    def prompts(self, start: int, stop: int) -> list[str]:
        """Their captions, if they have any."""
        return list((self.split.captions or ())[start:stop])

    def read(self, start: int, stop: int) -> Tensor:
        """By the data set's own order, none mirrored; of files every worker process reads its part at once."""
        split = self.split
        parts = [part for part in torch.arange(start, stop).tensor_split(max(1, split.ahead)) if len(part)]
        for part in parts:
            split.expect(part)
        return torch.cat([pixels(split.images, part, torch.device("cpu"))[0] for part in parts])


@dataclass(frozen=True)
class TrainingImages(DataImages):
    """The training images of an experiment."""

    experiment: str
    overrides: tuple[str, ...] = ()

    @cached_property
    def config(self) -> DataConfig:
        """That of the experiment."""
        return compose(self.experiment, self.overrides).data

    @cached_property
    def split(self) -> Split:
        """The training split."""
        return load_data(self.config).train


@dataclass(frozen=True)
class HeldOutImages(DataImages):
    """The held-out images of data at hand."""

    data: Data
    source: DataConfig

    @property
    def config(self) -> DataConfig:
        """As given."""
        return self.source

    @property
    def split(self) -> Split:
        """The held-out split."""
        return self.data.heldout

    @property
    def identity(self) -> dict[str, Any]:
        """The data's part of the config, and that these are not the training images."""
        return {**super().identity, "split": "heldout"}


@dataclass(frozen=True)
class ModelImages:
    """`count` samples of a model, drawn when they are read; kept in shards below `keep`, if that is given."""

    model: str
    spec: SampleSpec
    count: int
    device: str
    keep: str | None = None

    @cached_property
    def _loaded(self) -> Model:
        return Model(Path(self.model), pick_device(self.device))

    @cached_property
    def _autoencoder(self) -> Autoencoder | None:
        return autoencoder_of(Path(self.model), pick_device(self.device))

    @cached_property
    def _denoiser(self) -> Denoiser:
        return as_generator(with_guidance(self._loaded.network, self.spec.w), self._autoencoder)

    def __getstate__(self) -> dict[str, Any]:
        """Without the networks, which a job loads itself."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @property
    def two_branches(self) -> bool:
        """Whether a guided call costs two network evaluations."""
        return self._loaded.two_branches

    @property
    def resolution(self) -> int:
        """That of the images, also where the model works on latents."""
        return (self.spec.shape if self._autoencoder is None else self._autoencoder.image_shape)[-1]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the samples but their number."""
        return self.spec.key(self._loaded.digest, self._loaded.device)

    def prompts(self, start: int, stop: int) -> list[str]:
        """What they are sampled from."""
        return self.spec.texts(start, stop)

    def read(self, start: int, stop: int) -> Tensor:
        """A chunk of `spec`, which is what its bits depend on; decoded, if it is of latents."""
        kept = None if self.keep is None else ShardCache(Path(self.keep))
        shard = None if kept is None else kept.get(self.identity, start, stop)
        if shard is None:
            with knowingly():
                shard = timed_chunk(self._denoiser, self.spec, start, stop, self._loaded.device)
            if kept is not None:
                kept.put(self.identity, start, stop, shard)
        return decode(self._autoencoder, shard.images)


def open_images(path: str, overrides: Sequence[str] = ()) -> Images:
    """What lies at `path`: an experiment, a file or folder of samples, or a folder of image files.

    Raises:
        ConfigError: nothing of that kind.
    """
    root = Path(path)
    if (root / "config.yaml").is_file():
        return TrainingImages(path, tuple(overrides))
    if overrides:
        raise ConfigError(f"{overrides[0]}: must be left out: {path} is no experiment, whose keys it would change")
    single = next((each for each in (root, root / "samples.safetensors") if each.is_file()), None)
    if single is not None:
        return TensorFiles((str(single),))
    shards = sorted(root.rglob("[0-9]*-[0-9]*.safetensors"))
    folders = sorted({str(shard.parent) for shard in shards})
    if len(folders) > 1:
        raise ConfigError(f"{path}: holds several sets of samples, {', '.join(folders)}: must be one of them")
    if shards:
        _refuse_gaps(shards)
        return TensorFiles(tuple(map(str, shards)))
    files = ImageFiles(path)
    if files.count == 0:
        raise ConfigError(f"{path}: must be an experiment, samples.safetensors, or a folder with images ({SUFFIXES})")
    return files


def _refuse_gaps(shards: Sequence[Path]) -> None:
    """Shards are named by the numbers of their samples, the last one not included."""
    expected = 0
    for shard in shards:
        start, stop = map(int, shard.stem.split("-"))
        if start != expected:
            missing = f"samples {expected} to {start - 1} are missing"
            raise ConfigError(f"{shard.parent}: {missing}: run the command that makes them again")
        expected = stop


def _part(path: Path, low: int, high: int) -> Tensor:
    """Images low, ..., high - 1 of a file."""
    with safe_open(path, framework="pt") as file:
        if "sha256" not in (file.metadata() or {}):
            return file.get_slice("images")[low:high]
    shard = read_shard(path)
    if shard is None:
        raise ConfigError(f"{path}: damaged: delete it and run the command that makes it again")
    return shard.images[low:high]


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _shape(path: Path) -> tuple[int, ...]:
    try:
        with safe_open(path, framework="pt") as file:
            shape = tuple(file.get_slice("images").get_shape())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: no file of samples ({str(error).splitlines()[0]})") from error
    if len(shape) != 4 or shape[2] != shape[3] or shape[1] not in (1, 3):
        raise ConfigError(f"{path}: images of shape {shape}: must be (N, 1 or 3, size, size)")
    return shape
