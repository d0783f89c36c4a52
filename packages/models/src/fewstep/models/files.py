"""A module as a folder: `model.safetensors` and `config.json`, which holds its checksum; never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"
VERSION = 1


class _Kind(Protocol):
    format: str


K = TypeVar("K", bound=_Kind)


def as_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """The weights as a safetensors file."""
    content: bytes = safetensors.torch.save({name: weight.cpu().contiguous() for name, weight in weights.items()})
    return content


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the file that the weights make."""
    return hashlib.sha256(as_bytes(weights)).hexdigest()


def write_folder(folder: Path, kind: str, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder, the one with the checksum last. kind: what it is, for `read_folder`."""
    content = as_bytes(weights)
    header = {"format": kind, "version": VERSION, "sha256": hashlib.sha256(content).hexdigest()}
    (folder / WEIGHTS).write_bytes(content)
    (folder / CONFIG).write_text(json.dumps(header | dict(settings), indent=2) + "\n")


def read_folder(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights that `write_folder` wrote.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged or of another kind or version; the message is one line.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: the folder must hold {WEIGHTS} and {CONFIG}")
    content = (folder / WEIGHTS).read_bytes()
    try:
        settings = json.loads((folder / CONFIG).read_text())
        found = settings.pop("format"), settings.pop("version")
        if found != (kind, VERSION):
            raise ValueError(f"{found[0]!r} {found[1]!r} instead of {kind!r} {VERSION}")
        if settings.pop("sha256") != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{WEIGHTS} is damaged or is not the file that {CONFIG} describes (SHA-256 differs)")
        weights = {name: weight.clone() for name, weight in safetensors.torch.load(content).items()}
    except (ValueError, TypeError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} holds no {kind} of this version: {error}") from None
    return settings, weights


def format_of(folder: Path) -> str | None:
    """The kind of what `write_folder` wrote there; None if it wrote nothing."""
    try:
        found = json.loads((folder / CONFIG).read_text()).get("format")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def kind_of(folder: Path, kinds: Sequence[type[K]]) -> type[K]:
    """Which of these wrote the folder, by its `format`; the first, whose `load` then says what is wrong, if none."""
    found = format_of(folder)
    return next((kind for kind in kinds if kind.format == found), kinds[0])
