"""Teachers that are read and not trained: a folder of diffusers, or of this library, as a denoiser."""

from __future__ import annotations

import json
from pathlib import Path

from fewstep.lab.config import Config, ConfigError, PretrainedConfig
from fewstep.models import NetworkDenoiser, from_diffusers, load
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
        return from_diffusers(path, stage.scheduler, image_size=image_size, weights=weights)
    except Exception as error:  # diffusers raises errors of many types
        raise ConfigError(f"stages.{stage.name}.path={stage.path}: {' '.join(str(error).split())}") from error


def _is_ours(path: Path) -> bool:
    try:
        settings = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("format") == FORMAT


def anchor(stage: PretrainedConfig) -> None:
    """Make its paths absolute: a cluster's jobs start in another folder."""
    stage.path = _absolute(stage.path)
    stage.scheduler = None if stage.scheduler is None else _absolute(stage.scheduler)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def brings_own_network(config: Config) -> bool:
    """Whether every teacher is read, so that the experiment's `network`, `schedule` and `prediction` are nobody's."""
    kinds = [stage.kind for stage in config.stages.values()]
    return "pretrained" in kinds and "teacher" not in kinds
