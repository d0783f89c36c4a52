"""diffusers' AutoencoderKL behind the methods of `Autoencoder`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.autoencoder import Autoencoder
from fewstep.models.files import kind_of
from fewstep.models.interchange.library import LOCAL, diffusers, settings_of

PART, CLASS = "vae", "AutoencoderKL"


class DiffusersAutoencoder(Autoencoder):
    """AutoencoderKL as an `Autoencoder`: images in [-1, 1] to latents of about unit variance, and back.

    Latents are (what the encoder says - shift_factor) scaling_factor, as pipelines give them to their network.

    Args:
        image_size: side of the square images, in pixels: the model itself takes any.
        settings: the arguments of AutoencoderKL, as its `config` has them.
        model: taken over as it is, instead of a new one of these settings.

    Raises:
        ValueError: image_size does not halve as often as the model asks.
        ImportError: diffusers is not installed.
    """

    format = "fewstep-diffusers-autoencoder"

    def __init__(self, image_size: int, settings: Mapping[str, Any], model: nn.Module | None = None) -> None:
        nn.Module.__init__(self)  # and not that of Autoencoder, which builds other networks
        library = diffusers("an autoencoder of diffusers")
        self.factor = 2 ** (len(settings.get("block_out_channels", [0])) - 1)
        if image_size % self.factor:
            raise ValueError(f"image_size={image_size} is no multiple of {self.factor}, the autoencoder's factor")
        channels, latents = settings.get("in_channels", 3), settings.get("latent_channels", 4)
        self.config = {"image_size": image_size, "settings": dict(settings)}
        self._shapes = (channels, image_size, image_size), (latents, *(2 * (image_size // self.factor,)))
        self.model: Any = getattr(library, CLASS)(**settings) if model is None else model
        scale = 1.0 / float(settings.get("scaling_factor") or 1.0)
        self.register_buffer("shift", torch.full((latents, 1, 1), float(settings.get("shift_factor") or 0.0)))
        self.register_buffer("scale", torch.full((latents, 1, 1), scale))

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], image_size: int, *, weights: bool = True
    ) -> DiffusersAutoencoder:
        """The one in the folder of a pipeline, or its own; weights=False: its settings, on the meta device.

        Raises:
            FileNotFoundError: no such folder, or no autoencoder in it.
            ValueError: another class, or a size that does not fit.
            ImportError: diffusers is not installed.
        """
        library, folder = diffusers("an autoencoder of diffusers"), Path(path)
        places = [place for place in (folder / PART, folder) if (place / "config.json").is_file()]
        if not places:
            raise FileNotFoundError(f"{folder} has no {PART}/config.json, nor config.json of an autoencoder")
        try:
            settings = dict(json.loads((places[0] / "config.json").read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{places[0] / 'config.json'} is not JSON: {error}") from None
        found = settings.get("_class_name")
        if found != CLASS:
            raise ValueError(f"{places[0]}: autoencoder class {found!r} is unknown: use {CLASS}")
        kind: Any = getattr(library, CLASS)
        if weights:
            model = kind.from_pretrained(places[0], **LOCAL).float()
            return cls(image_size, settings_of(model), model).eval()
        with torch.device("meta"):
            model = kind.from_config(settings)
            return cls(image_size, settings_of(model), model).eval()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self._shapes[0]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        return self._shapes[1]

    def _moments(self, x: Tensor) -> Tensor:
        moments: Tensor = self.model.encode(x).latent_dist.parameters
        return moments

    def _images(self, z: Tensor) -> Tensor:
        images: Tensor = self.model.decode(z).sample
        return images


KINDS: tuple[type[Autoencoder], ...] = (Autoencoder, DiffusersAutoencoder)


def load_autoencoder(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Autoencoder:
    """Read what `save` of an autoencoder of either kind wrote, bit for bit, in eval mode.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, of another kind, or does not fit.
        ImportError: it is of diffusers, which is not installed.
    """
    return kind_of(Path(path), KINDS).load(path, device)
