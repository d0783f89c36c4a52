"""Small data sets in files for tests: the red of an image tells its number, its class is that number modulo 2."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fewstep.lab.config import DataConfig, FilesConfig

SIDE = 8


def picture(number: int, kind: str = "PNG", side: int = SIDE) -> bytes:
    """An image as it is stored; its green and blue are noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[..., 0] = number
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def numbers(images: Tensor) -> list[int]:
    """Which images (B, 3, H, W) in [-1, 1] these are."""
    return ((images[:, 0].mean((1, 2)) + 1) * 127.5).round().long().tolist()


def parts(number: int) -> dict[str, bytes]:
    """The files of a sample, by their suffixes."""
    return {"cls": str(number % 2).encode(), "png": picture(number), "txt": f"café number {number}\n".encode()}


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """A tar file of samples, by their keys."""
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_shards(root: Path, count: int = 30, each: int = 8) -> Path:
    """Shards of `each` samples 0, ..., count - 1."""
    for first in range(0, count, each):
        some = range(first, min(first + each, count))
        write_shard(root / f"shard-{first // each:03d}.tar", {f"{number:05d}": parts(number) for number in some})
    return root


def write_folder(root: Path, count: int = 30) -> Path:
    """A folder of classes "even" and "odd"."""
    for number in range(count):
        path = root / ("even", "odd")[number % 2] / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


def config(name: str, root: Path, workers: int = 0, most: int = 3, **changes: object) -> DataConfig:
    """`data:` of such a set."""
    files = FilesConfig(str(root), workers=workers, max_unreadable=most)
    return DataConfig(**{  # type: ignore[arg-type]  # what each key takes is the caller's to know
        "name": name, "image_size": SIDE, "channels": 3, "num_classes": 2, "heldout": 6, "files": files, **changes
    })  # fmt: skip
