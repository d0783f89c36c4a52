"""Prompts as the condition of a network: a small transformer over their tokens."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.kernels import attention_qkv
from fewstep.models.embedding import sinusoidal
from fewstep.models.files import VERSION, digest_of, read_folder, write_folder
from fewstep.models.tokenizer import END, PADDING, Tokenizer, tokenizer_from_config

FORMAT = "fewstep-text-encoder"
STD = 0.02  # of embeddings of tokens and of positions, at first


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each after a normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Shape: x (B, L, D), lengths (B,) -> (B, L, D)."""
        x = x + self.project(attention_qkv(self.qkv(self.norm1(x)), self.heads, key_lengths=lengths))
        added: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh"))
        return x + added


class TextEncoder(nn.Module):
    """A transformer whose output is the condition {"text": (B, L, D), "text_mask": (B, L)} of a UNet or DiT.

    Every prompt ends in an end token, so the empty prompt, which stands for no condition, is that token alone. What
    lies behind it is masked, and zero.

    Args:
        tokenizer: `ByteTokenizer()`, `BPETokenizer.train(...)`, or another with their methods.
        width: channels D of an embedding: the network's `text_width`.
        depth: number of blocks.
        heads: attention heads, a divisor of width.
        length: L, most tokens of a prompt with its end.

    Raises:
        ValueError: heads do not divide width, or length is less than 2.
    """

    format = FORMAT

    def __init__(self, tokenizer: Tokenizer, width: int = 64, depth: int = 2, heads: int = 4, length: int = 32) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        if length < 2:
            raise ValueError(f"length={length}: must be at least 2, a token and the end")
        self.tokenizer, self.width, self.length = tokenizer, width, length
        self.config = {"width": width, "depth": depth, "heads": heads, "length": length}
        self.tokens = nn.Embedding(tokenizer.size, width)
        nn.init.normal_(self.tokens.weight, std=STD)
        # Waves (arXiv 1706.03762, section 3.5) to begin with: which of two words comes first is learned three times as
        # fast as from random positions, and until it is, "a left of b" is "b left of a".
        waves = sinusoidal(torch.arange(length), width + width % 2)[:, :width]
        self.positions = nn.Parameter(STD * math.sqrt(2) * waves)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"tokens": (B, L) int64, "text_mask": (B, L) bool}, on the CPU: what `forward` takes.

        A prompt that is too long is cut, and a warning says what was lost (of the first, and how many there are).
        """
        long: list[tuple[str, list[int], int]] = []
        tokens = torch.full((len(prompts), self.length), PADDING)
        lengths = torch.empty(len(prompts), dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            numbers = self.tokenizer.encode(prompt)
            kept = numbers[: self.length - 1]
            if len(numbers) > len(kept):
                long.append((prompt, numbers, len(kept)))
            tokens[i, : len(kept) + 1] = torch.tensor([*kept, END])
            lengths[i] = len(kept) + 1
        if long:
            self._warn(*long[0], more=len(long) - 1)
        return {"tokens": tokens, "text_mask": torch.arange(self.length) < lengths[:, None]}

    def _warn(self, prompt: str, numbers: list[int], kept: int, more: int) -> None:
        lost = self.tokenizer.decode(numbers[kept:])
        text = (
            f"prompt {prompt!r} has {len(numbers)} tokens, more than the {kept} that this encoder reads: "
            f"{lost!r} was cut off" + (f"; so were the ends of {more} other prompts" if more else "")
        )
        warnings.warn(text, stacklevel=4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of tokens; zero where the mask is. Shape: tokens (B, L) integers, mask (B, L) -> (B, L, D)."""
        lengths = mask.sum(1)
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, lengths)
        text: Tensor = self.norm_out(x) * mask[..., None]
        return text

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts as a condition, on the encoder's device; a warning names what of a long prompt was cut.

        Shape: B prompts -> {"text": (B, L, D), "text_mask": (B, L) bool}.

        Raises:
            ValueError: no list of texts.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a list of texts, got {prompts!r}")
        found = {name: tensor.to(self.device) for name, tensor in self.tokenize(prompts).items()}
        text = {"text": self(found.pop("tokens"), found.get("text_mask"))}
        return {**text, **found}

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.positions.device

    @property
    def null_cond(self) -> dict[str, Tensor]:
        """The empty prompt: {"text": (L, D), "text_mask": (L,)}, without gradient."""
        with torch.no_grad():
            return {name: tensor[0] for name, tensor in self.encode([""]).items()}

    @property
    def null_tokens(self) -> dict[str, Tensor]:
        """The empty prompt before it is embedded: {"tokens": (L,), "text_mask": (L,)}, to train with."""
        return {name: tensor[0] for name, tensor in self.tokenize([""]).items()}

    @property
    def digest(self) -> str:
        """SHA-256 of weights, settings and tokenizer: two encoders are alike exactly when these are."""
        header = {"format": self.format, "version": VERSION, "sha256": digest_of(self.state_dict())}
        return hashlib.sha256(json.dumps(header | self._settings(), sort_keys=True).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`: `model.safetensors`, and `config.json` with settings and tokenizer.

        The latter is written last and holds the checksum of the former: a folder that is half written is refused.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(folder, self.format, self._settings(), self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> TextEncoder:
        """Read what `save` wrote, in eval mode; nothing in the files is ever executed.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is damaged, of another format, or does not fit.
            ImportError: its tokenizer needs the extra `[text]`.
        """
        folder = Path(path)
        try:
            settings, weights = read_folder(folder, cls.format)
            encoder = cls.from_settings(settings)
            encoder.load_state_dict(weights)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{folder} does not hold a text encoder: {error}") from None
        return encoder.to(device).eval()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TextEncoder:
        """Freshly initialised, of what `save` wrote in config.json."""
        return cls(tokenizer_from_config(settings["tokenizer"]), **settings["encoder"])

    def _settings(self) -> dict[str, Any]:
        return {"encoder": self.config, "tokenizer": self.tokenizer.to_config()}
