"""Data sets that a config names by `data.name` and finds by `data.files`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.lab.checks import one_of, require
from fewstep.lab.config import ConfigError, DataConfig, FilesConfig
from fewstep.lab.data import Data, Split, stratified
from fewstep.lab.datasets import cifar10, mnist
from fewstep.lab.datasets.index import Index, folder_index, shard_index
from fewstep.lab.datasets.reader import Reader, Workers
from fewstep.lab.datasets.resizing import METHODS, MODES
from fewstep.lab.datasets.stream import Stream

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Published:
    """A data set that comes with a test set, which is what is held out; load: (training, test) from a folder."""

    image_size: int
    channels: int
    num_classes: int
    heldout: int
    load: Callable[[Path], tuple[Pair, Pair]]


def _one_class(load: Callable[[Path], tuple[Pair, Pair]], folder: Path) -> tuple[Pair, Pair]:
    """What `load` gives, all of it in class 0."""
    (train, labels), (test, others) = load(folder)
    return (train, torch.zeros_like(labels)), (test, torch.zeros_like(others))


PUBLISHED = {
    "mnist": Published(28, 1, 10, 10_000, mnist.load),
    "cifar10": Published(32, 3, 10, 10_000, cifar10.load),
    "cifar10_unconditional": Published(32, 3, 1, 10_000, partial(_one_class, cifar10.load)),
    "cifar10_jpeg": Published(32, 3, 10, 10_000, cifar10.load_jpeg),
}


def check_files(config: DataConfig) -> None:
    """Refuse, before any compute, what the files are not.

    Raises:
        ConfigError: names key, value and what would be right.
    """
    files = _files(config)
    require(Path(files.path).is_dir(), "data.files.path", files.path, "a folder")
    for name in ("workers", "max_unreadable"):
        require(getattr(files, name) >= 0, f"data.files.{name}", getattr(files, name), "0 or more")
    if config.name in PUBLISHED:
        known = PUBLISHED[config.name]
        for key in ("image_size", "channels", "num_classes", "heldout"):
            found, right = getattr(config, key), getattr(known, key)
            require(found == right, f"data.{key}", found, f"{right}, that of {config.name}")
        return
    require(config.image_size >= 1, "data.image_size", config.image_size, "1 or more")
    one_of("data.channels", config.channels, tuple(MODES))
    one_of("data.files.resize", files.resize, tuple(METHODS))
    counts = index_of(config).counts
    right = f"{len(counts)}, the classes in {files.path}"
    require(config.num_classes == len(counts), "data.num_classes", config.num_classes, right)
    if min(counts) < 2:
        rare = counts.index(min(counts))
        raise ConfigError(f"{files.path}: class {rare} has {counts[rare]} images; one to train on and one to hold out")
    least, most = len(counts), sum(counts) - len(counts)
    require(least <= config.heldout <= most, "data.heldout", config.heldout, f"between {least} and {most}")


def load_files(config: DataConfig) -> Data:
    """The splits of a data set that `check_files` has passed; the last one is kept.

    Raises:
        ConfigError: a file is missing, damaged, or has another checksum than it should.
    """
    files = _files(config)
    if config.name in PUBLISHED:
        return _published(config.name, files.path, files.flips)
    return _streamed(
        config.name, files.path, config.image_size, config.channels, config.heldout, files.resize, files.flips,
        files.workers, files.max_unreadable,
    )  # fmt: skip


def index_of(config: DataConfig) -> Index:
    """Which samples there are, of data sets that stay in files."""
    return _index(config.name, _files(config).path)


def _index(name: str, path: str) -> Index:
    if name == "image_folder":
        return folder_index(Path(path))
    return shard_index(Path(path), name == "webdataset_with_captions")


@lru_cache(maxsize=1)
def _published(name: str, path: str, flips: bool) -> Data:
    train, test = PUBLISHED[name].load(Path(path))
    return Data(Split(*train, flips=flips), Split(*test))


@lru_cache(maxsize=1)
def _streamed(
    name: str, path: str, size: int, channels: int, heldout: int, resize: str, flips: bool, workers: int, most: int
) -> Data:
    index = _index(name, path)
    reader = Reader(index.places, size, channels, resize)
    shared = Workers(reader, workers) if workers else None
    labels = torch.from_numpy(index.labels)

    def split(part: Tensor, flips: bool) -> Split:
        numbers = part.numpy()
        stream = Stream(reader, numbers, index.labels[numbers], shared, most)
        captions = None if index.captions is None else tuple(np.array(index.captions, object)[numbers])
        return Split(stream, labels[part], captions, flips)

    train, held = stratified(labels, heldout)
    return Data(split(train, flips), split(held, False))


def _files(config: DataConfig) -> FilesConfig:
    if config.files is None:
        raise ConfigError(f"data.files=null: {config.name} needs it; use data={config.name} data.files.path=FOLDER")
    return config.files
