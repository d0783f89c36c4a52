"""Forward-mode differentiation: whether an input carries a tangent, which fused operations would drop."""

from collections.abc import Callable

from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: Tensor | None) -> bool:
    """Return whether any tensor is dual (`torch.func.jvp`, `torch.autograd.forward_ad`)."""
    unpack: Callable[[Tensor], forward_ad.UnpackedDualTensor] = forward_ad.unpack_dual
    return any(t is not None and unpack(t).tangent is not None for t in tensors)
