"""GroupNorm with optional FiLM scale and shift, SiLU and residual: what a diffusion UNet does between convolutions."""

from typing import Literal, overload

from torch import Tensor

from fewstep.kernels.backend import dispatch
from fewstep.kernels.group_norm_silu import fused, reference  # noqa: F401  # register themselves


def _check(x: Tensor, groups: int, per_channel: dict[str, Tensor | None], per_sample: dict[str, Tensor | None],
           residual: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} is {x.dtype}: must be of a floating dtype")
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups={groups} must divide the channels of x {tuple(x.shape)}, laid out (B, C, ...)")
    if 0 in x.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} has no channels or no pixels: a group must hold at least one value")
    expected = dict.fromkeys(per_channel, tuple(x.shape[1:2])) | dict.fromkeys(per_sample, tuple(x.shape[:2]))
    for name, value in (per_channel | per_sample).items():
        if value is not None and tuple(value.shape) != expected[name]:
            raise ValueError(f"{name} {tuple(value.shape)} must be {expected[name]} for x {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must be shaped like x {tuple(x.shape)}")
    for name, value in (per_channel | per_sample | {"residual": residual}).items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device} and x on {x.device}; both must be on one device")


@overload
def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, scale: Tensor | None = None,
    shift: Tensor | None = None, residual: Tensor | None = None, *, act: Literal["silu"] | None = "silu",
    residual_at: Literal["after"] = "after",
) -> Tensor: ...


@overload
def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, scale: Tensor | None = None,
    shift: Tensor | None = None, residual: Tensor | None = None, *, act: Literal["silu"] | None = "silu",
    residual_at: Literal["before"],
) -> tuple[Tensor, Tensor]: ...


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, scale: Tensor | None = None,
    shift: Tensor | None = None, residual: Tensor | None = None, *, act: Literal["silu"] | None = "silu",
    residual_at: Literal["after", "before"] = "after",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return act(GroupNorm(x) (1 + scale) + shift), with a residual added after or before.

    Statistics are float32 by two passes (float64 for float64), whatever the dtype. Layout and dtype of x are kept.

    Args:
        x: (B, C, ...), contiguous or channels_last.
        groups: of consecutive channels; divides C.
        weight, bias: (C,) or None for 1 and 0.
        eps: added to the variance.
        scale, shift: (B, C), FiLM per sample (arXiv 2105.05233, adaptive group normalisation).
        residual: like x.
        act: "silu" or None.
        residual_at: "after" adds the residual to the result; "before" normalises x + residual and also returns it.

    Shape: -> like x; with residual_at="before" (like x, x + residual).

    Raises:
        ValueError: if shapes, dtype or devices do not fit, groups do not divide C, or act or residual_at is unknown.
    """
    if act not in ("silu", None) or residual_at not in ("after", "before"):
        raise ValueError(f'act={act!r} must be "silu" or None, residual_at={residual_at!r} "after" or "before"')
    _check(x, groups, {"weight": weight, "bias": bias}, {"scale": scale, "shift": shift}, residual)
    if residual_at == "before" and residual is None:
        raise ValueError('residual_at="before" needs a residual')
    result: Tensor | tuple[Tensor, Tensor] = dispatch(
        "group_norm_silu", x, groups, weight, bias, eps, scale, shift, residual, act, residual_at
    )
    return result
