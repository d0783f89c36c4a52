"""GroupNorm, FiLM scale and shift, SiLU and residual in plain PyTorch; statistics in float32.

PyTorch's GroupNorm is used. On channels_last CPU tensors it takes the variance as E[x^2] - E[x]^2, which loses every
digit when the mean is large, so there it gets x minus its group means: as constants they change neither the result nor
any derivative, since GroupNorm(x - c) = GroupNorm(x).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.kernels.backend import register


def _group_mean(per_channel: Tensor, groups: int) -> Tensor:
    """Average channels within each group: (B, C) -> (B, C)."""
    grouped = per_channel.reshape(len(per_channel), groups, -1)
    return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(per_channel.shape)


def _spatial(per_channel: Tensor, x: Tensor) -> Tensor:
    """Shape (B, C) or (C,) to broadcast against x (B, C, ...)."""
    return per_channel.reshape(-1, x.shape[1], *[1] * (x.ndim - 2))


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise in the layout of x, whose statistics lose no digits in it; F.group_norm refuses groups of one value."""
    if x.numel() == len(x) * groups:                              # each value is its own mean
        x = x - x.detach()
    if not _is_channels_last(x):
        rows = x.flatten(2) if x.ndim > 2 else x                  # as 3-D it can only be taken for contiguous
        return torch.group_norm(rows, groups, weight, bias, eps).reshape(x.shape)
    if x.device.type == "cpu":
        x = x - _spatial(_group_mean(x.detach().mean((2, 3)), groups), x)
    return torch.group_norm(x, groups, weight, bias, eps).contiguous(memory_format=torch.channels_last)


def _film(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """y (1 + scale) + shift, in one pass where both are given."""
    if scale is not None and shift is not None:
        return torch.addcmul(_spatial(shift, y), y, _spatial(1 + scale, y))
    y = y if scale is None else y * _spatial(1 + scale, y)
    return y if shift is None else y + _spatial(shift, y)


@register("group_norm_silu", "reference")
def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, act: str | None, residual_at: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `fewstep.kernels.group_norm_silu`, arguments checked."""
    total = x if residual is None or residual_at == "after" else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    parameters = [None if p is None else p.to(wide) for p in (weight, bias, scale, shift)]
    y = _film(_group_norm(total.to(wide), groups, parameters[0], parameters[1], eps), parameters[2], parameters[3])
    if act == "silu":
        y = F.silu(y, inplace=not torch.is_grad_enabled())
    if residual is not None and residual_at == "after":
        y = y + residual
    y = y.to(x.dtype)
    return (y, total) if residual_at == "before" else y
