"""A small KL autoencoder (arXiv 2112.10752, section 3.1): images to latents of unit variance, and back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.models.embedding import zeroed
from fewstep.models.files import digest_of, read_folder, write_folder
from fewstep.models.storage import new_folder
from fewstep.models.unet import Groups

FORMAT = "fewstep-autoencoder"
LOG_VARIANCES = (-30.0, 20.0)  # of the posterior: exp of what an untrained layer says must stay finite
GROUP_CHANNELS = 4


class Posterior(NamedTuple):
    """N(mean, std^2) of the latents given images, each (B, C, H, W)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for noise N(0, I) of their shape."""
        return self.mean + self.std * noise


class ConvBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the last convolution zero at first; past it 1x1 if it widens."""

    def __init__(self, channels: int, out_channels: int, groups: Groups) -> None:
        super().__init__()
        self.norm1, self.norm2 = groups.norm(channels), groups.norm(out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, C, H, W) -> (B, C', H, W)."""
        h: Tensor = self.skip(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return h


class Up(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, C, H, W) -> (B, C, 2 H, 2 W)."""
        h: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return h


class Autoencoder(nn.Module):
    """Convolutional encoder and decoder; each level after the first halves the resolution, so three make f = 4.

    Latents are (what the encoder says - shift) / scale, per channel: unit variance once `normalise` has seen some.

    Args:
        image_size: side of the square images, in pixels.
        in_channels: channels of the images.
        latent_channels: channels of the latents.
        channels: width of the first level.
        channel_mult: width of each level as a multiple of channels.
        blocks: residual blocks per level, each way.

    Raises:
        ValueError: image_size does not halve that often.
    """

    format = FORMAT
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        latent_channels: int = 4,
        channels: int = 32,
        channel_mult: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "image_size": image_size, "in_channels": in_channels, "latent_channels": latent_channels,
            "channels": channels, "channel_mult": list(channel_mult), "blocks": blocks,
        }  # fmt: skip
        self.factor = 2 ** (len(channel_mult) - 1)
        if not channel_mult or image_size % self.factor:
            raise ValueError(f"image_size={image_size} does not halve {len(channel_mult) - 1} times: use fewer levels")
        widths, groups = [channels * mult for mult in channel_mult], Groups(32, GROUP_CHANNELS)
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1), *_levels(widths, blocks, groups, down=True),
            groups.norm(widths[-1]), nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, widths[-1], 3, padding=1), *_levels(widths[::-1], blocks, groups, down=False),
            groups.norm(widths[0]), nn.Conv2d(widths[0], in_channels, 3, padding=1),
        )  # fmt: skip
        self.register_buffer("shift", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("scale", torch.ones(latent_channels, 1, 1))
        self.to(memory_format=torch.channels_last)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.config["in_channels"], self.config["image_size"], self.config["image_size"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        size = self.config["image_size"] // self.factor
        return self.config["latent_channels"], size, size

    @property
    def digest(self) -> str:
        """SHA-256 of its weights, shift and scale among them: latents belong to the autoencoder of one digest."""
        return digest_of(self.state_dict())

    def encode(self, x: Tensor) -> Posterior:
        """The latents' distribution. Shape: x (B, C, H, W) in [-1, 1] -> (B, C', H / f, W / f) each.

        Raises:
            ValueError: images of another shape.
        """
        self._check(x, self.image_shape, "images")
        mean, log_variance = self._moments(x.to(memory_format=torch.channels_last)).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.float().clamp(*LOG_VARIANCES))
        return Posterior(((mean - self.shift) / self.scale).contiguous(), (std / self.scale).contiguous())

    def decode(self, z: Tensor) -> Tensor:
        """Images, not clamped. Shape: z (B, C', H / f, W / f) -> (B, C, H, W).

        Raises:
            ValueError: latents of another shape.
        """
        self._check(z, self.latent_shape, "latents")
        inner = z.to(self.shift.dtype) * self.scale + self.shift
        return self._images(inner.to(memory_format=torch.channels_last)).contiguous()

    def _moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance, not normalised. Shape: (B, C, H, W) -> (B, 2 C', H / f, W / f)."""
        moments: Tensor = self.encoder(x)
        return moments

    def _images(self, z: Tensor) -> Tensor:
        """What `_moments` undoes. Shape: (B, C', H / f, W / f) -> (B, C, H, W)."""
        images: Tensor = self.decoder(z)
        return images

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """A round trip through sampled latents, and their distribution. Shape: x (B, C, H, W), noise like latents."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior

    @torch.no_grad()
    def normalise(self, latents: Tensor) -> None:
        """From now on, give the latents (N, C', H, W), which it made, mean 0 and variance 1 in every channel."""
        values = latents.double().transpose(0, 1).flatten(1)
        shape = self.shift.shape
        mean, std = values.mean(1).reshape(shape).to(self.scale), values.std(1).reshape(shape).to(self.scale)
        self.shift += self.scale * mean
        self.scale *= std.clamp(min=1e-6)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`: weights and settings, wholly or not at all.

        Raises:
            FileExistsError: path is a file.
        """
        with new_folder(Path(path)) as folder:
            write_folder(folder, self.format, {"autoencoder": self.config}, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Autoencoder:
        """Read what `save` wrote, bit for bit, in eval mode.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is damaged, of another kind, or does not fit.
        """
        settings, weights = read_folder(Path(path), cls.format)
        try:
            autoencoder = cls(**settings["autoencoder"])
            autoencoder.load_state_dict(weights)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path} does not describe an autoencoder: {' '.join(str(error).split())}") from None
        return autoencoder.to(device).eval()

    def _check(self, x: Tensor, shape: tuple[int, int, int], what: str) -> None:
        if x.shape[1:] != shape:
            raise ValueError(f"this autoencoder takes {what} of (channels, height, width) = {shape}, got {x.shape[1:]}")


def _levels(widths: Sequence[int], blocks: int, groups: Groups, *, down: bool) -> list[nn.Module]:
    """Residual blocks of every width, resolution halved (down) or doubled between them."""
    layers: list[nn.Module] = []
    last = widths[0]
    for level, width in enumerate(widths):
        if level:
            layers.append(nn.Conv2d(last, last, 3, stride=2, padding=1) if down else Up(last))
        for _ in range(blocks):
            layers.append(ConvBlock(last, width, groups))
            last = width
    return layers
