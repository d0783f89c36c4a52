"""LayerNorm with scale and shift per sample: what a diffusion transformer does before attention and MLP."""

from torch import Tensor

from fewstep.kernels.backend import dispatch
from fewstep.kernels.layer_norm_modulate import fused, reference  # noqa: F401  # register themselves


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Return LayerNorm(x) (1 + scale) + shift, adaLN's modulation (arXiv 2212.09748, section 3.2).

    Statistics over the last dimension are float32 by two passes (float64 for float64), whatever the dtype.

    Args:
        x: (B, ..., C).
        scale, shift: (B, C), per sample.
        weight, bias: (C,), applied before scale and shift; None for 1 and 0.
        eps: added to the variance.

    Shape: -> like x, dtype of x.

    Raises:
        ValueError: if shapes, dtype or devices do not fit.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be (B, ..., C) of a floating dtype")
    expected = {"scale": (x.shape[0], x.shape[-1]), "weight": (x.shape[-1],)}
    expected |= {"shift": expected["scale"], "bias": expected["weight"]}
    for name, value in {"scale": scale, "shift": shift, "weight": weight, "bias": bias}.items():
        if value is not None and tuple(value.shape) != expected[name]:
            raise ValueError(f"{name} {tuple(value.shape)} must be {expected[name]} for x {tuple(x.shape)}")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device} and x on {x.device}; both must be on one device")
    result: Tensor = dispatch("layer_norm_modulate", x, scale, shift, weight, bias, eps)
    return result
