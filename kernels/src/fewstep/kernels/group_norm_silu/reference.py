"""GroupNorm, FiLM scale and shift, SiLU and residual in plain PyTorch; statistics in float32 by two passes.

PyTorch's GroupNorm is used where it is exact. On channels_last CPU tensors it takes the variance as E[x^2] - E[x]^2,
which loses every digit when the mean is large, so that layout has a two-pass form of its own, with its own backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.kernels.backend import register
from fewstep.kernels.forward_mode import forward_mode_is_on


def _group_mean(per_channel: Tensor, groups: int) -> Tensor:
    """Average channels within each group: (B, C) -> (B, C)."""
    grouped = per_channel.reshape(len(per_channel), groups, -1)
    return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(per_channel.shape)


def _spatial(per_channel: Tensor, x: Tensor) -> Tensor:
    """Shape (B, C) or (C,) to broadcast against x (B, C, ...)."""
    return per_channel.reshape(-1, x.shape[1], *[1] * (x.ndim - 2))


def _moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x - mean (B, C, H, W), mean and 1 / sqrt(variance + eps) of each channel's group (B, C), by two passes."""
    mean = _group_mean(x.mean((2, 3)), groups)
    centred = x - _spatial(mean, x)
    return centred, mean, torch.rsqrt(_group_mean(centred.square().mean((2, 3)), groups) + eps)


class _ChannelsLast(torch.autograd.Function):
    """y = (x - mean) rstd gain + offset with gain and offset (B, C); returns y and the statistics."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        centred, mean, rstd = _moments(x, groups, eps)
        return torch.addcmul(_spatial(offset, x), centred, _spatial(rstd * gain, x)), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gain, _, ctx.groups, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, gain, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, mean, rstd = ctx.saved_tensors
        centred = x - _spatial(mean, x)
        if torch.is_grad_enabled():                               # differentiated twice: statistics as functions of x
            centred, mean, rstd = _moments(x, ctx.groups, ctx.eps)
        d_offset = dy.sum((2, 3))
        d_gain = (dy * centred).sum((2, 3)) * rstd
        pixels = x.shape[2] * x.shape[3]
        from_mean = _group_mean(d_offset * gain, ctx.groups) / pixels
        from_rstd = _group_mean(d_gain * gain, ctx.groups) / pixels
        dx = torch.addcmul(_spatial(-rstd * from_mean, x), dy, _spatial(rstd * gain, x))
        dx = torch.addcmul(dx, centred, _spatial(-rstd.square() * from_rstd, x))
        return dx, d_gain, d_offset, None, None


def _film(weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, x: Tensor
          ) -> tuple[Tensor, Tensor]:
    """Fold weight, bias, 1 + scale and shift into gain and offset (B, C): (w n + b) (1 + scale) + shift."""
    gain = x.new_ones(x.shape[1]) if weight is None else weight
    offset = x.new_zeros(x.shape[1]) if bias is None else bias
    if scale is not None:
        gain, offset = gain * (1 + scale), offset * (1 + scale)
    if shift is not None:
        offset = offset + shift
    return gain.expand(x.shape[:2]), offset.expand(x.shape[:2])


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _normalize(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
               scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if _is_channels_last(x):
        gain, offset = _film(weight, bias, scale, shift, x)
        if not forward_mode_is_on():
            y: Tensor = _ChannelsLast.apply(x, gain, offset, groups, eps)[0]
            return y
        centred, _, rstd = _moments(x, groups, eps)
        return torch.addcmul(_spatial(offset, x), centred, _spatial(rstd * gain, x))
    rows = x.flatten(2) if x.ndim > 2 else x                      # as 3-D it can only be taken for contiguous
    if scale is None and shift is None:
        return F.group_norm(rows, groups, weight, bias, eps).reshape(x.shape)
    gain, offset = _film(weight, bias, scale, shift, x)
    normal = F.group_norm(rows, groups, None, None, eps).reshape(x.shape)
    return torch.addcmul(_spatial(offset, x), normal, _spatial(gain, x))


@register("group_norm_silu", "reference")
def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, act: str | None, residual_at: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `fewstep.kernels.group_norm_silu`, arguments checked."""
    total = x if residual is None or residual_at == "after" else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    parameters = [None if p is None else p.to(wide) for p in (weight, bias, scale, shift)]
    y = _normalize(total.to(wide), groups, parameters[0], parameters[1], eps, parameters[2], parameters[3])
    if act == "silu":
        y = F.silu(y, inplace=not torch.is_grad_enabled())
    if residual is not None and residual_at == "after":
        y = y + residual
    y = y.to(x.dtype)
    return (y, total) if residual_at == "before" else y
