"""Image data sets held whole in memory, and the order in which training meets them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from fewstep.lab.config import ConfigError, DataConfig
from fewstep.schedules import Cond, sample_seeds


@dataclass(frozen=True)
class Split:
    """images: (N, C, H, W) float32 in [-1, 1]. labels: (N,) int64. captions: N texts, of captioned images."""

    images: Tensor
    labels: Tensor
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Cond]:
        """Images (B, C, H, W) and labels (B,), or another condition, at `indices` (B,).

        seeds: (B,) int64, what a condition is drawn by where it is another at every visit.
        """
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def to(self, device: torch.device) -> Self:
        """The same images on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


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

CAPTIONED = ("captioned_shapes", "image_folder_with_captions")  # by `fewstep.lab.captioned`


def load_data(config: DataConfig) -> Data:
    """The data set of that name, split the same way whatever the run's seed: every class in proportion.

    Raises:
        ConfigError: unknown name, or a size, channel or class count that is not the data set's.
    """
    from sklearn.model_selection import train_test_split

    check_data(config)
    if config.name in CAPTIONED:
        from fewstep.lab.captioned import load_captioned  # it makes splits, so it imports this module

        return load_captioned(config)
    images, labels = KNOWN[config.name].load()
    parts = train_test_split(range(len(labels)), test_size=config.heldout, stratify=labels.numpy(), random_state=0)
    train, held = (torch.tensor(sorted(part)) for part in parts)
    return Data(Split(images[train], labels[train]), Split(images[held], labels[held]))


def check_data(config: DataConfig) -> None:
    """Refuse, before any compute, a data config that contradicts the data set."""
    if config.name in CAPTIONED:
        from fewstep.lab.captioned import check_captioned

        return check_captioned(config)
    if config.name not in KNOWN:
        raise ConfigError(f"data.name={config.name}: unknown data set; known: {', '.join([*KNOWN, *CAPTIONED])}")
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


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))
