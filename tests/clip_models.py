"""CLIP's text encoder and its tokenizer, small enough for tests, in the folders of a pipeline."""

from pathlib import Path
from typing import Any

import torch
from model_helpers import perturbed
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*LETTERS, *(f"{x}</w>" for x in LETTERS), "!", "!</w>", "2</w>", "'", "re</w>", "ed</w>", "red</w>"]
MERGES = [("r", "e</w>"), ("e", "d</w>"), ("r", "ed</w>")]
PROMPTS = ["", "a  Red B", "we're here!", "a b c a b c a b c a b", "ab 22 <|endoftext|> c"]


def clip_folder(folder: Path, padding: str = "<|endoftext|>", width: int = 12, **settings: Any) -> Path:
    """Write `text_encoder/` and `tokenizer/`: rows of 9 tokens of that width, every weight random."""
    tokens = [*VOCABULARY, "<|startoftext|>", "<|endoftext|>"]
    numbers = {token: i for i, token in enumerate(tokens)}
    given = {"vocab_size": len(tokens), "hidden_size": width, "intermediate_size": 20, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 9, "bos_token_id": len(tokens) - 2,
             "eos_token_id": len(tokens) - 1}  # fmt: skip
    torch.manual_seed(0)
    perturbed(CLIPTextModel(CLIPTextConfig(**(given | settings))), std=0.2).save_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizerFast(vocab=numbers, merges=MERGES, model_max_length=9, pad_token=padding)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder
