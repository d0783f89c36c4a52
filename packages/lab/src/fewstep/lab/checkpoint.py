"""Checkpoints that are whole or not there: one safetensors file each, its JSON in the header.

A file is written beside its place, forced to disk and renamed, so a process killed at any moment leaves the last good
one; a file damaged afterwards is noticed by its digest and the one before it is used. Never a pickle.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
KEEP = 2


class CheckpointError(ValueError):
    """The file is no whole checkpoint; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` updates: flat named tensors, and what JSON can hold."""

    step: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


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
        "digest": _digest(tensors),
    }
    path = folder / f"{checkpoint.step:08d}.safetensors"
    write_tensors(path, tensors, {"fewstep": json.dumps(header)})
    for old in checkpoints(folder)[KEEP:]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one file; tensors on the CPU.

    Raises:
        CheckpointError: truncated, altered, not a checkpoint, or a pickle.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["fewstep"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        reason = f"not a whole checkpoint of fewstep ({_reason(error)}); no pickle is read"
        raise CheckpointError(f"{path}: {reason}") from error
    if header["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {header['format']}; this version reads {FORMAT}")
    if header["digest"] != _digest(tensors):
        raise CheckpointError(f"{path}: its tensors are not those that were saved (digest differs)")
    return Checkpoint(header["step"], tensors, header["meta"])


def load_latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None; `warn` is told of each damaged one that is passed over."""
    for path in checkpoints(folder):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warn(f"{error}; going on from the one before it")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files in `folder`, newest first."""
    return sorted(folder.glob("[0-9]*.safetensors"), reverse=True)


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


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in _bytes(tensors):
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensors: dict[str, Tensor]) -> Iterator[Any]:
    for name in sorted(tensors):
        tensor = tensors[name]
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def _reason(error: Exception) -> str:
    return "no fewstep header" if isinstance(error, KeyError) else str(error).splitlines()[0]
