"""The CUDA kernels of attention, kernel.cu, on tensors."""

from typing import Any

import torch
from torch import Tensor

from fewstep.kernels import build
from fewstep.kernels.backend import on_device_of
from fewstep.kernels.build import address, checked, stream

DTYPES = {torch.bfloat16: 1, torch.float16: 2}


def forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, key_lengths: Tensor | None) -> None:
    """Write o (B, H, L, D) and lse (B, H, L); q, k, v and o by any strides that `fused.is_readable` allows."""
    q, (k, v) = _aligned(q), _alike(k, v)
    with on_device_of(q):
        module = build.load("attention")
        call, _lengths = _call(module, q, k, v, o, lse, scale, key_lengths)
        checked(module.forward(call), "attention")


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor, d_lse: Tensor | None, dq: Tensor, dk: Tensor,
    dv: Tensor, scale: float, key_lengths: Tensor | None,
) -> None:  # fmt: skip
    """Write dq, dk and dv, these two with the same strides, from the gradients of o and, if any, of lse."""
    q, d_o, (k, v) = _aligned(q), _aligned(d_o), _alike(k, v)
    delta = torch.empty_like(lse)
    with on_device_of(q):
        module = build.load("attention")
        call, _lengths = _call(module, q, k, v, o, lse, scale, key_lengths)
        pointers = [address(x) for x in (d_o, d_lse, dq, dk, dv, delta)]
        gradients = module.Gradients(*pointers, *(x.stride()[:3] for x in (d_o, dq, dk)))
        checked(module.backward(call, gradients), "attention backward")


def _call(
    module: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, key_lengths: Tensor | None
) -> tuple[Any, Tensor | None]:
    """Return the call and what must live until it is launched."""
    lengths = None if key_lengths is None else key_lengths.to(torch.int32)
    pointers = [address(x) for x in (q, k, v, o, lse, lengths)]
    batch, heads, queries, dim = q.shape
    sizes = (batch, heads, queries, k.shape[2], dim, DTYPES[q.dtype])
    return module.Attention(*pointers, *(x.stride()[:3] for x in (q, k, o)), scale, sizes, stream(q)), lengths


def _aligned(x: Tensor) -> Tensor:
    """Return x, a copy if it does not start on 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and v with the same strides, which kernels take once: copies if they differ."""
    k, v = _aligned(k), _aligned(v)
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())
