"""CLIP score: how well images show what their prompts say (Hessel et al. 2021), by a CLIP of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.lab.config import ConfigError
from fewstep.lab.parts import digest_of
from fewstep.lab.pictures import to_levels


@dataclass(frozen=True)
class ClipScore:
    """model, tokenizer, processor: of one CLIP."""

    model: Any
    tokenizer: Any
    processor: Any
    device: torch.device

    @classmethod
    def load(cls, folder: str, device: torch.device) -> ClipScore:
        """A folder that `save_pretrained` wrote, or the name of one in the hub's cache; nothing is downloaded.

        Raises:
            ConfigError: not there, no CLIP, or weights that are a pickle.
            ImportError: `transformers` is not installed.
        """
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast  # type: ignore[attr-defined]  # made as it is asked for
        except ImportError as error:
            raise ImportError("the CLIP score needs transformers: pip install 'fewstep-lab[clip]'") from error
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
            processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            right = "a folder of transformers' CLIP with model.safetensors, or the name of one in the hub's cache"
            raise ConfigError(f"--clip {folder}: must be {right} ({str(error).splitlines()[0]})") from error
        return cls(model.eval().requires_grad_(False).to(device), tokenizer, processor, device)

    @cached_property
    def weights(self) -> str:
        """Digest of the weights."""
        return digest_of({name: tensor.cpu() for name, tensor in self.model.state_dict().items()})

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of images (B, C, H, W), C 1 or 3, in [-1, 1], and their prompts; their mean is what papers give.

        Raises ValueError where there are not as many prompts as images.
        """
        if len(images) != len(prompts):
            raise ValueError(f"each image has one prompt, got {len(images)} images and {len(prompts)} prompts")
        seen = self.processor(images=list(to_levels(images).cpu()), return_tensors="pt").to(self.device)
        said = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            found = self.model(**seen, **said)
            return torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds).float().cpu()
