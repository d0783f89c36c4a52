"""Images that stay in files: `Split.images` of data sets too large for memory."""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from torch import Tensor

from fewstep.lab.datasets.reader import Found, Numbers, Reader, Workers

NAMED = 5  # unreadable files that an error names
KILLED = "a process that reads images was killed; perhaps there was too little memory"


class ReadingError(RuntimeError):
    """Too many samples cannot be read, or a process that reads them was killed."""


class Stream:
    """The samples `numbers` (N,) of a reader, in that order; decoded ahead of time where there are `workers`.

    An unreadable sample is counted and named in a warning, and the next readable one of its class stands in its place:
    a function of the files alone, so any number of processes still trains on the same images.

    labels: (N,) int64. max_unreadable: how many different samples may be met that are unreadable, before it raises.
    """

    def __init__(
        self, reader: Reader, numbers: Numbers, labels: Numbers, workers: Workers | None, max_unreadable: int
    ) -> None:
        self._reader, self._numbers, self._labels, self._workers = reader, numbers, labels, workers
        self._max_unreadable = max_unreadable
        self._expected: dict[bytes, Future[Found]] = {}
        self.unreadable: dict[int, str] = {}  # index -> name and reason
        self.ahead = 2 * workers.count if workers else 0

    def __len__(self) -> int:
        return len(self._numbers)

    def expect(self, indices: Tensor) -> None:
        """Begin to read the images at `indices` (B,), on the CPU or not, for a `read` of the same to come."""
        wanted = indices.cpu().numpy()
        key = wanted.tobytes()
        if self._workers is None or key in self._expected:
            return
        while len(self._expected) > 2 * self.ahead:  # whoever announced them went away
            self._expected.pop(next(iter(self._expected))).cancel()
        try:
            self._expected[key] = self._workers.submit(self._numbers[wanted])
        except BrokenProcessPool as error:
            raise ReadingError(KILLED) from error

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) uint8 and the indices (B,) that they are of; see `Stored.read`.

        Raises:
            ReadingError: too many different samples cannot be read, or a worker was killed.
        """
        wanted = indices.cpu().numpy()
        images, failed = self._found(wanted)
        if failed:
            wanted = wanted.copy()
        for place, reason in failed.items():
            wanted[place] = self._other(int(wanted[place]), reason)
            images[place] = self._reader.read(self._numbers[wanted[place : place + 1]]).images[0]
        return torch.from_numpy(images), torch.from_numpy(wanted)

    def _found(self, wanted: Numbers) -> Found:
        if self._workers is None:
            return self._reader.read(self._numbers[wanted])
        self.expect(torch.from_numpy(wanted))
        try:
            return self._expected.pop(wanted.tobytes()).result()
        except BrokenProcessPool as error:
            raise ReadingError(KILLED) from error

    def _other(self, index: int, reason: str) -> int:
        """The next readable sample of the same class; notes those that are not."""
        alike = np.flatnonzero(self._labels == self._labels[index])
        after = np.searchsorted(alike, index)
        for other in np.roll(alike, -after - 1)[:-1].tolist():
            self._note(index, reason)
            failed = self._reader.read(self._numbers[[other]]).failed
            if not failed:
                return int(other)
            index, reason = other, failed[0]
        raise ReadingError(f"{self._reader.name(int(self._numbers[index]))}: no image of its class can be read")

    def _note(self, index: int, reason: str) -> None:
        if index in self.unreadable:
            return
        self.unreadable[index] = f"{self._reader.name(int(self._numbers[index]))} ({reason})"
        count, most = len(self.unreadable), self._max_unreadable
        if count > most:
            names = "; ".join(list(self.unreadable.values())[:NAMED])
            more = f" and {count - NAMED} more" if count > NAMED else ""
            text = f"{count} unreadable images, data.files.max_unreadable={most}: {names}{more}"
            raise ReadingError(f"{text}; `fewstep data check` names all")
        text = f"{self.unreadable[index]}: unreadable, {count} so far; the next one of its class stands in its place"
        warnings.warn(text, stacklevel=2)
