"""CIFAR-10 in the forms in which it is handed out, and as small JPEGs in an archive of numpy's."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fewstep.lab.config import ConfigError

SIDE, CLASSES = 32, 10
PIXELS = 3 * SIDE * SIDE
TRAIN, TEST = [f"data_batch_{i}" for i in range(1, 6)], "test_batch"
COUNTS = (50_000, 10_000)

# MD5 as https://www.cs.toronto.edu/~kriz/cifar.html gives them, and of the python batches in the archive.
MD5 = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}

Pair = tuple[Tensor, Tensor]


class Form(NamedTuple):
    """One form of the lossless set: its folder and archive, what its files end in, and what reads one of them."""

    folder: str
    archive: str
    suffix: str
    read: Callable[[bytes, str], Pair]


def load(folder: Path) -> tuple[Pair, Pair]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of training and of test, from the first form that is there.

    Raises:
        ConfigError: none is there, or one is damaged or not CIFAR-10.
    """
    form, place = _find(folder)
    found = {name.removesuffix(form.suffix): form.read(content, f"{place}/{name}") for name, content in
             _contents(form, place)}  # fmt: skip
    missing = [name + form.suffix for name in (*TRAIN, TEST) if name not in found]
    if missing:
        raise ConfigError(f"{place}: has no {', '.join(missing)}")
    images, labels = (torch.cat(each) for each in zip(*(found[name] for name in TRAIN), strict=True))
    return _whole((images, labels), place, COUNTS[0]), _whole(found[TEST], place, COUNTS[1])


def is_there(folder: Path) -> bool:
    """Whether the folder holds any form of the lossless set."""
    return any(place.exists() for form in FORMS for place in _places(form, folder))


def load_jpeg(folder: Path) -> tuple[Pair, Pair]:
    """As `load`, of `cifar10_jpegq75_{train,test}.npz`: images that lossy compression has changed, another data set.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    train, test = (read_packed(folder / f"cifar10_jpegq75_{part}.npz") for part in ("train", "test"))
    return _whole(train, folder, COUNTS[0]), _whole(test, folder, COUNTS[1])


def read_packed(path: Path) -> Pair:
    """JPEGs with one header in common: `head`, the rest of image i in `scan[offs[i]:offs[i + 1]]`, its label in `y`.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            head, scan, offsets, labels = (archive[name] for name in ("head", "scan", "offs", "y"))
        pieces = np.split(scan, offsets[1:-1].astype(np.int64))
        images = np.stack([_decoded(head.tobytes() + piece.tobytes()) for piece in pieces])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: missing or damaged ({error})") from error
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64)


def _decoded(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def read_binary(content: bytes, name: str) -> Pair:
    """A batch of the binary version: of each image its label and the planes of red, green and blue, row by row."""
    if not content or len(content) % (1 + PIXELS):
        raise ConfigError(f"{name}: {len(content)} bytes are no whole number of images of {1 + PIXELS}")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + PIXELS)
    return rows[:, 1:].reshape(-1, 3, SIDE, SIDE), rows[:, 0].long()


def read_python(content: bytes, name: str) -> Pair:
    """A batch of the python version, a pickle, of which nothing but dicts, lists, strings and arrays is made.

    Raises:
        ConfigError: another checksum than CIFAR-10's, or what asks for anything else.
    """
    _check_md5(content, name)
    try:
        found = _Plain(io.BytesIO(content), encoding="latin1").load()
        images, labels = np.asarray(found["data"], np.uint8), torch.tensor(found["labels"], dtype=torch.int64)
        return torch.tensor(images).view(-1, 3, SIDE, SIDE), labels
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{name}: not a batch of CIFAR-10 ({error})") from error


class _Plain(pickle.Unpickler):
    """Makes arrays of numbers, and no other object: a pickle may name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("_core", "core"), name) in ARRAYS:
            return ARRAYS[module.replace("_core", "core"), name]
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def _array(kind: type, shape: tuple[int, ...], code: object) -> NDArray[Any]:
    """What pickles of arrays begin with: an empty one."""
    return np.ndarray(shape, np.uint8)


ARRAYS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}

FORMS = (
    Form("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", read_binary),
    Form("cifar-10-batches-py", "cifar-10-python.tar.gz", "", read_python),
)


def _places(form: Form, folder: Path) -> Iterator[Path]:
    yield folder / form.folder
    if (folder / (TEST + form.suffix)).is_file():
        yield folder
    yield folder / form.archive


def _find(folder: Path) -> tuple[Form, Path]:
    for form in FORMS:
        for place in _places(form, folder):
            if place.exists():
                return form, place
    names = ", ".join(name for form in FORMS for name in (form.folder, form.archive))
    raise ConfigError(
        f"data.files.path={folder}: has none of {names}; `fewstep data fetch cifar10 {folder}` brings one"
    )


def _contents(form: Form, place: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the batches in a folder or an archive."""
    wanted = [name + form.suffix for name in (*TRAIN, TEST)]
    if place.is_dir():
        yield from ((name, (place / name).read_bytes()) for name in wanted if (place / name).is_file())
        return
    content = place.read_bytes()
    _check_md5(content, str(place))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None and Path(member.name).name in wanted:
                yield Path(member.name).name, file.read()


def _check_md5(content: bytes, path: str) -> None:
    digest, right = hashlib.md5(content).hexdigest(), MD5[Path(path).name]
    if digest != right:
        raise ConfigError(f"{path}: MD5 is {digest}, must be {right}: damaged, or not CIFAR-10")


def _whole(pair: Pair, place: Path, count: int) -> Pair:
    """The pair, if there are as many images as there should be, equally many of each class."""
    counts = pair[1].bincount(minlength=CLASSES).tolist()
    if counts != [count // CLASSES] * CLASSES:
        raise ConfigError(f"{place}: images of its classes: {counts}, must be {count // CLASSES} of each of {CLASSES}")
    return pair
