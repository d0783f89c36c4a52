"""The models of a run, loaded when they are needed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from fewstep.lab.config import ConfigError
from fewstep.lab.inpainting import as_generator
from fewstep.lab.latents import autoencoder_of
from fewstep.lab.networks import on_schedule
from fewstep.models import GuidedDenoiser, NetworkDenoiser, load
from fewstep.schedules import Denoiser


def with_guidance(denoiser: NetworkDenoiser, w: float | None) -> Denoiser:
    """The denoiser as a sampler takes it: a conditional teacher is wrapped so that it can be guided.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Raises:
        ConfigError: w > 0 for a model that has no condition to guide with, or was distilled without w.
    """
    if denoiser.takes_guidance:
        return denoiser
    if denoiser.trained is not None and denoiser.trained.kind == "moments":
        if w:
            raise ConfigError(f"w={w:g}: this student was distilled without w; only w=0 works")
        return denoiser
    if denoiser.null_cond is not None:
        return GuidedDenoiser(denoiser, denoiser.null_cond)
    if w:
        raise ConfigError(f"w={w:g}: this model is unconditional and cannot be guided; only w=0 works")
    return denoiser


@dataclass(frozen=True)
class Model:
    """A model folder as `fewstep.models.save` writes it; sampled on another schedule than its own if one is given."""

    folder: Path
    device: torch.device
    schedule: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """What the samples of a model depend on: SHA-256 of its settings, which hold that of its weights."""
        settings = json.loads((self.folder / "config.json").read_text())
        if self.schedule:
            settings["schedule"] = self.schedule
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def network(self) -> NetworkDenoiser:
        """The denoiser, in eval mode on the device; the last few of all models are kept."""
        return _load(self.folder, self.digest, self.device)

    @property
    def denoiser(self) -> Denoiser:
        """The same, guided from outside if it is a teacher, and a generator if it is for inpainting."""
        guided = with_guidance(on_schedule(self.network, self.schedule), None)
        return as_generator(guided, autoencoder_of(self.folder, self.device)) if self.network.takes_mask else guided

    @cached_property
    def two_branches(self) -> bool:
        """Whether a guided call costs two network evaluations."""
        return not self.network.takes_guidance

    @property
    def size(self) -> dict[str, int]:
        """Number of weights, and their bytes on disk."""
        parameters = sum(weight.numel() for weight in self.network.parameters())
        return {"parameters": parameters, "bytes": (self.folder / "model.safetensors").stat().st_size}


@lru_cache(maxsize=4)
def _load(folder: Path, digest: str, device: torch.device) -> NetworkDenoiser:
    """`digest` keeps a model that was trained anew in the same folder from being taken for the old one."""
    return load(folder, device).requires_grad_(False)
