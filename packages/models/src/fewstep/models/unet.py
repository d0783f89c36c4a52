"""The U-Net of ADM (arXiv 2105.05233) as papers.md C.3 uses it, channels_last inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.kernels import attention_qkv, group_norm_silu
from fewstep.models.cross_attention import CrossAttention
from fewstep.models.embedding import Conditioning, zeroed
from fewstep.models.inputs import Text
from fewstep.models.network import Network, input_channels


class GroupNorm(nn.GroupNorm):
    """Group normalisation in one kernel call with what stands around it: FiLM (y (1 + scale) + shift), SiLU, a sum."""

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        """With SiLU. Shape: x (B, C, H, W), film (B, 2 C) = [scale | shift] -> (B, C, H, W)."""
        scale, shift = (None, None) if film is None else film.chunk(2, dim=1)
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, scale, shift)

    def alone(self, x: Tensor) -> Tensor:
        """Without SiLU. Shape: (B, C, H, W) -> (B, C, H, W)."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, act=None)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised sum, without SiLU, and the sum. Shape: both (B, C, H, W), as each of the results."""
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, residual=residual, act=None, residual_at="before"
        )


@dataclass(frozen=True)
class Groups:
    """How many groups a normalisation has: at most `most`, each of at least `channels` channels, dividing evenly."""

    most: int
    channels: int

    def norm(self, channels: int) -> GroupNorm:
        """The normalisation of that many channels."""
        most = max(1, min(self.most, channels // self.channels))
        return GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels)


class ResBlock(nn.Module):
    """norm, silu, (resample), conv, FiLM norm, silu, dropout, zero-initialised conv; and the skip to add to it.

    FiLM is h = norm(h) (1 + scale) + shift with scale and shift linear in the embedding. Resampling between
    the first norm and the first conv, and of the skip, is BigGAN's: average pooling down, nearest neighbour up.
    """

    def __init__(
        self, channels: int, out_channels: int, emb_channels: int, groups: Groups, dropout: float, resample: str = ""
    ) -> None:
        super().__init__()
        self.resample, self.dropout = resample, dropout
        self.norm1 = groups.norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.film = nn.Linear(emb_channels, 2 * out_channels)
        self.norm2 = groups.norm(out_channels)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = None if channels == out_channels else nn.Linear(channels, out_channels)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """Branch and skip, whose sum is the result; emb has SiLU applied.

        Shape: x (B, C, H, W), emb (B, E) -> (B, C', H', W') each.
        """
        h = self.norm1(x)
        if self.resample:
            h, x = _resample(h, self.resample), _resample(x, self.resample)
        h = self.norm2(self.conv1(h), self.film(emb))
        h = self.conv2(F.dropout(h, self.dropout, self.training) if self.dropout else h)
        if self.skip is not None:  # a 1x1 convolution; as a matrix product it needs no other layout
            x = self.skip(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return h, x


class TextAttention(nn.Module):
    """Norm, cross-attention to a prompt with zeroed projection, plus what came in."""

    def __init__(self, channels: int, heads: int, groups: Groups, text_width: int) -> None:
        super().__init__()
        self.norm = groups.norm(channels)
        self.cross = CrossAttention(channels, heads, text_width)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """Shape: x (B, C, H, W) -> (B, C, H, W)."""
        added = self.cross(_tokens(self.norm.alone(x)), text)
        out: Tensor = x + added.reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        return out


class SelfAttention(nn.Module):
    """The sum of a residual block's halves, then norm, self-attention over pixels, zeroed projection, plus that sum."""

    def __init__(self, channels: int, heads: int, groups: Groups) -> None:
        super().__init__()
        self.heads = heads
        self.norm = groups.norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zeroed(nn.Linear(channels, channels))

    def forward(self, h: Tensor, skip: Tensor) -> Tensor:
        """Shape: (B, C, H, W) each -> (B, C, H, W). Tokens are a view of channels_last: nothing is copied."""
        normed, x = self.norm.of_sum(h, skip)
        h = self.project(attention_qkv(self.qkv(_tokens(normed)), self.heads))
        return h.add_(_tokens(x)).reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A residual block, followed by attention where the level has it, also to text if there is text."""

    def __init__(self, res: ResBlock, attention: SelfAttention | None, text: TextAttention | None = None) -> None:
        super().__init__()
        self.res, self.attention, self.text = res, attention, text

    def forward(self, x: Tensor, emb: Tensor, text: Text | None = None) -> Tensor:
        """Shape: x (B, C, H, W), emb (B, E) -> (B, C', H', W')."""
        h, skip = self.res(x, emb)
        if self.attention is None:  # no gradient needs the convolution's output, and a large one is costly to allocate
            out: Tensor = h.add_(skip)
        else:
            out = self.attention(h, skip)
        return out if self.text is None or text is None else self.text(out, text)


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _resample(x: Tensor, direction: str) -> Tensor:
    return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class UNet(Network):
    """ADM's U-Net: FiLM residual blocks, BigGAN up and down blocks, attention at chosen resolutions.

    Args:
        image_size: side of the square images, in pixels.
        in_channels: channels of z.
        out_channels: channels of the output; default in_channels.
        channels: width of the first level; the time features have as many.
        channel_mult: width of each level as a multiple of channels; each level has half the resolution of the last.
        blocks: residual blocks per level on the way down; one more on the way up.
        attention: resolutions (in pixels) whose blocks have attention; the middle always has.
        heads: attention heads; or
        head_dim: channels per head, which sets the heads of each level.
        emb_channels: width of the conditioning embedding; default 4 channels.
        dropout: probability, in [0, 1).
        groups: most groups of a normalisation.
        group_channels: fewest channels of a group.
        num_classes: K, with index K the null class; None for unconditional.
        text_width: D if embeddings of a prompt (B, L, D) are an input, under the key "text" of cond (with "text_mask",
            (B, L), where they are padded): wherever there is attention there is then cross-attention to them.
        patch: pixels per side that the first convolution sees as one position with patch^2 times the channels (space to
            depth, as in simple diffusion, arXiv 2301.11093): resolutions are then those of image_size / patch.
        inpainting: mask (B, 1, H, W), 1 where z is to be painted, and masked image (B, C, H, W) are inputs beside z,
            from the keys "mask" and "masked_image" of cond, as `samplers.inpaint` gives them.
        guidance: {"form": ..., "w_range": [low, high]} if w is an input; see `GuidanceEmbedding`.

    Raises:
        ValueError: sizes that do not divide, an attention resolution that no level has.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        channels: int,
        channel_mult: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        *,
        out_channels: int | None = None,
        heads: int = 1,
        head_dim: int | None = None,
        emb_channels: int | None = None,
        dropout: float = 0.0,
        groups: int = 32,
        group_channels: int = 4,
        num_classes: int | None = None,
        text_width: int | None = None,
        patch: int = 1,
        inpainting: bool = False,
        guidance: Mapping[str, Any] | None = None,
    ) -> None:
        out_channels, emb_channels = out_channels or in_channels, emb_channels or 4 * channels
        super().__init__(
            {
                "image_size": image_size, "in_channels": in_channels, "out_channels": out_channels,
                "channels": channels, "channel_mult": list(channel_mult), "blocks": blocks,
                "attention": list(attention), "heads": heads, "head_dim": head_dim, "emb_channels": emb_channels,
                "dropout": dropout, "groups": groups, "group_channels": group_channels, "num_classes": num_classes,
                "text_width": text_width, "patch": patch, "inpainting": inpainting,
            }
        )  # fmt: skip
        if patch < 1 or image_size % patch:
            raise ValueError(f"patch={patch} does not divide image_size={image_size}")
        sizes = _level_sizes(image_size // patch, len(channel_mult), attention)
        widths = [channels * mult for mult in channel_mult]
        self._groups = Groups(groups, group_channels)
        self.conditioning = Conditioning(channels, emb_channels, num_classes, text_width)
        self.conv_in = nn.Conv2d(input_channels(in_channels, inpainting) * patch**2, channels, 3, padding=1)
        self.encoder, skips = self._encoder(sizes, widths)
        self.middle = self._middle(sizes[-1], widths[-1])
        self.decoder = self._decoder(sizes, widths, skips)
        self.norm_out = self._groups.norm(channels)
        self.conv_out = zeroed(nn.Conv2d(channels, out_channels * patch**2, 3, padding=1))
        self._guidance_from_config(guidance)
        self.to(memory_format=torch.channels_last)

    def _block(self, channels: int, out_channels: int, attention: bool, resample: str = "") -> Block:
        c = self.config
        res = ResBlock(channels, out_channels, c["emb_channels"], self._groups, c["dropout"], resample)
        if not attention:
            return Block(res, None)
        own, width = self._attention(out_channels), c["text_width"]
        text = None if width is None else TextAttention(out_channels, own.heads, self._groups, width)
        return Block(res, own, text)

    def _attention(self, channels: int) -> SelfAttention:
        head_dim = self.config["head_dim"]
        heads = channels // head_dim if head_dim else self.config["heads"]
        if heads < 1 or channels % heads or (head_dim and channels % head_dim):
            raise ValueError(f"{channels} channels do not divide into heads={heads}, head_dim={head_dim}")
        return SelfAttention(channels, heads, self._groups)

    def _encoder(self, sizes: list[int], widths: list[int]) -> tuple[nn.ModuleDict, list[int]]:
        """Blocks by name, in order, and the channels of conv_in's output and of each block's, for the skips."""
        blocks, skips = nn.ModuleDict(), [widths[0]]
        for size, width in zip(sizes, widths, strict=True):
            if size != sizes[0]:
                blocks[f"{size}x{size}_down"] = self._block(skips[-1], skips[-1], False, "down")
                skips.append(skips[-1])
            for i in range(self.config["blocks"]):
                blocks[f"{size}x{size}_{i}"] = self._block(skips[-1], width, size in self.config["attention"])
                skips.append(width)
        return blocks, skips

    def _middle(self, size: int, width: int) -> nn.ModuleDict:
        return nn.ModuleDict({f"{size}x{size}_{i}": self._block(width, width, attention=i == 0) for i in range(2)})

    def _decoder(self, sizes: list[int], widths: list[int], skips: list[int]) -> nn.ModuleDict:
        blocks, channels, skips = nn.ModuleDict(), widths[-1], list(skips)
        for size, width in zip(reversed(sizes), reversed(widths), strict=True):
            if size != sizes[-1]:
                blocks[f"{size}x{size}_up"] = self._block(channels, channels, False, "up")
            for i in range(self.config["blocks"] + 1):
                joined = channels + skips.pop()
                blocks[f"{size}x{size}_{i}"] = self._block(joined, width, size in self.config["attention"])
                channels = width
        return blocks

    def forward(self, z: Tensor, time: Tensor, cond: object = None, w: Tensor | float | None = None) -> Tensor:
        """The network's prediction for noisy images. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

        Shape: z (B, C, H, W), time (B,) in [0, 1000], cond labels (B,) or {"y": labels, "text": ...}, w (B,) -> as z.

        Raises:
            ValueError: an input is missing, superfluous or misshaped, or a label is out of range.
        """
        self._check(z, time)
        emb, text = self._embedding(time, cond, w)
        patch, z = self.config["patch"], self._input(z, cond)
        z = F.pixel_unshuffle(z, patch) if patch > 1 else z
        h = self.conv_in(z.to(dtype=self.conv_in.weight.dtype, memory_format=torch.channels_last))
        skips = [h]
        for block in self.encoder.values():
            h = block(h, emb, text)
            skips.append(h)
        for block in self.middle.values():
            h = block(h, emb, text)
        for name, block in self.decoder.items():
            h = block(h if name.endswith("_up") else torch.cat([h, skips.pop()], dim=1), emb, text)
        output: Tensor = self.conv_out(self.norm_out(h))
        return (F.pixel_shuffle(output, patch) if patch > 1 else output).contiguous()


def _level_sizes(image_size: int, levels: int, attention: Sequence[int]) -> list[int]:
    """The resolution of each level."""
    if levels < 1 or image_size % 2 ** (levels - 1):
        raise ValueError(f"{image_size} positions per side do not halve for {levels} levels: use fewer")
    sizes = [image_size >> level for level in range(levels)]
    unknown = [size for size in attention if size not in sizes]
    if unknown:
        raise ValueError(f"attention={list(attention)}: no level has resolution {unknown}; the levels are {sizes}")
    return sizes
