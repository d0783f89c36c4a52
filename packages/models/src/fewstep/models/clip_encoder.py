"""CLIP's text encoder (arXiv 2103.00020) as Stable Diffusion uses it, from the folders of its pipeline and back.

The library `transformers` writes those folders and is not needed to read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.models.files import as_bytes
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tokenizer import tokenizers_library

MODEL, TOKENIZER = "text_encoder", "tokenizer"  # their folders in a pipeline's
WEIGHTS = "model.safetensors"
PREFIX = "text_model."  # of its weights in most checkpoints
START, END = "<|startoftext|>", "<|endoftext|>"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu,
}  # fmt: skip
SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps",
)  # fmt: skip
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """CLIP's byte-pair encoding, lower case, by the `tokenizers` library (extra `[text]`).

    description: what `tokenizers` writes as tokenizer.json. padding: the number that fills up a row.
    """

    def __init__(self, description: Mapping[str, Any], padding: int) -> None:
        self._tokenizer: Any = tokenizers_library().Tokenizer.from_str(json.dumps(description))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.start, self.end = (self._tokenizer.token_to_id(token) for token in (START, END))
        if self.start is None or self.end is None:
            raise ValueError(f"the vocabulary lacks {START} or {END}: it is none of CLIP's")
        self.padding = padding

    @classmethod
    def read(cls, folder: Path) -> ClipTokenizer:
        """From tokenizer.json, or vocab.json and merges.txt, and what else says which token fills up rows.

        Raises:
            FileNotFoundError: neither is there.
            ValueError: a file is damaged, or no tokenizer of CLIP's.
        """
        if (folder / "tokenizer.json").is_file():
            description = _read_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
            description = description_of(_read_json(folder / "vocab.json"), merges)
        else:
            raise FileNotFoundError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt")
        try:
            tokenizer = cls(description, 0)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{folder}: no tokenizer of CLIP's: {error}") from None
        tokenizer.padding = tokenizer._number(_padding_token(folder))
        return tokenizer

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens, without start and end."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, numbers: Iterable[int]) -> str:
        """The text again, in lower case."""
        tokens = (self._tokenizer.id_to_token(number) or "" for number in numbers)
        return "".join(tokens).replace("</w>", " ").strip()

    def to_config(self) -> dict[str, Any]:
        """What `ClipTextEncoder.from_settings` makes it of, JSON-able."""
        return {"type": "clip", "tokenizer": json.loads(self._tokenizer.to_str()), "padding": self.padding}

    def _number(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"pad_token {token!r} is not in the vocabulary")
        return int(found)


class _Attention(nn.Module):
    """Causal self-attention under the names that transformers gives its weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, L, D) -> (B, L, D)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out_proj(found.transpose(1, 2).flatten(2))
        return out


class _Layer(nn.Module):
    """Attention and MLP, each after a normalisation."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner, eps = (settings[key] for key in ("hidden_size", "intermediate_size", "layer_norm_eps"))
        self.self_attn = _Attention(width, settings["num_attention_heads"])
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self._activation = ACTIVATIONS[settings["hidden_act"]]

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        added: Tensor = self.mlp["fc2"](self._activation(self.mlp["fc1"](self.layer_norm2(x))))
        return x + added


class _Embeddings(nn.Module):
    """Tokens and their places."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(settings["vocab_size"], settings["hidden_size"])
        self.position_embedding = nn.Embedding(settings["max_position_embeddings"], settings["hidden_size"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape: (B, L) -> (B, L, D)."""
        x: Tensor = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        return x


class _Layers(nn.Module):
    """The transformer."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(settings) for _ in range(settings["num_hidden_layers"]))

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, L, D) -> (B, L, D)."""
        for layer in self.layers:
            x = layer(x)
        return x


class ClipTextEncoder(TextEncoder):
    """CLIP's text transformer: {"text": (B, L, D)}, what a UNet2DConditionModel of Stable Diffusion takes.

    Its last hidden state, normalised; the rows of a batch are filled up and nothing is masked, as in the pipelines.
    It is never trained here. The empty prompt stands for no condition.

    Args:
        settings: `SETTINGS` of the config that transformers writes.
        tokenizer: of its vocabulary.

    Raises:
        ValueError: a setting is missing or unknown, or the tokenizer knows more tokens than the model.
    """

    format = "fewstep-clip-text-encoder"

    def __init__(self, settings: Mapping[str, Any], tokenizer: ClipTokenizer) -> None:
        nn.Module.__init__(self)  # and not that of TextEncoder, which builds another transformer
        missing = [key for key in SETTINGS if key not in settings]
        if missing:
            raise ValueError(f"settings of CLIP's text encoder lack {', '.join(missing)}")
        if settings["hidden_act"] not in ACTIVATIONS:
            raise ValueError(f"hidden_act={settings['hidden_act']!r}: must be one of {', '.join(ACTIVATIONS)}")
        if tokenizer.size > settings["vocab_size"]:
            raise ValueError(f"vocab_size={settings['vocab_size']}: the tokenizer has {tokenizer.size} tokens")
        self.tokenizer: ClipTokenizer = tokenizer
        self.config = {key: settings[key] for key in SETTINGS}
        self.width, self.length = settings["hidden_size"], settings["max_position_embeddings"]
        self.embeddings, self.encoder = _Embeddings(settings), _Layers(settings)
        self.final_layer_norm = nn.LayerNorm(self.width, settings["layer_norm_eps"])

    @classmethod
    def read(cls, folder: Path, *, weights: bool = True) -> ClipTextEncoder:
        """From `text_encoder/` and `tokenizer/` of a pipeline's folder; weights=False: settings, on the meta device.

        Raises:
            FileNotFoundError: a folder or file is missing.
            ValueError: another model than CLIP's, or a file is damaged.
        """
        place = folder / MODEL
        if not (place / "config.json").is_file():
            raise FileNotFoundError(f"{place / 'config.json'} is missing: the folder must hold CLIP's text encoder")
        settings, tokenizer = _read_json(place / "config.json"), ClipTokenizer.read(folder / TOKENIZER)
        if settings.get("model_type") != "clip_text_model":
            raise ValueError(f"{place}: a text encoder of type {settings.get('model_type')!r}; CLIP's alone is known")
        defaults = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
        with torch.device("cpu" if weights else "meta"):
            encoder = cls(defaults | settings, tokenizer)
        if weights:
            encoder._read_weights(place / WEIGHTS)
        return encoder.eval().requires_grad_(False)

    def write(self, folder: Path) -> None:
        """The folders that `read` reads, and transformers."""
        names = (MODEL, TOKENIZER)
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
        made: dict[str, Any] = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
        made |= {"bos_token_id": self.tokenizer.start, "eos_token_id": self.tokenizer.end, **self.config}
        (folder / MODEL / "config.json").write_text(json.dumps(made, indent=2) + "\n")
        weights = {PREFIX + name: weight for name, weight in self.state_dict().items()}
        (folder / MODEL / WEIGHTS).write_bytes(as_bytes(weights))
        described = self.tokenizer.to_config()["tokenizer"]
        padding = self.tokenizer._tokenizer.id_to_token(self.tokenizer.padding)
        said = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, "bos_token": START,
                "eos_token": END, "unk_token": END, "pad_token": padding}  # fmt: skip
        model = described["model"]
        merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        files = {"tokenizer.json": described, "tokenizer_config.json": said, "vocab.json": model["vocab"]}
        for name, content in files.items():
            (folder / TOKENIZER / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / TOKENIZER / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"tokens": (B, L) int64}, on the CPU. A prompt that is too long is cut, and a warning says what was lost."""
        tokens = torch.full((len(prompts), self.length), self.tokenizer.padding)
        long: list[tuple[str, list[int], int]] = []
        for i, prompt in enumerate(prompts):
            numbers = self.tokenizer.encode(prompt)
            kept = numbers[: self.length - 2]
            if len(numbers) > len(kept):
                long.append((prompt, numbers, len(kept)))
            tokens[i, : len(kept) + 2] = torch.tensor([self.tokenizer.start, *kept, self.tokenizer.end])
        if long:
            self._warn(*long[0], more=len(long) - 1)
        return {"tokens": tokens}

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings of tokens. Shape: tokens (B, L) integers -> (B, L, D).

        Raises:
            ValueError: a mask, for which it has no use.
        """
        if mask is not None:
            raise ValueError("CLIP's text encoder masks nothing: mask must be None")
        text: Tensor = self.final_layer_norm(self.encoder(self.embeddings(tokens)))
        return text

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.final_layer_norm.weight.device

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ClipTextEncoder:
        """Freshly initialised, of what `save` wrote in config.json."""
        described = settings["tokenizer"]
        return cls(settings["encoder"], ClipTokenizer(described["tokenizer"], described["padding"]))

    def _read_weights(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: weights are read from safetensors alone")
        try:
            found = {name.removeprefix(PREFIX): weight for name, weight in safetensors.torch.load_file(path).items()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
        found.pop("embeddings.position_ids", None)  # 0, 1, 2, ... in older checkpoints
        try:
            self.load_state_dict({name: weight.float() for name, weight in found.items()})
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit its config.json: {' '.join(str(error).split())}") from None


def description_of(vocabulary: Mapping[str, int], merges: list[list[str]]) -> dict[str, Any]:
    """tokenizer.json of CLIP's tokenizer with this vocabulary."""
    tokens = [
        {"id": vocabulary.get(token), "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for token in (START, END) if token in vocabulary
    ]  # fmt: skip
    space = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Removed", "invert": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": "",
             "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": dict(vocabulary), "merges": merges}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, space, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
        "decoder": level | {"add_prefix_space": True}, "model": model,
    }  # fmt: skip


def _padding_token(folder: Path) -> str:
    """What fills up rows: Stable Diffusion 1's is the end of the text, 2's an exclamation mark."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = _read_json(folder / name).get("pad_token") if (folder / name).is_file() else None
        if said is not None:
            return str(said["content"] if isinstance(said, dict) else said)
    return END


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings: it must be a JSON object")
    return found
