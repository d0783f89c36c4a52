"""Samples and their features on disk in shards that are whole or absent: killed work loses at most one shard."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.lab.checkpoint import write_tensors
from fewstep.lab.parts import digest_of

T = TypeVar("T")


class Shard(NamedTuple):
    """images (B, C, H, W) float32, not clamped, and the seconds that sampling them took."""

    images: Tensor
    seconds: float


class FeatureShard(NamedTuple):
    """What an extractor saw in consecutive images.

    tensors: "features" (B, D), and if there are any "logits" (B, K) and "alignment" (B,), cosines with prompts.
    broken: numbers of the images that were not finite. seconds: of "making" the images, and of the "extractor".
    """

    tensors: dict[str, Tensor]
    broken: list[int]
    seconds: dict[str, float]


class Cache(ABC, Generic[T]):
    """Shards of consecutive sample indices under `root`, in one folder per key.

    A key names everything that determines the images (weights, sampler, steps, w, seed, ...): another key is another
    folder, so nothing is ever reused for what it is not. Shards are written to a temporary file and renamed, and carry
    a checksum: a damaged one counts as absent.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: Mapping[str, Any]) -> Path:
        """Where shards of this key lie; `key` must be JSON-able."""
        return self.root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, key: Mapping[str, Any], start: int, stop: int) -> Path:
        """File of sample indices start, ..., stop - 1."""
        return self.folder(key) / f"{start:07d}-{stop:07d}.safetensors"

    def get(self, key: Mapping[str, Any], start: int, stop: int) -> T | None:
        """The shard, or None where there is none that is whole."""
        path = self.path(key, start, stop)
        return self.read(path) if path.is_file() else None

    def put(self, key: Mapping[str, Any], start: int, stop: int, shard: T) -> None:
        """Keep a shard."""
        path = self.path(key, start, stop)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write(path, shard)

    @abstractmethod
    def read(self, path: Path) -> T | None:
        """The shard in this file; None if it is truncated or its checksum does not match."""

    @abstractmethod
    def write(self, path: Path, shard: T) -> None:
        """Write a shard with its checksum; an interrupted call leaves the file as it was."""


class ShardCache(Cache[Shard]):
    """Shards of samples."""

    def read(self, path: Path) -> Shard | None:
        """See `read_shard`."""
        return read_shard(path)

    def write(self, path: Path, shard: Shard) -> None:
        """See `write_shard`."""
        write_shard(path, shard)


class FeatureCache(Cache[FeatureShard]):
    """Shards of features."""

    def read(self, path: Path) -> FeatureShard | None:
        """The features in this file, if it is whole."""
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads(file.metadata()["shard"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            whole = said.pop("digest") == digest_of(tensors)
            return FeatureShard(tensors, **said) if whole else None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None

    def write(self, path: Path, shard: FeatureShard) -> None:
        """Write them with their checksum."""
        tensors = {name: tensor.contiguous() for name, tensor in shard.tensors.items()}
        said = {"digest": digest_of(tensors), "broken": shard.broken, "seconds": shard.seconds}
        write_tensors(path, tensors, {"shard": json.dumps(said)})


def write_shard(path: Path, shard: Shard) -> None:
    """Write a shard with its checksum; an interrupted call leaves the file as it was."""
    images = shard.images.contiguous()
    metadata = {"sha256": _digest(images), "seconds": repr(shard.seconds)}
    write_tensors(path, {"images": images}, metadata)


def read_shard(path: Path) -> Shard | None:
    """The shard in this file; None if it is truncated or its checksum does not match."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, images = file.metadata(), file.get_tensor("images")
        whole = metadata["sha256"] == _digest(images)
        return Shard(images, float(metadata["seconds"])) if whole else None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.to(torch.float32).numpy().tobytes()).hexdigest()
