"""Non-causal attention, self and cross, from separate heads or from the packed projection of a UNet or DiT block."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fewstep.kernels.attention import fused, reference  # noqa: F401  # they register themselves
from fewstep.kernels.attention.choice import order, order_packed, sizes, sizes_packed
from fewstep.kernels.backend import declare, dispatch


def _check_lengths(key_lengths: Tensor | None, x: Tensor, keys: int) -> None:
    if key_lengths is None:
        return
    if key_lengths.shape != (len(x),) or key_lengths.is_floating_point():
        raise ValueError(f"key_lengths {tuple(key_lengths.shape)} {key_lengths.dtype} must be ({len(x)},) integers")
    if key_lengths.device != x.device:
        raise ValueError(f"key_lengths on {key_lengths.device} must be on the device of the queries, {x.device}")
    on_cpu = key_lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not bool(((key_lengths >= 1) & (key_lengths <= keys)).all()):      # on a GPU this would wait for it
        raise ValueError(f"key_lengths must lie in [1, {keys}], got {key_lengths.tolist()}")


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors as autocast wants them, which is how PyTorch's own operator treats its inputs."""
    for x in tensors:
        if not x.is_floating_point():
            raise ValueError(f"attention of {x.dtype}, {tuple(x.shape)}: must be of a floating dtype")
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_alike(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        found = [f"{str(x.dtype).removeprefix('torch.')} on {x.device}" for x in (q, k, v)]
        raise ValueError(f"q, k and v must have one dtype and device, got {', '.join(found)}")


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, key_lengths: Tensor | None = None,
              return_lse: Literal[False] = False) -> Tensor: ...


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, key_lengths: Tensor | None = None,
              return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, key_lengths: Tensor | None = None,
              return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v (arXiv 1706.03762, eq. 1).

    Args:
        q: (B, H, L, D).
        k, v: (B, H, M, D), any M.
        scale: D^-1/2 by default.
        key_lengths: (B,) integers in [1, M]: sample b attends to its first key_lengths[b] keys (padded text).
        return_lse: also return the natural log-sum-exp of the scaled scores, (B, H, L) float32 or wider.

    Shape: -> (B, H, L, D), dtype of q (under autocast its dtype); with return_lse a pair.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or a key length (checked on CPU tensors) is out of range.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"need q (B, H, L, D), k and v (B, H, M, D), got {[tuple(x.shape) for x in (q, k, v)]}")
    q, k, v = _cast(q, k, v)
    _check_alike(q, k, v)
    _check_lengths(key_lengths, q, k.shape[2])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    result: Tensor | tuple[Tensor, Tensor] = dispatch("attention", q, k, v, scale, key_lengths, return_lse)
    return result


@overload
def attention_qkv(qkv: Tensor, heads: int, scale: float | None = None, *, key_lengths: Tensor | None = None,
                  return_lse: Literal[False] = False) -> Tensor: ...


@overload
def attention_qkv(qkv: Tensor, heads: int, scale: float | None = None, *, key_lengths: Tensor | None = None,
                  return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...


def attention_qkv(qkv: Tensor, heads: int, scale: float | None = None, *, key_lengths: Tensor | None = None,
                  return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Return self-attention of a packed projection: q, k, v in that order, each H heads of D channels.

    Args:
        qkv: (B, L, 3 H D), or (B, 3 H D, height, width), which is copied unless channels_last; L = height width.
        heads: H.
        scale, key_lengths, return_lse: as in `attention`.

    Shape: -> (B, L, H D), dtype of qkv (under autocast its dtype); with return_lse also (B, H, L).

    Raises:
        ValueError: if 3 H does not divide the channels or a key length is out of range.
    """
    if qkv.ndim not in (3, 4):
        raise ValueError(f"qkv {tuple(qkv.shape)} must be (B, L, 3 H D) or (B, 3 H D, height, width)")
    packed = qkv.permute(0, 2, 3, 1).flatten(1, 2).contiguous() if qkv.ndim == 4 else qkv
    if heads < 1 or packed.shape[-1] % (3 * heads) or not packed.shape[-1]:
        raise ValueError(f"heads={heads}: 3 heads must divide the channels of qkv {tuple(qkv.shape)}")
    (packed,) = _cast(packed)
    _check_lengths(key_lengths, packed, packed.shape[1])
    scale = 1 / math.sqrt(packed.shape[-1] // (3 * heads)) if scale is None else scale
    result: Tensor | tuple[Tensor, Tensor] = dispatch(
        "attention_qkv", packed, heads, scale, key_lengths, return_lse
    )
    return result


declare("attention", order, sizes)
declare("attention_qkv", order_packed, sizes_packed)
