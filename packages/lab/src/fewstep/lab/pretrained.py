"""Teachers that are read and not trained: a folder of diffusers, or of this library, as a denoiser.

Of a text-to-image model CLIP's text encoder is read with it, and is the denoiser's own from then on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fewstep.lab.config import Config, ConfigError, PretrainedConfig
from fewstep.lab.sources import Source
from fewstep.models import ClipTextEncoder, NetworkDenoiser, from_diffusers, load
from fewstep.models.clip_encoder import MODEL as ENCODER
from fewstep.models.interchange.library import TEXT_UNET
from fewstep.models.storage import CONFIG, FORMAT


def read_checkpoint(stage: PretrainedConfig, image_size: int, *, weights: bool = True) -> NetworkDenoiser:
    """The checkpoint as a denoiser, on the CPU; `weights=False`: what its settings say, on the meta device.

    image_size: in pixels, where its settings do not say it.

    Raises:
        ConfigError: the folder, or something in it, is missing, damaged, or of a kind that is not known.
    """
    path = Path(stage.path)
    try:
        if _is_ours(path):
            return load(path, weights=weights)
        encoder = _text_encoder(path, weights)
        null: dict[str, Any] = {} if encoder is None else {"null_text": _null_text(encoder)}
        found = from_diffusers(path, stage.scheduler, image_size=image_size, weights=weights, **null)
        return found.use_text_encoder(encoder)
    except Exception as error:  # diffusers raises errors of many types
        raise ConfigError(f"stages.{stage.name}.path={stage.path}: {' '.join(str(error).split())}") from error


def _text_encoder(path: Path, weights: bool) -> ClipTextEncoder | None:
    """CLIP's of a text-to-image model; None where there is none, or nobody would ask it anything."""
    takes_text = _settings(path / "unet" / "config.json").get("_class_name") == TEXT_UNET
    return ClipTextEncoder.read(path, weights=weights) if takes_text and (path / ENCODER).is_dir() else None


def _null_text(encoder: ClipTextEncoder) -> torch.Tensor:
    """The empty prompt's embedding (L, D)."""
    if encoder.device.type == "meta":
        return torch.empty(encoder.length, encoder.width, device="meta")
    return encoder.null_cond["text"]


def _is_ours(path: Path) -> bool:
    return _settings(path / CONFIG).get("format") == FORMAT


def _settings(file: Path) -> dict[str, Any]:
    """What the file says; {} where it says nothing, which others complain of."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def anchor(stage: Source) -> None:
    """Make its paths absolute: a cluster's jobs start in another folder."""
    stage.path = _absolute(stage.path)
    if isinstance(stage, PretrainedConfig) and stage.scheduler is not None:
        stage.scheduler = _absolute(stage.scheduler)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def brings_own_network(config: Config) -> bool:
    """Whether every teacher is read, so that the experiment's `network`, `schedule` and `prediction` are nobody's."""
    kinds = [stage.kind for stage in config.stages.values()]
    return "pretrained" in kinds and "teacher" not in kinds
