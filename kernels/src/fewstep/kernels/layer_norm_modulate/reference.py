"""LayerNorm over the channels, then scale and shift per sample, in plain PyTorch; statistics in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.kernels.backend import register


@register("layer_norm_modulate", "reference")
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Compute `fewstep.kernels.layer_norm_modulate`, arguments checked."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (p.to(wide).reshape(len(x), *[1] * (x.ndim - 2), x.shape[-1]) for p in (scale, shift))
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    normed = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)
