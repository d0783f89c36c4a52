"""What the fused kernels of guided_update take: tensors in one layout, levels per sample, and plain numbers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTIONS = ("x", "eps", "v", "flow")                           # kernels know them by index
KINDS = ("estimate", "ddim", "renoise", "posterior", "blend")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Arguments:
    """Arguments of one launch. All tensors (B, ...) lie in memory alike, each sample in one piece.

    Fields:
        cond, uncond: the network's outputs, one dtype of `DTYPES`; uncond None: no guidance.
        z: state, float32.
        other: noise, or for "blend" the estimate that is blended in; float32. Backward has the gradient here.
        weight: (B,) float32, guidance weight of each sample; None: `w` holds for all. w = 0 is no guidance (Stable
            Diffusion's guidance scale is 1 + w).
        levels: six of (B,) float32: alpha and sigma at t, at s and at k; "blend" has its share in the third. Those that
            the kind does not need are any others.
        prediction, kind: indices into `PREDICTIONS` and `KINDS`.
        low, high: limits of x; infinite where there are none.
    """

    cond: Tensor
    uncond: Tensor | None
    z: Tensor
    other: Tensor | None
    weight: Tensor | None
    w: float
    levels: tuple[Tensor, ...]
    prediction: int
    kind: int
    low: float
    high: float

    @property
    def clips(self) -> bool:
        """Whether x is limited."""
        return not (math.isinf(self.low) and math.isinf(self.high))


def dense(z: Tensor) -> Tensor:
    """Return z in a layout where each sample lies in one piece: as it is if contiguous or channels_last."""
    last = z.ndim == 4 and z.is_contiguous(memory_format=torch.channels_last)
    return z if last or z.is_contiguous() else z.contiguous()


def laid_like(x: Tensor, z: Tensor) -> Tensor:
    """Return x in the layout of z (dense)."""
    return x if x.stride() == z.stride() else torch.empty_like(z, dtype=x.dtype).copy_(x)


def row(value: Tensor, z: Tensor) -> Tensor:
    """Return () or (B,) as (B,) float32 on z's device."""
    return value.to(device=z.device, dtype=torch.float32).expand(len(z)).contiguous()
