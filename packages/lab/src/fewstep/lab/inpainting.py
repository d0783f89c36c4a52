"""Editing and inpainting in pixels and in latents: masks to train with, what a model sees of an image, the way back.

What a model trained for inpainting sees of an image in latent space is the encoding of the picture with its hidden
pixels painted grey. Parts of the picture's own latents would not do: a latent beside the mask knows what was under it,
so a model would learn to read that from there and not from its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.distill import Method
from fewstep.lab.config import Config, StageConfig
from fewstep.lab.data import Split, Stored, load_data, pixels
from fewstep.lab.latents import decode, encode, latent_mask, run_autoencoder, training_split
from fewstep.lab.text import for_method, networks_of
from fewstep.models import Autoencoder, TextEncoder
from fewstep.samplers import ddim, edit, inpaint, paste, with_mask
from fewstep.samplers.edit import Sampler
from fewstep.schedules import Cond, Denoiser, Schedule, Trained, seeded_uniform

MASK_STREAM = 4  # of a sample's seed; fewstep.distill draws from 1 to 3
EVERYTHING = 1 / 4  # share of masks that hide all of a picture: a model trained with them is a generator too
SIDES = (0.25, 0.75)  # of the rectangles that others hide, as shares of a picture's; they are cut off at its border


def takes_mask(denoiser: object) -> bool:
    """Whether a denoiser was made for inpainting."""
    return bool(getattr(denoiser, "takes_mask", False))


def random_masks(seeds: Tensor, side: int) -> Tensor:
    """True where a picture of side x side pixels is hidden: in a rectangle around any of its pixels, or everywhere.

    Shape: seeds (B,) int64 -> (B, 1, side, side) bool, each a function of its seed alone.
    """
    u = seeded_uniform(seeds, (5,), stream=MASK_STREAM)
    least, most = SIDES
    sides = ((least + (most - least) * u[:, 1:3]) * side).round().clamp(min=2)
    first = (u[:, 3:] * side - sides / 2).floor()
    places = torch.arange(side, device=seeds.device)
    down, across = ((places >= first[..., None]) & (places < (first + sides)[..., None])).unbind(1)
    hidden = (down[:, :, None] & across[:, None, :]) | (u[:, 0] < EVERYTHING)[:, None, None]
    return hidden[:, None]


@torch.no_grad()
def masked_latents(autoencoder: Autoencoder, images: Tensor, mask: Tensor) -> Tensor:
    """Latents of pictures whose hidden pixels are grey: 0, as models on pixels see them.

    Shape: images (B, C, H, W), mask (B or 1, 1, H, W) -> (B, C', H / f, W / f), where the autoencoder is.
    """
    device = autoencoder.shift.device
    return autoencoder.encode(images.to(device).masked_fill(mask.to(device, torch.bool), 0.0)).mean.float()


@dataclass(frozen=True, kw_only=True)
class MaskedSplit(Split):
    """A split for networks that take masks: each visit hides another part of the image, a function of its seed alone.

    pictures: what the images of `inner` are latents of; None in pixel space.
    """

    inner: Split
    pictures: Tensor | Stored | None = None
    autoencoder: Autoencoder | None = None

    def take(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Cond]:
        """Images (B, C, H, W) and conditions at `indices` (B,), with masks by `seeds` (B,)."""
        assert seeds is not None  # whoever trains has them
        x, cond = self.inner.take(indices, seeds)
        if self.pictures is None or self.autoencoder is None:
            return x, with_mask(cond, x, random_masks(seeds, x.shape[-1]))
        pictures, _ = pixels(self.pictures, indices, x.device)
        hidden = random_masks(seeds, pictures.shape[-1])
        seen = masked_latents(self.autoencoder, pictures, hidden)
        return x, with_mask(cond, x, latent_mask(hidden.float(), self.autoencoder), seen)

    def to(self, device: torch.device) -> MaskedSplit:
        """The same on another device, its autoencoder with it."""
        inner = self.inner.to(device)
        moved = {name: there.to(device) for name, there in self._source().items() if hasattr(there, "to")}
        return replace(self, images=inner.images, labels=inner.labels, inner=inner, **moved)

    def _source(self) -> dict[str, Any]:
        return {"pictures": self.pictures, "autoencoder": self.autoencoder}


def split_for(config: Config, stage: StageConfig, method: Method) -> Split:
    """What `method` trains on in a stage: images or their latents, with text and masks where a network takes them.

    Raises:
        ConfigError: the latents are missing or damaged, or were made with another autoencoder.
    """
    return with_masks(for_method(training_split(config, stage), method), config, *networks_of(method))


def with_masks(split: Split, config: Config, *networks: object) -> Split:
    """The split with masks in its condition where one of these networks takes them, else the split itself."""
    if not any(map(takes_mask, networks)):
        return split
    autoencoder = run_autoencoder(config, torch.device("cpu"))
    pictures = None if autoencoder is None else load_data(config.data).train.images
    return MaskedSplit(
        images=split.images, labels=split.labels, captions=split.captions, inner=split, pictures=pictures,
        autoencoder=autoencoder,
    )  # fmt: skip


class Generator:
    """A denoiser trained for inpainting from which all of the image is hidden: it can be sampled like any other.

    hidden: (1, C, H, W), or broadcastable to that: what it sees of such an image.
    """

    def __init__(self, denoiser: Denoiser, hidden: Tensor) -> None:
        self._denoiser, self._hidden = denoiser, hidden
        self.trained: Trained | None = getattr(denoiser, "trained", None)
        self.takes_guidance: bool = getattr(denoiser, "takes_guidance", False)

    @property
    def schedule(self) -> Schedule:
        """The denoiser's."""
        return self._denoiser.schedule

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The denoiser's."""
        encoder: TextEncoder | None = getattr(self._denoiser, "text_encoder", None)
        return encoder

    def __call__(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Tensor:
        """The estimate of x. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w)."""
        everything = torch.ones_like(z[:, :1])
        return self._denoiser(z, t, with_mask(cond, z, everything, self._hidden.to(z).expand_as(z)), w)


def as_generator(denoiser: Denoiser, autoencoder: Autoencoder | None) -> Denoiser:
    """The denoiser as samplers take it that know nothing of masks; itself if it does not either."""
    if not takes_mask(denoiser):
        return denoiser
    if autoencoder is None:
        return Generator(denoiser, torch.zeros(1, 1, 1, 1))
    everything = torch.ones(1, 1, *autoencoder.image_shape[1:])
    return Generator(denoiser, masked_latents(autoencoder, torch.zeros(1, *autoencoder.image_shape), everything))


def remake(
    denoiser: Denoiser,
    images: Tensor,
    noise: Tensor,
    steps: int,
    strength: float,
    cond: Cond,
    w: float | None,
    *,
    mask: Tensor | None = None,
    autoencoder: Autoencoder | None = None,
    sampler: Sampler = ddim,
    seeds: Tensor | None = None,
) -> Tensor:
    """What `samplers.edit` or, with a mask, `samplers.inpaint` makes of pictures, through latents and back if need be.

    images (B, C, H, W) and mask (B or 1, 1, H, W) are pixels on the CPU; noise and cond are the denoiser's, on its
    device. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Shape: -> like images, on the CPU, not clamped; where the mask is 0, images bit for bit.

    Raises:
        ValueError: what `samplers.edit` or `samplers.inpaint` refuses. ConfigError: a mask of another size.
    """
    x = encode(autoencoder, images).to(noise.device)
    options: dict[str, Any] = {"sampler": sampler, "seeds": seeds}
    if mask is None:
        made = edit(as_generator(denoiser, autoencoder), x, noise, steps, strength, cond, w, **options)
        return decode(autoencoder, made.float().cpu())
    if autoencoder is None:
        options["mask"] = mask.to(noise.device)
    else:
        options["mask"] = latent_mask(mask, autoencoder).to(noise.device)
        options["masked_image"] = masked_latents(autoencoder, images, mask).to(noise.device)
    made = inpaint(denoiser, x, noise, steps, strength, cond, w, **options)
    return paste(decode(autoencoder, made.float().cpu()), images, mask.bool())  # no round trip gives known pixels back
