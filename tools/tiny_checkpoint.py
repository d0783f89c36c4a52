"""A checkpoint of diffusers with random weights, to try an experiment that distils one; nothing is downloaded.

    python tools/tiny_checkpoint.py stable-diffusion FOLDER          32x32x3 pictures with captions
    python tools/tiny_checkpoint.py dit FOLDER                       16x16x1 pictures of 10 classes
    python tools/tiny_checkpoint.py stable-diffusion FOLDER --full   settings of the real size, without weights

Both predict eps in the latents of an autoencoder, as the real ones do. --full is for
`packages/lab/benchmarks/step_cost.py`: Stable Diffusion 1.5 and DiT-XL/2 at 256x256, from their published settings.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from fewstep.models import ClipTextEncoder
from fewstep.models.clip_encoder import END, START, ClipTokenizer, description_of

SCHEDULERS: dict[str, dict[str, Any]] = {
    "stable-diffusion": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                         "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "dit": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "stable-diffusion": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 2,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 12,
    },
    "dit": {
        "sample_size": 4, "in_channels": 4, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8,
        "num_layers": 1, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_eps": 1e-6,
    },
}  # fmt: skip
FULL: dict[str, dict[str, Any]] = {
    "stable-diffusion": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "dit": {
        "sample_size": 32, "in_channels": 4, "out_channels": 8, "num_attention_heads": 16, "attention_head_dim": 72,
        "num_layers": 28, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_eps": 1e-6,
    },
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (8,) * 3, "down_block_types": ("DownEncoderBlock2D",) * 3, "norm_num_groups": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "latent_channels": 4, "layers_per_block": 1, "scaling_factor": 0.18215,
}  # fmt: skip
Module = TypeVar("Module", bound=nn.Module)
CLASSES = {"stable-diffusion": UNet2DConditionModel, "dit": DiTTransformer2DModel}
PARTS = {"stable-diffusion": "unet", "dit": "transformer"}


def main() -> int:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(CLASSES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="settings of the real size, without weights")
    args = parser.parse_args()
    (settings if args.full else checkpoint)(args.kind, args.folder)
    print(args.folder)
    return 0


def checkpoint(kind: str, folder: Path) -> None:
    """Write the network, its scheduler and autoencoder and, of text, CLIP's encoder: every weight random."""
    torch.manual_seed(0)
    scattered(CLASSES[kind](**TINY[kind])).save_pretrained(folder / PARTS[kind])
    DDIMScheduler(**SCHEDULERS[kind]).save_pretrained(folder / "scheduler")
    channels = 3 if kind == "stable-diffusion" else 1
    scattered(AutoencoderKL(in_channels=channels, out_channels=channels, **VAE)).save_pretrained(folder / "vae")
    if kind == "stable-diffusion":
        text_encoder().write(folder)


def settings(kind: str, folder: Path) -> None:
    """Write what the real network and scheduler are, without weights."""
    with torch.device("meta"):
        CLASSES[kind](**FULL[kind]).save_config(folder / PARTS[kind])
    DDIMScheduler(**SCHEDULERS[kind]).save_pretrained(folder / "scheduler")


def text_encoder() -> ClipTextEncoder:
    """CLIP's architecture, on single bytes."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    tokenizer = ClipTokenizer(description_of({token: i for i, token in enumerate(tokens)}, []), len(tokens) - 1)
    small = {"vocab_size": len(tokens), "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "max_position_embeddings": 77}
    encoder = ClipTextEncoder({"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **small}, tokenizer)
    return scattered(encoder)


def scattered(module: Module) -> Module:
    """The module with noise on every weight: nothing is hidden behind a zero."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return module


if __name__ == "__main__":
    sys.exit(main())
