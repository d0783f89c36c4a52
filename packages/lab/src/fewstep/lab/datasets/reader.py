"""Reads single samples by their numbers: here, or in worker processes ahead of time."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.lab.datasets.resizing import Pixels, square
from fewstep.lab.orphans import deaf_children, follow

OPEN = 32  # shards that a process keeps open
WHOLE = -1  # size of a sample that is a file of its own

Numbers = NDArray[np.int64]


class Found(NamedTuple):
    """Images (B, C, size, size) uint8; `failed`: place in the batch -> why it could not be read (its pixels are 0)."""

    images: Pixels
    failed: dict[int, str]


@dataclass(frozen=True)
class Places:
    """Where samples lie: arrays, since a list of objects would be copied into every worker, page by page.

    files: (F,) bytes, paths below `root`. file: (N,) which of them; start, size: (N,) the image's bytes in it.
    """

    root: str
    files: NDArray[np.bytes_]
    file: Numbers
    start: Numbers
    size: Numbers

    def __len__(self) -> int:
        return len(self.file)

    def part(self, numbers: Numbers) -> Places:
        """The samples of these numbers (B,) alone."""
        files, file = np.unique(self.file[numbers], return_inverse=True)
        return Places(self.root, self.files[files], file, self.start[numbers], self.size[numbers])


@dataclass
class Reader:
    """Decodes the images of `places` to squares; resize: a key of `resizing.METHODS`."""

    places: Places
    image_size: int
    channels: int
    resize: str
    _open: dict[int, int] = field(default_factory=dict, repr=False)  # file -> its descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, numbers: Numbers) -> Found:
        """The samples of these numbers (B,)."""
        images = np.zeros((len(numbers), self.channels, self.image_size, self.image_size), np.uint8)
        failed = {}
        for i, number in enumerate(numbers.tolist()):
            try:
                with Image.open(io.BytesIO(self.encoded(number))) as picture:
                    images[i] = square(picture, self.image_size, self.channels, self.resize)
            except Exception as error:  # damaged images make Pillow raise whatever its decoders meet
                failed[i] = reason(error)
        return Found(images, failed)

    def encoded(self, number: int) -> bytes:
        """The bytes of an image as they are stored.

        Raises:
            OSError: not there, or cut short.
        """
        start, size = int(self.places.start[number]), int(self.places.size[number])
        if size == WHOLE:
            with open(self._path(number), "rb") as file:
                return file.read()
        found = os.pread(self._descriptor(number), size, start)
        if len(found) != size:
            raise OSError(f"{len(found)} of {size} bytes are there")
        return found

    def name(self, number: int) -> str:
        """What a person finds the sample by: its path, or that of its shard and its name in there."""
        path, start = self._path(number), int(self.places.start[number])
        if self.places.size[number] == WHOLE:
            return path
        try:
            header = os.pread(self._descriptor(number), tarfile.BLOCKSIZE, start - tarfile.BLOCKSIZE)
            return f"{path}:{tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name}"
        except (OSError, tarfile.HeaderError):
            return f"{path}: at byte {start}"

    def _path(self, number: int) -> str:
        return os.path.join(self.places.root, os.fsdecode(self.places.files[self.places.file[number]]))

    def _descriptor(self, number: int) -> int:
        file = int(self.places.file[number])
        if file not in self._open:
            if len(self._open) >= OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[file] = os.open(self._path(number), os.O_RDONLY)
        return self._open[file]


def reason(error: Exception) -> str:
    """Why an image cannot be read, without Pillow's address of the bytes in memory."""
    return f"{type(error).__name__}: {error}".partition(" <_io.")[0]


class Workers:
    """Processes that read for a `Reader`; started when first asked."""

    def __init__(self, reader: Reader, count: int) -> None:
        self.count, self._reader, self._pool = count, reader, None

    def submit(self, numbers: Numbers) -> Future[Found]:
        """Read the samples of these numbers (B,) in one of them."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.count, _Context(), _begin, (os.getpid(), self._reader))
        with deaf_children():  # it is when asked that the pool starts them
            return self._pool.submit(_read, numbers)

    _pool: ProcessPoolExecutor | None


class _Worker(SpawnProcess):
    """Deaf to SIGTERM, by which a pool ends those that are left when one of them was killed."""

    def terminate(self) -> None:
        """End it."""
        self.kill()


class _Context(SpawnContext):
    """Not forked: the parent has threads, and a GPU."""

    Process = _Worker


_mine: Sequence[Reader] = ()  # a worker's


def _begin(parent: int, reader: Reader) -> None:
    global _mine
    follow(parent)
    _mine = (reader,)


def _read(numbers: Numbers) -> Found:
    (reader,) = _mine
    return reader.read(numbers)
