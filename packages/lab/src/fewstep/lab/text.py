"""Captions as conditions: the encoder learns together with the teacher, and is frozen from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill import Method
from fewstep.lab.config import Config, ConfigError, TextConfig
from fewstep.lab.data import Split, load_data
from fewstep.lab.thumbnails import Thumbnails
from fewstep.models import BPETokenizer, ByteTokenizer, NetworkDenoiser, TextEncoder
from fewstep.schedules import Cond

PRETRAINED = "pretrained"
TOKENIZERS = ("bytes", "bpe", PRETRAINED)
MEMORY = 2**31  # bytes of embeddings that every process keeps in memory, at most; of more captions they are made anew
CHUNK = 128  # captions that are embedded at once


class Prompted(nn.Module):
    """A denoiser whose condition is tokens, and the encoder of these: what the teacher's training trains.

    Dropping a condition leaves the tokens of the empty prompt, so what stands for no text is learned too.
    """

    def __init__(self, denoiser: NetworkDenoiser, encoder: TextEncoder) -> None:
        super().__init__()
        self.denoiser, self.encoder, self.schedule = denoiser, encoder, denoiser.schedule  # optimisers keep this order

    @property
    def takes_mask(self) -> bool:
        """Whether the denoiser is for inpainting."""
        return self.denoiser.takes_mask

    @property
    def null_cond(self) -> dict[str, Tensor]:
        """The empty prompt's tokens."""
        device = self.encoder.positions.device
        return {name: tensor.to(device) for name, tensor in self.encoder.null_tokens.items()}

    def forward(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Tensor:
        """The estimate of x. Shape: z (B, C, H, W), t (B,), cond {"tokens", "text_mask"} (B, L) -> (B, C, H, W).

        What else cond holds, such as a mask, goes to the denoiser.
        """
        assert isinstance(cond, Mapping)  # as TextSplit gives it
        given = dict(cond)
        text = self.encoder(given.pop("tokens"), given["text_mask"])
        estimate: Tensor = self.denoiser(z, t, {**given, "text": text}, w)
        return estimate


@dataclass(frozen=True)
class TextSplit(Split):
    """A captioned split whose condition is tokens, masked or not, or embeddings of them by a frozen encoder.

    rows: (N,), the place of each image's caption among the U different ones. tokens, mask: (U, L) of these. texts:
    (U, L, D), their embeddings; None: they are made batch by batch.
    """

    rows: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    encoder: TextEncoder | None = None
    texts: Tensor | None = None

    def take(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Cond]:
        """Images (B, C, H, W) and conditions at `indices` (B,)."""
        assert self.rows is not None  # `conditioned` makes it
        assert self.tokens is not None
        images, indices = self.visit(indices, seeds)
        rows = self.rows.index_select(0, indices)
        mask = None if self.mask is None else self.mask.index_select(0, rows)
        masked = {} if mask is None else {"text_mask": mask}
        if self.texts is not None:
            return images, {"text": self.texts.index_select(0, rows), **masked}
        tokens = self.tokens.index_select(0, rows)
        if self.encoder is None:
            return images, {"tokens": tokens, **masked}
        with torch.no_grad():
            return images, {"text": self.encoder(tokens, mask), **masked}

    def to(self, device: torch.device) -> TextSplit:
        """The same on another device; the encoder is where its denoiser is."""
        held = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {name: value.to(device) for name, value in held if isinstance(value, Tensor)}
        return replace(self, **moved)


def new_encoder(config: TextConfig, captions: Sequence[str]) -> TextEncoder:
    """A freshly initialised encoder; a BPE tokenizer learns from these captions."""
    tokenizer = BPETokenizer.train(captions, config.vocabulary) if config.tokenizer == "bpe" else ByteTokenizer()
    return TextEncoder(tokenizer, config.width, config.depth, config.heads, config.length)


def encoder_for(config: Config) -> TextEncoder:
    """A freshly initialised encoder for an experiment of text, which `validate` allows with captioned data alone."""
    captions = load_data(config.data).train.captions
    assert config.text is not None
    assert captions is not None
    return new_encoder(config.text, captions)


def conditioned(split: Split, *networks: object) -> Split:
    """The split as these networks are to be trained or tried on it: with text where one of them takes text."""
    if split.captions is None:
        return split
    for network in networks:
        if isinstance(network, Prompted | Thumbnails):
            return _with_tokens(split, network.encoder, None)
        encoder = getattr(network, "text_encoder", None)
        if encoder is not None:
            return _with_tokens(split, encoder, encoder)
    return split


def for_method(split: Split, method: Method) -> Split:
    """The split as `method` trains on it; the judge, which has no text, gets classes."""
    return conditioned(split, *networks_of(method))


def networks_of(method: Method) -> tuple[object, ...]:
    """What takes a condition in a method's training: its teacher, or None, and what it trains."""
    return getattr(method, "teacher", None), *method.networks.values()


def _with_tokens(split: Split, tokenizing: TextEncoder, embedding: TextEncoder | None) -> TextSplit:
    assert split.captions is not None  # `conditioned` asked
    places = {caption: row for row, caption in enumerate(dict.fromkeys(split.captions))}
    rows, different = torch.tensor([places[caption] for caption in split.captions]), tuple(places)
    found = tokenizing.tokenize(different)
    tokens, mask = found["tokens"], found.get("text_mask")
    texts = None if embedding is None else _embedded(_Texts(embedding.digest, different, embedding, tokens, mask))
    return TextSplit(
        split.images, split.labels, split.captions, split.flips, rows, tokens, mask, embedding, texts
    )


@dataclass(frozen=True)
class _Texts:
    """Captions and an encoder, which are what they are by its digest; and their tokens (U, L)."""

    digest: str
    captions: tuple[str, ...]
    encoder: TextEncoder = field(compare=False)
    tokens: Tensor = field(compare=False)
    mask: Tensor | None = field(compare=False)


@lru_cache(maxsize=1)  # one training after the other asks for the same
@torch.no_grad()
def _embedded(texts: _Texts) -> Tensor | None:
    """Embeddings (U, L, D) on the CPU, in chunks that are those of every process; None if they take too much memory."""
    encoder, tokens, mask = texts.encoder, texts.tokens, texts.mask
    found = torch.empty(*tokens.shape, encoder.width, device="meta")
    if found.nbytes > MEMORY:
        return None
    found = torch.empty_like(found, device="cpu")
    for start in range(0, len(tokens), CHUNK):
        part = slice(start, start + CHUNK)
        shown = None if mask is None else mask[part].to(encoder.device)
        found[part] = encoder(tokens[part].to(encoder.device), shown)
    return found


def encoder_of(denoiser: object) -> TextEncoder:
    """The encoder that a denoiser carries.

    Raises:
        ConfigError: it carries none.
    """
    encoder: TextEncoder | None = getattr(denoiser, "text_encoder", None)
    if encoder is None:
        raise ConfigError("prompt: this model was saved without a text encoder")
    return encoder
