"""MNIST from its four idx files, gzipped or not."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.lab.config import ConfigError

# SHA-256 of the unpacked files: gzip's own bytes differ from mirror to mirror.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
BYTES = 8  # idx's code of unsigned bytes


def parts(folder: Path) -> list[Path]:
    """The four files in a folder, or below it where torchvision puts them; those that are missing are left out."""
    places = [place / f"{name}{suffix}" for name in SHA256 for place in (folder, folder / "MNIST" / "raw")
              for suffix in ("", ".gz")]  # fmt: skip
    first = {place.name.removesuffix(".gz"): place for place in reversed(places) if place.is_file()}
    return [first[name] for name in SHA256 if name in first]


def load(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64 of training and of test.

    Raises:
        ConfigError: names a file that is missing, damaged or another than MNIST's.
    """
    found = parts(folder)
    if len(found) < len(SHA256):
        here = [path.name.removesuffix(".gz") for path in found]
        missing = ", ".join(name for name in SHA256 if name not in here)
        raise ConfigError(
            f"data.files.path={folder}: has no {missing}; `fewstep data fetch mnist {folder}` brings them"
        )
    images, labels, test_images, test_labels = (read_idx(path) for path in found)
    return (images[:, None], labels.long()), (test_images[:, None], test_labels.long())


def read_idx(path: Path, name: str = "") -> Tensor:
    """An array of unsigned bytes as idx has it: 0, 0, type, rank, the sizes as big-endian int32, the bytes.

    name: of the file, where it is called otherwise.

    Raises:
        ConfigError: names a file that is damaged or another than MNIST's.
    """
    try:
        content = _unpacked(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be unpacked ({error})") from error
    digest, right = hashlib.sha256(content).hexdigest(), SHA256[name or path.name.removesuffix(".gz")]
    if digest != right:
        raise ConfigError(
            f"{path}: SHA-256 of its content is {digest[:12]}, must be {right[:12]}: damaged, or not MNIST"
        )
    rank = content[3]
    sizes = np.frombuffer(content, ">i4", rank, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if content[2] != BYTES or math.prod(sizes) != len(values):
        raise ConfigError(f"{path}: not an idx file of {sizes} bytes")
    return torch.tensor(values.reshape(sizes))


def _unpacked(content: bytes) -> bytes:
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
