"""The diffusion transformer with adaLN-Zero blocks (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.kernels import attention_qkv, layer_norm_modulate
from fewstep.models.cross_attention import CrossAttention
from fewstep.models.embedding import Conditioning, sinusoidal, zeroed
from fewstep.models.inputs import Text
from fewstep.models.network import Network, input_channels

TIME_FEATURES = 256


class DiTBlock(nn.Module):
    """Self-attention and MLP, each modulated before and gated after by the embedding; at first the identity.

    Between them, where there is text, cross-attention to it (as in PixArt, arXiv 2310.00426, here normalised first).
    """

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, text_width: int | None = None) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.cross = None if text_width is None else CrossAttention(width, heads, text_width)

    def forward(self, x: Tensor, emb: Tensor, text: Text | None = None) -> Tensor:
        """Shape: x (B, L, D), emb (B, D) with SiLU applied -> (B, L, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb).chunk(6, dim=1)
        h = self.project(attention_qkv(self.qkv(layer_norm_modulate(x, scale1, shift1)), self.heads))
        x = torch.addcmul(x, gate1[:, None], self._drop(h))
        if self.cross is not None and text is not None:
            x = x + self._drop(self.cross(F.layer_norm(x, x.shape[-1:]), text))
        h = self.mlp_out(F.gelu(self.mlp_in(layer_norm_modulate(x, scale2, shift2)), approximate="tanh"))
        return torch.addcmul(x, gate2[:, None], self._drop(h))

    def _drop(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout, self.training) if self.dropout else h


class DiT(Network):
    """Transformer over patches with adaLN-Zero conditioning and fixed 2-D sine-cosine positions.

    Args:
        image_size: side of the square images, in pixels.
        in_channels: channels of z.
        patch: side of a patch, in pixels; divides image_size.
        width: channels of a token, a multiple of 4 and of heads.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLPs as a multiple of width.
        out_channels: channels of the output; default in_channels.
        dropout: probability on each residual branch, in [0, 1).
        num_classes: K, with index K the null class; None for unconditional.
        text_width: D if embeddings of a prompt (B, L, D) are an input, under the key "text" of cond (with "text_mask",
            (B, L), where they are padded): every block then has cross-attention to them.
        inpainting: mask (B, 1, H, W), 1 where z is to be painted, and masked image (B, C, H, W) are inputs beside z,
            from the keys "mask" and "masked_image" of cond, as `samplers.inpaint` gives them.
        guidance: {"form": ..., "w_range": [low, high]} if w is an input; see `GuidanceEmbedding`.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        out_channels: int | None = None,
        dropout: float = 0.0,
        num_classes: int | None = None,
        text_width: int | None = None,
        inpainting: bool = False,
        guidance: Mapping[str, Any] | None = None,
    ) -> None:
        out_channels = out_channels or in_channels
        super().__init__(
            {
                "image_size": image_size, "in_channels": in_channels, "out_channels": out_channels, "patch": patch,
                "width": width, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio, "dropout": dropout,
                "num_classes": num_classes, "text_width": text_width, "inpainting": inpainting,
            }
        )  # fmt: skip
        if patch < 1 or image_size % patch:
            raise ValueError(f"patch={patch} does not divide image_size={image_size}")
        if heads < 1 or width % 4 or width % heads:
            raise ValueError(f"width={width} must be a multiple of 4 and of heads={heads}")
        self.patch, self.grid = patch, image_size // patch
        self.conditioning = Conditioning(TIME_FEATURES, width, num_classes, text_width)
        self.patch_in = nn.Linear(input_channels(in_channels, inpainting) * patch**2, width)
        self.register_buffer("positions", sincos_positions(self.grid, width))
        mlp_width = int(mlp_ratio * width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_width, dropout, text_width) for _ in range(depth))
        self.modulation_out = zeroed(nn.Linear(width, 2 * width))
        self.patch_out = zeroed(nn.Linear(width, out_channels * patch**2))
        self._initialise()
        self._guidance_from_config(guidance)

    def _initialise(self) -> None:
        """Xavier for the layers that do not start at zero, as the paper's code has it."""
        starting_at_zero = {self.patch_out, self.modulation_out, *(b.modulation for b in self.blocks)}
        starting_at_zero |= {m.project for m in self.blocks.modules() if isinstance(m, CrossAttention)}
        for module in (self.patch_in, *self.blocks.modules()):
            if isinstance(module, nn.Linear) and module not in starting_at_zero:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, z: Tensor, time: Tensor, cond: object = None, w: Tensor | float | None = None) -> Tensor:
        """The network's prediction for noisy images. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

        Shape: z (B, C, H, W), time (B,) in [0, 1000], cond labels (B,) or {"y": labels, "text": ...}, w (B,) -> as z.

        Raises:
            ValueError: an input is missing, superfluous or misshaped, or a label is out of range.
        """
        self._check(z, time)
        emb, text = self._embedding(time, cond, w)
        z = self._input(z, cond).to(self.patch_in.weight.dtype)
        x = self.patch_in(patchify(z, self.patch)) + self.positions
        for block in self.blocks:
            x = block(x, emb, text)
        shift, scale = self.modulation_out(emb).chunk(2, dim=1)
        return unpatchify(self.patch_out(layer_norm_modulate(x, scale, shift)), self.patch, self.grid)


def patchify(z: Tensor, patch: int) -> Tensor:
    """Shape: (B, C, H, W) -> (B, (H / p) (W / p), C p p), row by row."""
    b, c, height, width = z.shape
    cells = z.reshape(b, c, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch**2)


def unpatchify(tokens: Tensor, patch: int, grid: int) -> Tensor:
    """Shape: (B, g g, C p p) -> (B, C, g p, g p), the inverse of `patchify`."""
    b = tokens.shape[0]
    cells = tokens.reshape(b, grid, grid, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(b, -1, grid * patch, grid * patch)


def sincos_positions(grid: int, width: int) -> Tensor:
    """[sin | cos] of the row, then [sin | cos] of the column, a quarter of the width each. Shape: (g g, width)."""
    steps = torch.arange(grid, dtype=torch.float32)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.cat([sinusoidal(rows.flatten(), width // 2), sinusoidal(columns.flatten(), width // 2)], dim=1)
