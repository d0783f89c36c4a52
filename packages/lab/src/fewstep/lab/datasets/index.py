"""Which samples a folder of images or of WebDataset shards holds, and where.

Shards are tar files in the format of the `webdataset` library: files that follow each other and share a name up to its
first dot are a sample. They are read here and not by that library, which streams them: its order is that of shards,
workers and a buffer, and it cannot go on in the middle of an epoch (github.com/webdataset/webdataset/issues/271). With
an index of samples the order is any function of (seed, epoch), at any number of processes.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fewstep.lab.config import ConfigError
from fewstep.lab.datasets.reader import WHOLE, Numbers, Places
from fewstep.lab.datasets.resizing import SUFFIXES

FORMAT = "1"
KEPT = "fewstep-index.safetensors"  # beside the shards, where that can be written
CLASS, TEXT = "cls", "txt"  # suffixes of a sample's class number and of its caption
NAMED = 5

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)$")


class NoCaptionsError(ConfigError):
    """Captions were asked of shards that have none."""


@dataclass(frozen=True)
class Index:
    """Samples of a data set: where they lie, labels (N,) int64, class names if classes have any, captions if asked."""

    places: Places
    labels: Numbers
    names: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None

    @property
    def counts(self) -> list[int]:
        """Samples of each class."""
        return np.bincount(self.labels).tolist()


@lru_cache(maxsize=2)
def folder_index(root: Path) -> Index:
    """One folder per class, in alphabetical order, images anywhere below it; without folders all are of one class.

    Raises:
        ConfigError: no images, or a folder without.
    """
    names = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")) or (".",)
    found = [_images(root, name) for name in names]
    empty = [name for name, paths in zip(names, found, strict=True) if not paths]
    if empty:
        raise ConfigError(f"{root / empty[0]}: has no images ({', '.join(SUFFIXES)})")
    files = np.array([os.fsencode(path) for paths in found for path in paths])
    count = len(files)
    places = Places(str(root), files, np.arange(count), np.zeros(count, np.int64), np.full(count, WHOLE))
    return Index(places, np.repeat(np.arange(len(names)), [len(paths) for paths in found]), names)


def _images(root: Path, name: str) -> list[str]:
    walk = os.walk(root / name, followlinks=True)
    found = [os.path.join(place, file) for place, _, files in walk for file in files]
    return sorted(os.path.relpath(path, root) for path in found if path.lower().endswith(SUFFIXES))


@lru_cache(maxsize=2)
def shard_index(root: Path, captions: bool) -> Index:
    """All `*.tar` in a folder, in alphabetical order; classes by `.cls` (0 where there are none), captions by `.txt`.

    It is kept beside the shards, and made anew when one of them changes.

    Raises:
        ConfigError: no shards, one that is damaged, or samples of which some have a class or caption and some have not.
    """
    shards = sorted(root.glob("*.tar"))
    if not shards:
        raise ConfigError(f"data.files.path={root}: must hold shards, *.tar")
    state = json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards])
    table = _kept(root / KEPT, state)
    if table is None:
        table = _scan(shards)
        with suppress(OSError):  # data are often read-only; then it is made every time
            _keep(root / KEPT, state, table)
    files = np.array([os.fsencode(path.name) for path in shards])
    places = Places(str(root), files, table["file"], table["start"], table["size"])
    return Index(places, table["labels"], None, _texts(root, table) if captions else None)


Table = dict[str, NDArray[Any]]


def _scan(shards: list[Path]) -> Table:
    rows: list[tuple[int, int, int, int | None]] = []  # file, start, size, class
    texts: list[bytes | None] = []
    lonely: list[str] = []
    for number, path in enumerate(shards):
        for key, parts in _samples(path):
            images = [suffix for suffix in parts if f".{suffix}" in SUFFIXES]
            if not images:
                lonely.append(f"{path.name}:{key}")
                continue
            if len(images) > 1:
                raise ConfigError(f"{path}:{key}: has {len(images)} images ({', '.join(images)}), must have one")
            rows.append((number, *parts[images[0]], _class(path, key, parts)))
            texts.append(_read(path, *parts[TEXT]) if TEXT in parts else None)
    if lonely:
        more = f" and {len(lonely) - NAMED} more" if len(lonely) > NAMED else ""
        warnings.warn(
            f"{len(lonely)} samples without an image are left out: {', '.join(lonely[:NAMED])}{more}", stacklevel=4
        )
    if not rows:
        raise ConfigError(f"{shards[0].parent}: no sample of its {len(shards)} shards has an image")
    _all_or_none([row[3] for row in rows], rows, shards, CLASS)
    _all_or_none(texts, rows, shards, TEXT)
    file, start, size, labels = zip(*rows, strict=True)
    known = [label or 0 for label in labels]
    columns = {"file": file, "start": start, "size": size, "labels": known}
    table: Table = {name: np.array(column, np.int64) for name, column in columns.items()}
    if texts[0] is not None:
        table["text"] = np.frombuffer(b"".join(text or b"" for text in texts), np.uint8)
        table["ends"] = np.cumsum([len(text or b"") for text in texts])
    return table


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, suffix -> (start, size)) of each sample of a shard."""
    key, parts = "", dict[str, tuple[int, int]]()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # typeshed lacks it; without this it keeps them all
                name = _NAME.match(member.name)
                if name is None or not member.isreg():
                    continue
                if name[1] != key and parts:
                    yield key, parts
                    parts = {}
                key = name[1]
                parts[name[2].lower()] = (member.offset_data, member.size)
        _check_end(path, archive.offset)
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{path}: damaged or cut short ({error}); shards must be whole tar files") from error
    if parts:
        yield key, parts


def _check_end(path: Path, offset: int) -> None:
    """Raise tarfile.ReadError unless a block of zeros is there: tarfile takes a cut or damaged header for the end."""
    if _read(path, offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no file and no end at byte {offset}")


def _read(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _class(path: Path, key: str, parts: dict[str, tuple[int, int]]) -> int | None:
    if CLASS not in parts:
        return None
    text = _read(path, *parts[CLASS]).strip()
    if not text.isdigit():
        raise ConfigError(f"{path}:{key}.{CLASS}: {text[:20]!r} must be a class number, 0 or more")
    return int(text)


def _all_or_none(found: list[int | None] | list[bytes | None], rows: list[tuple[int, int, int, int | None]],
                 shards: list[Path], suffix: str) -> None:  # fmt: skip
    lacking = [row for row, one in zip(rows, found, strict=True) if one is None]
    if lacking and len(lacking) < len(rows):
        text = f"{len(lacking)} of {len(rows)} samples have no .{suffix}, the first in {shards[lacking[0][0]]}"
        raise ConfigError(f"{text}; all must have one, or none")


def _texts(root: Path, table: Table) -> tuple[str, ...]:
    if "text" not in table:
        raise NoCaptionsError(f"data.files.path={root}: its samples have no captions, .{TEXT}; use data=webdataset")
    ends, whole = table["ends"].tolist(), table["text"].tobytes()
    return tuple(whole[i:j].decode("utf-8", "replace").strip() for i, j in zip([0, *ends], ends, strict=False))


def _kept(path: Path, state: str) -> Table | None:
    """The index in this file; None if it is damaged, or of other shards."""
    try:
        with safe_open(path, framework="np") as file:
            if file.metadata() != {"format": FORMAT, "shards": state}:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError):
        return None


def _keep(path: Path, state: str, table: Table) -> None:
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")  # nodes may write at once
    try:
        partial.write_bytes(save(table, {"format": FORMAT, "shards": state}))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
