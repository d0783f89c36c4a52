"""What text does inside a network: its tokens are looked at from every position of the image."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.kernels import attention
from fewstep.models.embedding import zeroed
from fewstep.models.inputs import Text


class CrossAttention(nn.Module):
    """Attention from image to text; adds exactly zero until it is trained."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(text_width, 2 * width)
        self.project = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """What is to be added to the image's tokens. Shape: x (B, N, C), normalised -> (B, N, C)."""
        q = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(text.tokens.to(x.dtype)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = attention(q, k, v, key_lengths=text.lengths)
        added: Tensor = self.project(found.transpose(1, 2).flatten(2))
        return added
