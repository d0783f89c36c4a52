"""Checkpoints that are whole or not there: one safetensors file each, its JSON in the header; or one of each process.

A file is written beside its place, forced to disk and renamed, so a process killed at any moment leaves the last good
one; a file damaged afterwards is noticed by its digest and the one before it is used. Never a pickle.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.lab.parts import File, Parts, digest_of

FORMAT = 1
KEEP = 2
INDEX = "index.json"


class CheckpointError(ValueError):
    """The file is no whole checkpoint; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` updates: flat named tensors, and what JSON can hold."""

    step: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor; of one that lies in parts, no other is read."""
        found: Tensor = self.tensors.rows(name, rows) if isinstance(self.tensors, Parts) else self.tensors[name][rows]
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.tensors.shape(name) if isinstance(self.tensors, Parts) else tuple(self.tensors[name].shape)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/<step>.safetensors` atomically and forget all but the last two.

    Raises:
        OSError: the disk is full or not writable; the older checkpoints are then still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    header = {
        "format": FORMAT,
        "step": checkpoint.step,
        "meta": checkpoint.meta,
        "digest": digest_of(tensors),
    }
    path = folder / f"{checkpoint.step:08d}.safetensors"
    write_tensors(path, tensors, {"fewstep": json.dumps(header)})
    _forget(folder)
    return path


def save_part(folder: Path, step: int, tensors: Mapping[str, Tensor], rank: int, world: int) -> Path:
    """Write what process `rank` of `world` has of a checkpoint: its rows of the split tensors, the first also the rest.

    It counts once `save_index` was called, after all processes have written theirs.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = _part(folder, step, rank, world)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, mine, {"digest": digest_of(mine)})
    return path


def save_index(folder: Path, checkpoint: Checkpoint, split: list[str], world: int) -> Path:
    """Make one checkpoint of the parts in `folder/<step>.parts`, and forget all but the last two.

    checkpoint: its tensors have the shapes of the whole ones; what is in them is not looked at.

    Raises:
        OSError: a part is not there, or cannot be read.
    """
    parts = [_part(folder, checkpoint.step, rank, world) for rank in range(world)]
    index = {
        "format": FORMAT,
        "step": checkpoint.step,
        "meta": checkpoint.meta,
        "parts": {path.name: _metadata(path)["digest"] for path in parts},
        "shapes": {name: list(tensor.shape) for name, tensor in checkpoint.tensors.items()},
        "split": split,
    }
    write_text(parts[0].parent / INDEX, json.dumps(index) + "\n")
    _forget(folder)
    return parts[0].parent


def _part(folder: Path, step: int, rank: int, world: int) -> Path:
    return folder / f"{step:08d}.parts" / f"{rank:05d}-of-{world:05d}.safetensors"


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _forget(folder: Path) -> None:
    """All but the last two, and what processes that died have left of others."""
    kept = checkpoints(folder)[:KEEP]
    for old in [*folder.glob("[0-9]*.safetensors"), *folder.glob("[0-9]*.parts")]:
        if old.suffix == ".safetensors" and old not in kept:
            old.unlink()
        elif old not in kept and old.name < kept[0].name:
            (old / INDEX).unlink(missing_ok=True)  # first: half a checkpoint must not count as one
            shutil.rmtree(old)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one file, or one folder of parts; tensors on the CPU.

    Raises:
        CheckpointError: truncated, altered, not a checkpoint, or a pickle.
    """
    if path.is_dir():
        return _load_parts(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["fewstep"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        reason = f"not a whole checkpoint of fewstep ({_reason(error)}); no pickle is read"
        raise CheckpointError(f"{path}: {reason}") from error
    if header["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {header['format']}; this version reads {FORMAT}")
    if header["digest"] != digest_of(tensors):
        raise CheckpointError(f"{path}: its tensors are not those that were saved (digest differs)")
    return Checkpoint(header["step"], tensors, header["meta"])


def _load_parts(folder: Path) -> Checkpoint:
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["format"] != FORMAT:
            raise CheckpointError(f"{folder}: checkpoint format {index['format']}; this version reads {FORMAT}")
        for name, digest in index["parts"].items():
            with safe_open(folder / name, framework="pt") as file:
                if digest != digest_of(File(file)):
                    text = "its tensors are not those that were saved (digest differs)"
                    raise CheckpointError(f"{folder / name}: {text}")
        parts = Parts([folder / name for name in index["parts"]], index["shapes"], index["split"])
        return Checkpoint(index["step"], parts, index["meta"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: not a whole checkpoint of fewstep ({_reason(error)})") from error


def load_latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None; `warn` is told of each damaged one that is passed over."""
    for path in checkpoints(folder):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warn(f"{error}; going on from the one before it")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first: files, and folders of parts."""
    parts = (path for path in folder.glob("[0-9]*.parts") if (path / INDEX).is_file())
    return sorted([*folder.glob("[0-9]*.safetensors"), *parts], reverse=True)


def replace_durably(partial: Path, path: Path) -> None:
    """Rename `partial` to `path` such that after a power cut there is the old file or the new one, never a part."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; an interrupted call leaves what was there, and nothing beside it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        replace_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    replace_durably(partial, path)


def _reason(error: Exception) -> str:
    return "no fewstep header" if isinstance(error, KeyError) else str(error).splitlines()[0]
