"""What "auto" prefers where nothing was measured: published figures say where PyTorch's own kernels are hard to beat.

On an H100, not causal, head dimension 64: FlashAttention 2 282 to 324 TFLOP/s forward, Triton's tutorial kernel 340 to
403, cuDNN 335 to 413. At 128: 309 to 370, 323 to 395 and 497 to 617. No backward pass in Triton is known to be as fast
as theirs. So PyTorch's operator ("reference") is first for training, wide heads, float32 and older chips. It is
not first where it would need a mask (its flash kernel takes none) or cannot return the log-sum-exp.
"""

import torch
from torch import Tensor

from fewstep.kernels.backend import BACKENDS, arch

PYTORCH_FIRST = ("reference", *(name for name in BACKENDS if name != "reference"))


def _order(x: Tensor, dim: int, differentiated: bool, key_lengths: Tensor | None, return_lse: bool) -> tuple[str, ...]:
    if x.dtype == torch.float32:
        return PYTORCH_FIRST
    if return_lse or key_lengths is not None:
        return BACKENDS
    is_hopper = _device(x) == "cuda" and arch(x.device.index or 0) == "sm_90"
    return BACKENDS if is_hopper and dim <= 72 and not differentiated else PYTORCH_FIRST


def _device(x: Tensor) -> str:
    return x.device.type


def _differentiated(*tensors: Tensor) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:                           # not `any`: a generator takes longer than the answer
            if x.requires_grad:
                return True
    return False


def _use(*tensors: Tensor) -> str:
    return "training" if _differentiated(*tensors) else "inference"


def order(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None, return_lse: bool
) -> tuple[str, ...]:
    """Return backends for `attention`, the preferred one first."""
    return _order(q, q.shape[-1], _differentiated(q, k, v), key_lengths, return_lse)


def order_packed(
    qkv: Tensor, heads: int, scale: float, key_lengths: Tensor | None, return_lse: bool
) -> tuple[str, ...]:
    """Return backends for `attention_qkv`, the preferred one first."""
    return _order(qkv, qkv.shape[-1] // (3 * heads), _differentiated(qkv), key_lengths, return_lse)


def sizes(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None, return_lse: bool
) -> tuple[int | str, ...]:
    """Return what the tuning table files a call under: B H, L, M, head dimension and use."""
    batch, heads, length, dim = q.shape
    return batch * heads, length, k.shape[2], f"dim{dim}", _use(q, k, v)


def sizes_packed(
    qkv: Tensor, heads: int, scale: float, key_lengths: Tensor | None, return_lse: bool
) -> tuple[int | str, ...]:
    """Return what the tuning table files a packed call under."""
    batch, length, width = qkv.shape
    return batch * heads, length, length, f"dim{width // (3 * heads)}", _use(qkv)
