"""Checkpoints from outside a run: which files they are, and whether they are still those that a stage was made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fewstep.lab.checkpoint import write_text
from fewstep.lab.config import ConfigError, PretrainedAutoencoderConfig, PretrainedConfig

SOURCE = "source.json"
# Of settings and weights in a checkpoint's folder, by the kind of stage that reads it.
PLACES = {
    "pretrained": (".", "unet", "transformer", "scheduler", "text_encoder", "tokenizer"),
    "pretrained_autoencoder": (".", "vae"),
}
Source = PretrainedConfig | PretrainedAutoencoderConfig


def digests(stage: Source) -> dict[str, str]:
    """SHA-256 of every file of settings or weights, by its path below the checkpoint's folder (or the scheduler's)."""
    path = Path(stage.path)
    files = {str(Path(place) / file.name): file for place in PLACES[stage.kind] for file in _files(path / place)}
    if isinstance(stage, PretrainedConfig) and stage.scheduler is not None:
        files |= {f"scheduler={file.name}": file for file in _files(Path(stage.scheduler))}
    return {name: _sha256(file) for name, file in files.items()}


def write_source(folder: Path, stage: Source, found: dict[str, str]) -> None:
    """Write `source.json`: where the checkpoint lay, and its `digests`."""
    write_text(folder / SOURCE, json.dumps({"path": stage.path, "sha256": found}, indent=1) + "\n")


def refuse_changed(stage: Source, folder: Path) -> None:
    """Raise if `folder` was made from a checkpoint that is another now; it may lie elsewhere.

    Raises:
        ConfigError: names the first file that differs, is missing, or was not there.
    """
    if not (folder / SOURCE).is_file():
        return
    try:
        before: dict[str, str] = dict(json.loads((folder / SOURCE).read_text())["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / SOURCE} is damaged: delete {folder} and the stages made from it") from error
    now = digests(stage)
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            was, is_ = (found.get(name, "not there")[:12] for found in (before, now))
            raise ConfigError(
                f"stages.{stage.name}.path={stage.path}: {name} is another than when {folder} was made from it "
                f"(SHA-256 {was}, now {is_}); put it back, or choose another out=, or delete the folder and those made "
                "from it"
            )


def _files(folder: Path) -> list[Path]:
    return sorted(file for suffix in ("json", "safetensors", "txt") for file in folder.glob(f"*.{suffix}"))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
