"""Teacher targets on disk, computed once and trained from any number of times.

Position p of a training's stream of samples determines image, seed, time, w and noise (see `data.Order`), so the
targets of the first epochs are a sequence of images, read in the order in which it was written. A training that is
longer starts over: each image has as many noises as epochs were stored. All but the targets follows from the key.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.distill import Method, TargetMethod
from fewstep.lab.checkpoint import write_text
from fewstep.lab.config import ConfigError
from fewstep.lab.data import Order, Split
from fewstep.lab.shards import Shard, ShardCache, read_shard

FORMAT = 2
INDEX = "index.json"
KNOWN_BY = 16  # images


def key_of(method: Method, order: Order, split: Split) -> dict[str, Any]:
    """Everything that the targets of a training depend on; of the data, `KNOWN_BY` images stand for all.

    Raises:
        ConfigError: the method has no targets of a fixed teacher (moment matching's depend on the student).
    """
    teacher = getattr(method, "teacher", None)
    if not isinstance(teacher, nn.Module) or not hasattr(method, "targets"):
        raise ConfigError(f"targets: {type(method).__name__} has none that could be stored; they depend on the student")
    return {
        "format": FORMAT,
        "method": type(method).__name__,
        "kind": getattr(method, "kind", None),
        "teacher": _digest(teacher.state_dict()),
        "steps": getattr(method, "steps", None),
        "w_range": list(w_range) if (w_range := getattr(method, "w_range", None)) is not None else None,
        "seed": order.seed,
        "batch_size": order.batch_size,
        "images": order.count,
        "data": _digest({"images": (first := split.first(KNOWN_BY)).images, "labels": first.labels}),
        "captions": list((split.captions or ())[:KNOWN_BY]),
        "flips": split.flips,
    }


@dataclass(frozen=True)
class TargetStore:
    """Targets of positions 0, ..., count - 1 under `root`, `chunk` of them in a file."""

    root: Path
    key: Mapping[str, Any]
    count: int
    chunk: int

    @property
    def folder(self) -> Path:
        """Where they lie: a folder of their own for every key."""
        return self._cache.folder(self.key)

    @property
    def _cache(self) -> ShardCache:
        return ShardCache(self.root)

    def write_index(self) -> None:
        """Say what is to be in the folder; which files are missing is seen by looking."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = {"key": dict(self.key), "count": self.count, "chunk": self.chunk}
        write_text(self.folder / INDEX, json.dumps(tree, indent=1) + "\n")

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each file."""
        for start in range(0, self.count, self.chunk):
            yield start, min(start + self.chunk, self.count)

    def missing(self, mine: slice = slice(None)) -> list[tuple[int, int]]:
        """The files, of `mine` of all in order, that are not there or were cut short.

        One that was altered later is noticed when it is read.
        """
        return [each for each in list(self.ranges())[mine] if not _is_whole(self._cache.path(self.key, *each))]

    def put(self, start: int, stop: int, targets: Tensor, seconds: float) -> None:
        """Keep the targets (stop - start, C, H, W) of these positions, made in `seconds`."""
        self._cache.put(self.key, start, stop, Shard(targets, seconds))

    def read(self, positions: Tensor) -> Tensor:
        """Targets (B, C, H, W) of positions (B,), each below `count`.

        Raises:
            ConfigError: a file is missing or damaged; `fewstep targets` makes it anew.
        """
        files = positions // self.chunk
        found = [self._file(int(file))[positions[files == file] % self.chunk] for file in torch.unique(files)]
        order = torch.cat([torch.nonzero(files == file)[:, 0] for file in torch.unique(files)])
        return torch.cat(found)[torch.argsort(order)]

    def _file(self, number: int) -> Tensor:
        start = number * self.chunk
        return _read(self._cache.path(self.key, start, min(start + self.chunk, self.count)))


@lru_cache(maxsize=4)
def _read(path: Path) -> Tensor:
    """One file, its checksum tested; the last few are kept, since neighbours in the stream are trained on together."""
    shard = read_shard(path)
    if shard is None:
        path.unlink(missing_ok=True)
        raise ConfigError(f"{path}: missing or damaged; run `fewstep targets` again, which makes what is missing")
    return shard.images


def open_store(root: Path, method: Method, order: Order, split: Split) -> TargetStore | None:
    """The store of a training's targets under `root`; None if there is none.

    Raises:
        ConfigError: there is one, but files of it are missing.
    """
    key = key_of(method, order, split)
    path = TargetStore(root, key, 0, 1).folder / INDEX
    if not path.is_file():
        return None
    index = json.loads(path.read_text())
    store = TargetStore(root, key, index["count"], index["chunk"])
    missing = store.missing()
    if missing:
        many = math.ceil(store.count / store.chunk)
        raise ConfigError(f"targets={root}: {len(missing)} of {many} files are missing; run `fewstep targets` again")
    return store


def make(
    method: TargetMethod, split: Split, order: Order, store: TargetStore, mine: slice, stopping: Callable[[], bool]
) -> Iterator[tuple[int, float]]:
    """Make the files of `mine` (of all, in order) that are missing; yields targets and seconds of each."""
    for start, stop in store.missing(mine):
        if stopping():
            return
        began = time.perf_counter()
        targets = compute(method, split, order, torch.arange(start, stop))
        seconds = time.perf_counter() - began
        store.put(start, stop, targets, seconds)
        yield stop - start, seconds


def compute(method: TargetMethod, split: Split, order: Order, positions: Tensor) -> Tensor:
    """The targets (B, C, H, W) float32, on the CPU, that a training asks for at these positions (B,)."""
    seeds = order.seeds(positions).to(split.labels.device)
    x, cond = split.take(order.indices(positions).to(split.labels.device), seeds)
    return method.targets(method.draw(x, cond, seeds, 0)).float().cpu()


def _is_whole(path: Path) -> bool:
    """Whether its header stands and the file is as long as that says."""
    try:
        with safe_open(path, framework="pt") as file:
            return "images" in file.keys()  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError):
        return False


def _digest(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
