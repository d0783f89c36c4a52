"""From words to token numbers: bytes as they are, or pairs of bytes merged as a text corpus teaches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

PADDING, END = 0, 1  # numbers of every tokenizer here: what fills up a row, and what ends a prompt
RESERVED = 2


class Tokenizer(Protocol):
    """What `TextEncoder` asks of a tokenizer. Numbers are from RESERVED to size - 1."""

    @property
    def size(self) -> int:
        """How many numbers there are, the reserved ones included."""

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens."""

    def decode(self, numbers: Iterable[int]) -> str:
        """The text again."""

    def to_config(self) -> dict[str, Any]:
        """What `tokenizer_from_config` makes it of, JSON-able."""


class ByteTokenizer:
    """A token for each byte of UTF-8: knows every text, needs nothing, and makes long rows."""

    size = 256 + RESERVED

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's bytes."""
        return [byte + RESERVED for byte in text.encode()]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text again; half a character is a replacement character."""
        return bytes(number - RESERVED for number in numbers).decode(errors="replace")

    def to_config(self) -> dict[str, Any]:
        """Its type alone."""
        return {"type": "bytes"}


class BPETokenizer:
    """Byte-pair encoding by the `tokenizers` library (extra `[text]`); knows every text, since it starts from bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 512) -> BPETokenizer:
        """Learn at most `size` tokens, of which 258 are the bytes and the reserved ones, from a corpus.

        Raises:
            ValueError: size is less than 258.
            ImportError: `tokenizers` is missing.
        """
        if size < 256 + RESERVED:
            raise ValueError(f"size={size}: must be at least {256 + RESERVED}, every byte and {RESERVED} reserved")
        library = tokenizers_library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(
            vocab_size=size - RESERVED, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @property
    def size(self) -> int:
        """How many numbers there are, the reserved ones included."""
        return int(self._tokenizer.get_vocab_size()) + RESERVED

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens."""
        return [number + RESERVED for number in self._tokenizer.encode(text).ids]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text again."""
        return str(self._tokenizer.decode([number - RESERVED for number in numbers]))

    def to_config(self) -> dict[str, Any]:
        """Vocabulary and merges as the library writes them."""
        return {"type": "bpe", "tokenizer": json.loads(self._tokenizer.to_str())}


def tokenizer_from_config(config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_config` described.

    Raises:
        ValueError: unknown type, or not what the library wrote.
        ImportError: it is a BPE one and `tokenizers` is missing.
    """
    if config.get("type") == "bytes":
        return ByteTokenizer()
    if config.get("type") != "bpe":
        raise ValueError(f"tokenizer type {config.get('type')!r} is unknown: use 'bytes' or 'bpe'")
    library = tokenizers_library()
    try:
        return BPETokenizer(library.Tokenizer.from_str(json.dumps(config.get("tokenizer"))))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer: not what the tokenizers library writes: {error}") from None


def tokenizers_library() -> Any:
    """The library `tokenizers`.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError("a BPE tokenizer needs `tokenizers`: pip install 'fewstep-models[text]'") from error
    return tokenizers
