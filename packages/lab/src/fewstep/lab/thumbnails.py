"""What a text encoder can learn before there is a denoiser: how a caption's picture looks on average, in small."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.distill import Batch
from fewstep.lab.one_network import OneNetwork
from fewstep.models import TextEncoder
from fewstep.models.cross_attention import CrossAttention
from fewstep.models.inputs import Text
from fewstep.schedules import Cond

STD = 0.1  # of what the places of a thumbnail ask with, at first


class Thumbnails(nn.Module):
    """A text encoder, and a head that tells from its tokens what stands at each place of size x size.

    The head is not kept: every place looks at the text once and answers with the colour that it expects.
    """

    def __init__(self, encoder: TextEncoder, size: int, channels: int) -> None:
        super().__init__()
        self.encoder, self.size, width = encoder, size, encoder.width
        self.places = nn.Parameter(STD * torch.randn(size**2, width))
        self.look = CrossAttention(width, 1, width)
        hidden = nn.Linear(width, 4 * width)
        self.answer = nn.Sequential(nn.LayerNorm(width), hidden, nn.GELU(), nn.Linear(4 * width, channels))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Shape: tokens, mask (B, L) -> (B, C, size, size)."""
        places = self.places.expand(len(tokens), -1, -1)
        seen = places + self.look(places, Text(self.encoder(tokens, mask), mask.sum(1)))
        answer: Tensor = self.answer(seen)
        return answer.transpose(1, 2).unflatten(2, (self.size, self.size))


class ThumbnailRegression(OneNetwork):
    """Mean squared error of thumbnails. The best answer is E[x | text], the denoiser's own at t = 1, without its cost.

    Until a text encoder tells "a left of b" from "b left of a" both are expected everywhere alike, and a denoiser that
    learns with it, which sees little of this at any other time, goes on for long before it does.
    """

    def __init__(self, thumbnails: Thumbnails) -> None:
        super().__init__("thumbnails", thumbnails)
        self._size = thumbnails.size

    def draw(self, x: Tensor, cond: Cond, seeds: Tensor, step: int) -> Batch:
        """Thumbnails as x and z, nothing random; all times are 1."""
        small = F.adaptive_avg_pool2d(x, self._size)
        return Batch(z=small, t=torch.ones(len(x), device=x.device), cond=cond, x=small, seeds=seeds)

    def loss(self, batch: Batch, step: int, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, also as its log. Shape: batch.z (B, C, size, size) -> ()."""
        assert isinstance(batch.cond, Mapping)  # as TextSplit gives it
        made = self.networks["thumbnails"](batch.cond["tokens"], batch.cond["text_mask"])
        loss = F.mse_loss(made.float(), batch.z)
        return loss, {"loss": loss.detach()}
