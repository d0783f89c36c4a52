"""diffusers models and schedulers small enough for tests, every weight of which counts."""

from typing import Any

import diffusers
import torch
from model_helpers import perturbed

STABLE_DIFFUSION = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
}  # fmt: skip
CLASSES, TOKENS, TEXT_WIDTH = 5, 6, 12


def ddpm(prediction: str = "epsilon", **settings: Any) -> diffusers.DDPMScheduler:
    """A scheduler as teachers are trained with."""
    return diffusers.DDPMScheduler(prediction_type=prediction, **(STABLE_DIFFUSION | settings))


def unet(**settings: Any) -> diffusers.UNet2DModel:
    """8x8x3, two levels, with classes unless told otherwise."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "attention_head_dim": 8, "num_class_embeds": CLASSES + 1,
    }  # fmt: skip
    return perturbed(diffusers.UNet2DModel(**(given | settings))).eval()


def text_unet(**settings: Any) -> diffusers.UNet2DConditionModel:
    """8x8x4, cross-attention to TOKENS embeddings."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": TEXT_WIDTH,
    }  # fmt: skip
    return perturbed(diffusers.UNet2DConditionModel(**(given | settings))).eval()


def dit(**settings: Any) -> diffusers.DiTTransformer2DModel:
    """8x8x3 in patches of 2, with a learned variance."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 2,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": CLASSES, "norm_eps": 1e-6,
    }  # fmt: skip
    return perturbed(diffusers.DiTTransformer2DModel(**(given | settings)), std=0.1).eval()


def vae(**settings: Any) -> diffusers.AutoencoderKL:
    """Images of 3 channels to latents of 4, f = 2."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "layers_per_block": 1, "sample_size": 16,
        "scaling_factor": 0.5,
    }  # fmt: skip
    return perturbed(diffusers.AutoencoderKL(**(given | settings))).eval()


MODELS = {"UNet2DModel": unet, "UNet2DConditionModel": text_unet, "DiTTransformer2DModel": dit}


def text(batch: int, seed: int = 0) -> torch.Tensor:
    """Embeddings (B, TOKENS, TEXT_WIDTH) of as many prompts."""
    return torch.randn(batch, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def null_text() -> torch.Tensor:
    """The embedding (TOKENS, TEXT_WIDTH) of the empty prompt."""
    return text(1, seed=9)[0]


def inputs(kind: str, batch: int = 3) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    """(z, cond for a denoiser, the same for diffusers)."""
    channels = 4 if kind == "UNet2DConditionModel" else 3
    z = torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    if kind == "UNet2DConditionModel":
        return z, {"text": text(batch)}, {"encoder_hidden_states": text(batch)}
    y = torch.arange(batch) + 1
    return z, y, {"class_labels": y}
