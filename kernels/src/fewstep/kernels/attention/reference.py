"""Attention in PyTorch: its fused operator, or plain products and softmax where that operator cannot serve."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.kernels.backend import register
from fewstep.kernels.forward_mode import forward_mode_is_on

# On the CPU the backward of PyTorch's operator takes 5 times as long in bfloat16 as in float32 with so few keys
# (AVX-512, torch 2.15: 26.5 to 5.8 ms at (64, 3, 64, 32), 27.4 to 4.8 ms at 24 keys; as long at 256 keys).
FEW_KEYS = 255


def _key_mask(key_lengths: Tensor, keys: int) -> Tensor:
    """Return (B, 1, 1, keys), true where a key counts."""
    return (torch.arange(keys, device=key_lengths.device) < key_lengths[:, None])[:, None, None]


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v in q's dtype and log-sum-exp (B, H, L), computed in float32 or wider always."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
        if key_lengths is not None:
            scores = scores.masked_fill(~_key_mask(key_lengths, k.shape[2]), float("-inf"))
        return (torch.softmax(scores, -1) @ v.to(wide)).to(q.dtype), torch.logsumexp(scores, -1)


@register("attention", "reference")
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `fewstep.kernels.attention`, arguments checked."""
    if return_lse:
        return plain(q, k, v, scale, key_lengths)
    if forward_mode_is_on():                                     # the fused operator has no forward mode
        return plain(q, k, v, scale, key_lengths)[0]
    mask = None if key_lengths is None else _key_mask(key_lengths, k.shape[2])
    if _faster_in_float32(q, k, v):
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, scale=scale).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _faster_in_float32(q: Tensor, k: Tensor, v: Tensor) -> bool:
    on_cpu = q.device.type == "cpu" and q.dtype.itemsize == 2 and k.shape[2] <= FEW_KEYS
    return on_cpu and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))


@register("attention_qkv", "reference")
def attention_qkv(
    qkv: Tensor, heads: int, scale: float, key_lengths: Tensor | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `fewstep.kernels.attention_qkv` from (B, L, 3 H D), arguments checked."""
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, heads, qkv.shape[2] // (3 * heads)).permute(2, 0, 3, 1, 4)
    result = attention(q, k, v, scale, key_lengths, return_lse)
    if isinstance(result, tuple):
        return result[0].transpose(1, 2).flatten(2), result[1]
    return result.transpose(1, 2).flatten(2)
