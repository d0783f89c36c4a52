"""Any folder of images with a file of captions: `image_folder_with_captions`."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.lab.checks import require
from fewstep.lab.config import ConfigError, DataConfig, FolderConfig
from fewstep.lab.data import Data, Split
from fewstep.lab.datasets.resizing import SUFFIXES, on_white

NAMED = 5  # files that a message names before it only counts


@dataclass(frozen=True)
class Caption:
    """A line of the captions: an image (path below the folder), its text, group ("": its own) and class ("": none)."""

    file: str
    text: str
    group: str = ""
    kind: str = ""


def check_folder(config: DataConfig) -> None:
    """Refuse, before any compute, a folder that is not there or not what the config says.

    Raises:
        ConfigError: names key, value and what would be right, or the line of the captions that is wrong.
    """
    folder = _folder(config)
    require(Path(folder.path).is_dir(), "data.folder.path", folder.path, "a folder of images")
    require(config.channels == 3, "data.channels", config.channels, f"3 for {config.name}")
    require(config.image_size >= 1, "data.image_size", config.image_size, "1 or more")
    paired, _, _ = matched(folder)
    require(bool(paired), "data.folder.captions", folder.captions, f"captions of images in {folder.path}")
    known = len(kinds(paired))
    require(config.num_classes == known, "data.num_classes", config.num_classes, f"{known}, those in the captions")
    groups = {_group(one) for one in paired}
    require(len(groups) > 1, "data.folder.captions", folder.captions, f"of two groups or more, not {groups} alone")
    most = len(paired) - 1
    require(1 <= config.heldout <= most, "data.heldout", config.heldout, f"between 1 and {most}")


def load_folder(config: DataConfig) -> Data:
    """Both splits; one warning counts and names captions without images and images without captions.

    Images of one group are on one side. As many groups are held out, chosen by a hash of their names, as hold at most
    `heldout` images, at least one.
    """
    folder = _folder(config)
    return _load(folder.path, folder.captions, config.image_size, config.heldout)


@lru_cache(maxsize=1)
def _load(path: str, captions: str, size: int, heldout: int) -> Data:
    paired, lonely, silent = matched(FolderConfig(path, captions))
    text = "; ".join(_counted(*each) for each in ((lonely, "captions without an image"),
                                                 (silent, "images without a caption")) if each[0])  # fmt: skip
    if text:
        warnings.warn(f"{path}: {text}; they are left out, {len(paired)} pairs remain", stacklevel=3)
    names = kinds(paired)
    held = _held_out(paired, heldout)
    parts = ([one for one in paired if (_group(one) in held) == side] for side in (False, True))
    return Data(*(_split(Path(path), part, size, names) for part in parts))


def matched(folder: FolderConfig) -> tuple[list[Caption], list[str], list[str]]:
    """Captions with an image, files of captions without one, and images without a caption."""
    root = Path(folder.path)
    there = {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in SUFFIXES}
    said = _read(root / folder.captions)
    paired = [one for one in said if one.file in there]
    lonely = sorted({one.file for one in said} - there)
    return paired, lonely, sorted(there - {one.file for one in said})


def kinds(captions: Sequence[Caption]) -> list[str]:
    """The names of the classes, in the order of their numbers; one without a name if none is named."""
    return sorted({one.kind for one in captions})


def _folder(config: DataConfig) -> FolderConfig:
    if config.folder is None:
        raise ConfigError(f"data.folder=null: {config.name} needs it, with the path of a folder")
    return config.folder


def _read(path: Path) -> list[Caption]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.folder.captions={path}: must be a file of JSON lines ({error})") from error
    return [_caption(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]


def _caption(line: str, place: str) -> Caption:
    try:
        found: Any = json.loads(line)
        keys = {"file": found["file"], "text": found["text"], "group": found.get("group", ""),
                "kind": found.get("class", "")}  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f'{place}: must be a JSON object with "file" and "text" ({error!r})') from None
    if not all(isinstance(value, str) for value in keys.values()):
        raise ConfigError(f'{place}: "file", "text", "group" and "class" must be texts')
    return Caption(**keys)


def _group(caption: Caption) -> str:
    return caption.group or caption.file


def _held_out(captions: Sequence[Caption], most: int) -> set[str]:
    """Groups of at most so many images, at least one of them; the same whatever the order of the captions."""
    sizes: dict[str, int] = {}
    for one in captions:
        sizes[_group(one)] = sizes.get(_group(one), 0) + 1
    held: set[str] = set()
    count = 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if count + sizes[group] <= most or not held:
            held.add(group)
            count += sizes[group]
    return held


def _split(root: Path, captions: Sequence[Caption], size: int, names: list[str]) -> Split:
    images = [_image(root / one.file, size) for one in captions]
    labels = torch.tensor([names.index(one.kind) for one in captions], dtype=torch.int64)
    return Split(torch.stack(images), labels, tuple(one.text for one in captions))


def _image(path: Path, size: int) -> Tensor:
    """The picture (3, size, size) in [-1, 1]: on white where it is transparent, its middle square, resized smoothly."""
    try:
        with Image.open(path) as opened:
            flat = on_white(opened).convert("RGB")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not an image that can be read ({error})") from error
    side = min(flat.size)
    left, top = (flat.width - side) // 2, (flat.height - side) // 2
    square = flat.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


def _counted(names: Sequence[str], what: str) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} {what} ({', '.join(names[:NAMED])}{more})"
