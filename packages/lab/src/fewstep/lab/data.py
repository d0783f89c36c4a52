"""Image data sets, in memory or read from files as they are needed, and the order in which training meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor

from fewstep.lab.config import ConfigError, DataConfig
from fewstep.schedules import Cond, sample_seeds, seeded_uniform

FLIP_STREAM = 5  # of a sample's seed; fewstep.distill draws from 1 to 3, masks from 4


class Stored(Protocol):
    """Images that are not in memory: read from files when they are asked for."""

    @property
    def ahead(self) -> int:
        """Batches that are worth announcing before they are asked for."""

    @property
    def unreadable(self) -> Sized:
        """Images met so far that could not be read."""

    def __len__(self) -> int: ...

    def expect(self, indices: Tensor) -> None:
        """Begin to read the images at `indices` (B,), which `read` will ask for."""

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) uint8 and the indices (B,) that they are of: others where one cannot be read."""


def pixels(images: Tensor | Stored, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) float32 in [-1, 1] at `indices` (B,), and the indices that they are of; both on `device`."""
    if isinstance(images, Tensor):
        indices = indices.to(device)
        found = images.index_select(0, indices)
    else:
        read, actual = images.read(indices.cpu())
        found, indices = read.to(device), actual.to(device)
    return (found.float().div_(127.5).sub_(1) if found.dtype == torch.uint8 else found), indices


@dataclass(frozen=True)
class Split:
    """images: (N, C, H, W) float32 in [-1, 1], or uint8 in 0, ..., 255, in memory or not. labels: (N,) int64.

    captions: N texts, of captioned images. flips: half of the visits see the image mirrored left to right.
    """

    images: Tensor | Stored
    labels: Tensor
    captions: tuple[str, ...] | None = None
    flips: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Cond]:
        """Images (B, C, H, W) and labels (B,), or another condition, at `indices` (B,), which may be on the CPU.

        seeds: (B,) int64, what mirrors an image, and what a condition is drawn by where it is another at every visit.
        """
        images, indices = self.visit(indices, seeds)
        return images, self.labels.index_select(0, indices)

    def visit(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 in [-1, 1] and the indices (B,) that they are of, see `Stored.read`."""
        images, indices = pixels(self.images, indices, self.labels.device)
        if self.flips:
            assert seeds is not None  # whoever trains has them
            mirrored = seeded_uniform(seeds, stream=FLIP_STREAM) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, indices

    def expect(self, indices: Tensor) -> None:
        """Begin to read the images at `indices` (B,) if they are not in memory."""
        if not isinstance(self.images, Tensor):
            self.images.expect(indices)

    @property
    def ahead(self) -> int:
        """Batches that are worth announcing by `expect`; 0 in memory."""
        return 0 if isinstance(self.images, Tensor) else self.images.ahead

    @property
    def unreadable(self) -> int:
        """Different images that could not be read so far, by this process."""
        return 0 if isinstance(self.images, Tensor) else len(self.images.unreadable)

    def first(self, count: int) -> Split:
        """The first `count` images, as they are, float32 in memory."""
        indices = torch.arange(min(count, len(self)))
        images, indices = pixels(self.images, indices, self.labels.device)
        return Split(images, self.labels[indices])

    def batches(self, size: int, first: int = 0) -> Iterator[Tensor]:
        """All images as they are (none mirrored), `size` at a time: (B, C, H, W) float32 in [-1, 1].

        first: the number of the batch to begin with.
        """
        parts = torch.arange(len(self)).split(size)[first:]
        for i, part in enumerate(parts):
            for later in parts[i : i + self.ahead]:
                self.expect(later)
            yield pixels(self.images, part, self.labels.device)[0]

    def to(self, device: torch.device) -> Self:
        """The same on another device, images too if they are in memory."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return replace(self, images=images, labels=self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """`heldout` is met by no training stage, the judge's included; nor is `composition`, of unseen combinations."""

    train: Split
    heldout: Split
    composition: Split | None = None


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # here: half a second that `fewstep --help` need not wait for

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).div_(8).sub_(1).unsqueeze(1)  # 0..16 -> [-1, 1]
    return images, torch.tensor(bunch.target, dtype=torch.int64)


def _digits16() -> tuple[Tensor, Tensor]:
    images, labels = _digits()
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)
    return larger.clamp(-1, 1), labels


@dataclass(frozen=True)
class Known:
    """A data set: what a config must agree with before anything is loaded, and how to load it.

    load: returns images (count, channels, image_size, image_size) float32 in [-1, 1] and labels (count,) int64.
    """

    image_size: int
    channels: int
    num_classes: int
    count: int
    load: Callable[[], tuple[Tensor, Tensor]]


KNOWN = {
    "digits": Known(image_size=8, channels=1, num_classes=10, count=1797, load=_digits),
    "digits16": Known(image_size=16, channels=1, num_classes=10, count=1797, load=_digits16),
}

CAPTIONED = ("captioned_shapes", "image_folder_with_captions", "webdataset_with_captions")
# By `fewstep.lab.datasets.files`; what else is captioned by `fewstep.lab.captioned`.
FILES = (
    "mnist", "cifar10", "cifar10_unconditional", "cifar10_jpeg", "image_folder", "webdataset",
    "webdataset_with_captions",
)  # fmt: skip


def load_data(config: DataConfig) -> Data:
    """The data set of that name, split the same way whatever the run's seed: every class in proportion.

    Raises:
        ConfigError: unknown name, or a size, channel or class count that is not the data set's.
    """
    check_data(config)
    if config.name in FILES:
        from fewstep.lab.datasets.files import load_files  # it makes splits, so it imports this module

        return load_files(config)
    if config.name in CAPTIONED:
        from fewstep.lab.captioned import load_captioned  # likewise

        return load_captioned(config)
    images, labels = KNOWN[config.name].load()
    train, held = stratified(labels, config.heldout)
    return Data(Split(images[train], labels[train]), Split(images[held], labels[held]))


def stratified(labels: Tensor, heldout: int) -> tuple[Tensor, Tensor]:
    """Indices, ascending, of the images to train on and of `heldout` others, every class in proportion."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(range(len(labels)), test_size=heldout, stratify=labels.numpy(), random_state=0)
    train, held = (torch.tensor(sorted(part)) for part in parts)
    return train, held


def check_data(config: DataConfig) -> None:
    """Refuse, before any compute, a data config that contradicts the data set."""
    if config.name in FILES:
        from fewstep.lab.datasets.files import check_files

        return check_files(config)
    if config.name in CAPTIONED:
        from fewstep.lab.captioned import check_captioned

        return check_captioned(config)
    if config.name not in KNOWN:
        names = dict.fromkeys([*KNOWN, *CAPTIONED, *FILES])
        raise ConfigError(f"data.name={config.name}: unknown data set; known: {', '.join(names)}")
    known = KNOWN[config.name]
    for key in ("image_size", "channels", "num_classes"):
        if getattr(config, key) != getattr(known, key):
            raise ConfigError(f"data.{key}={getattr(config, key)}: {config.name} has {getattr(known, key)}")
    most = known.count - known.num_classes
    if not known.num_classes <= config.heldout <= most:
        raise ConfigError(f"data.heldout={config.heldout}: must lie between {known.num_classes} and {most}")


@dataclass(frozen=True)
class Order:
    """The endless stream of sample indices: a function of (seed, epoch) alone, whoever reads it and from where.

    count: images in the data set. batch_size: images per update over all processes.
    """

    count: int
    batch_size: int
    seed: int

    def positions(self, update: int, rank: int = 0, world: int = 1) -> Tensor:
        """Places (batch_size / world,) int64 in the stream that process `rank` works on at `update`."""
        share = self.batch_size // world
        start = update * self.batch_size + rank * share
        return torch.arange(start, start + share)

    def seeds(self, positions: Tensor) -> Tensor:
        """Seeds (B,) int64 of the samples at those places: functions of (seed, update, place)."""
        updates = positions // self.batch_size
        seeds = torch.empty_like(positions)
        for update in torch.unique(updates).tolist():
            seeds[updates == update] = sample_seeds(self.seed, update, positions[updates == update])
        return seeds

    def indices(self, positions: Tensor) -> Tensor:
        """Sample indices (B,) at those places of the stream; an epoch meets every image once."""
        epochs = positions // self.count
        orders = {epoch: _permutation(self.count, self.seed, epoch) for epoch in sorted(set(epochs.tolist()))}
        return torch.cat([order[positions[epochs == epoch] % self.count] for epoch, order in orders.items()])


@lru_cache(maxsize=2)  # a batch may meet the end of an epoch; one of a million images takes 8 MB
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))
