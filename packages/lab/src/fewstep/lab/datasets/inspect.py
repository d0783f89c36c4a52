"""What a folder of data holds: `fewstep data check`."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.lab.config import ConfigError, FolderConfig
from fewstep.lab.datasets import cifar10, mnist
from fewstep.lab.datasets.files import PUBLISHED
from fewstep.lab.datasets.index import Index, NoCaptionsError, folder_index, shard_index
from fewstep.lab.datasets.reader import WHOLE, Places, Reader, reason
from fewstep.lab.image_folder import kinds, matched
from fewstep.lab.workers import spread

CHUNK = 1000  # images that a worker looks at before it reports
CAPTIONED = "image_folder_with_captions"
SHOWN = 5  # sizes, and classes, that are listed


@dataclass
class Findings:
    """Of which kind the data are (`data.name`), how many images of each class, and what looking at each image found.

    sizes: (width, height) -> images; unreadable: names and reasons; alone: files without a caption, and captions' files
    that are not there, with which is which.
    """

    kind: str
    counts: list[int]
    names: tuple[str, ...] | None = None
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """For a person to read; every unreadable file by name."""
        yield f"kind        {self.kind}"
        yield f"images      {sum(self.counts)}"
        sizes = [f"{width}x{height}: {count}" for (width, height), count in self.sizes.most_common(SHOWN)]
        more = f", {len(self.sizes) - SHOWN} other sizes" if len(self.sizes) > SHOWN else ""
        yield f"sizes       {', '.join(sizes)}{more}"
        yield f"classes     {len(self.counts)}, of {min(self.counts)} to {max(self.counts)} images"
        for number, count in list(enumerate(self.counts))[:SHOWN]:
            yield f"            {number}  {self.names[number] if self.names else ''}  {count}"
        if len(self.counts) > SHOWN:
            yield f"            and {len(self.counts) - SHOWN} more"
        yield f"unreadable  {len(self.unreadable)}"
        yield from (f"            {name}" for name in self.unreadable)
        if self.alone:
            yield f"left out    {len(self.alone)}"
            yield from (f"            {name}" for name in self.alone)


def inspect(root: Path, workers: int, progress: Callable[[int, int], None] = lambda done, count: None) -> Findings:
    """Look at every image of whatever data set the folder holds.

    progress: called with how many images of how many were looked at.

    Raises:
        ConfigError: no such folder, no data in it, or one that is damaged as a whole (a checksum, a shard).
    """
    if not root.is_dir():
        raise ConfigError(f"PATH={root}: must be a folder")
    published = _published(root)
    if published is not None:
        return _in_memory(published, root)
    kind, index = _index(root)
    found = Findings(kind, index.counts, index.names, alone=_alone(root) if kind == CAPTIONED else [])
    reader = Reader(index.places, 1, 3, "area")
    parts = np.array_split(np.arange(len(index.places)), max(1, len(index.places) // CHUNK))
    done = 0
    notes: dict[int, list[str]] = {}
    for i, (sizes, unreadable) in spread(_look, [(index.places.part(part),) for part in parts], workers, lambda: False):
        found.sizes.update(sizes)
        notes[i] = [f"{reader.name(int(parts[i][place]))} ({reason})" for place, reason in unreadable.items()]
        done += len(parts[i])
        progress(done, len(index.places))
    found.unreadable = [name for i in sorted(notes) for name in notes[i]]
    return found


def _look(places: Places) -> tuple[Counter[tuple[int, int]], dict[int, str]]:
    """Sizes of these images, each decoded to its end, and why others (by their numbers here) cannot be."""
    reader, sizes, unreadable = Reader(places, 1, 3, "area"), Counter[tuple[int, int]](), dict[int, str]()
    for number in range(len(places)):
        try:
            with Image.open(io.BytesIO(reader.encoded(number))) as picture:
                picture.convert("RGB")
                sizes[picture.size] += 1
        except Exception as error:  # whatever Pillow's decoders meet
            unreadable[number] = reason(error)
    return sizes, unreadable


def _published(root: Path) -> str | None:
    if mnist.parts(root):
        return "mnist"
    if cifar10.is_there(root):
        return "cifar10"
    return "cifar10_jpeg" if list(root.glob("cifar10_jpegq75_*.npz")) else None


def _in_memory(kind: str, root: Path) -> Findings:
    """Of a set that is read whole, its checksums tested."""
    both = PUBLISHED[kind].load(root)
    labels = np.concatenate([labels.numpy() for _, labels in both])
    height, width = both[0][0].shape[2:]
    return Findings(kind, np.bincount(labels).tolist(), sizes=Counter({(width, height): len(labels)}))


def _index(root: Path) -> tuple[str, Index]:
    """`data.name` and its samples."""
    if (root / FolderConfig.captions).is_file():
        return CAPTIONED, _captioned(FolderConfig(str(root)))
    if not list(root.glob("*.tar")):
        return "image_folder", folder_index(root)
    try:
        return "webdataset_with_captions", shard_index(root, True)
    except NoCaptionsError:
        return "webdataset", shard_index(root, False)


def _captioned(folder: FolderConfig) -> Index:
    """Of images that have a caption."""
    paired, _, _ = matched(folder)
    names, count = kinds(paired), len(paired)
    files = np.array([os.fsencode(one.file) for one in paired])
    places = Places(folder.path, files, np.arange(count), np.zeros(count, np.int64), np.full(count, WHOLE))
    return Index(places, np.array([names.index(one.kind) for one in paired], np.int64), tuple(names))


def _alone(root: Path) -> list[str]:
    """What has no partner, which training leaves out too."""
    _, missing, silent = matched(FolderConfig(str(root)))
    return [f"{name} (a caption without its image)" for name in missing] + [f"{name} (no caption)" for name in silent]
