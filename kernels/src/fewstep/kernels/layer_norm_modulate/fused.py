"""`layer_norm_modulate` as custom operators with their gradient, whichever backend's kernels they launch."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.kernels.backend import HAS_TRITON, register
from fewstep.kernels.group_norm_silu.fused import DTYPES, rows_of, wide_of
from fewstep.kernels.layer_norm_modulate import reference

MOST_CHANNELS = 16384


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"fewstep.kernels.layer_norm_modulate.{backend}_kernel")


@torch.library.custom_op("fewstep::layer_norm_modulate_forward", mutates_args=())
def forward(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and rows' mean (less their first value) and rstd (B, L) in float32 or wider, of x (B, L, C)."""
    y, mean, rstd = _outputs(x)
    _kernels(backend).forward(
        x.contiguous(), rows_of(scale), rows_of(shift), rows_of(weight), rows_of(bias), eps, y, mean, rstd
    )
    return y, mean, rstd


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=wide_of(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@forward.register_fake
def _(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x)


@torch.library.custom_op("fewstep::layer_norm_modulate_backward", mutates_args=())
def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None,
    bias: Tensor | None, parameters: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and of scale, shift, weight and bias, those empty where absent or not wanted."""
    dx, *rest = _gradients(x, scale, shift, weight, bias, parameters)
    dscale, dshift, dweight, dbias = (gradient if gradient.numel() else None for gradient in rest)
    _kernels(backend).backward(
        dy.contiguous(), x.contiguous(), rows_of(scale), rows_of(shift), rows_of(weight), rows_of(bias), mean, rstd, dx,
        (dweight, dbias, dscale, dshift),
    )
    return dx, rest[0], rest[1], rest[2], rest[3]


def _gradients(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale, shift, weight, bias = (
        x.new_empty(0) if p is None or not parameters else p.new_empty(p.shape) for p in (scale, shift, weight, bias)
    )
    return x.new_empty(x.shape), scale, shift, weight, bias


@backward.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None,
    bias: Tensor | None, parameters: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, scale, shift, weight, bias, parameters)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _pull_back(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    """Gradients of the inputs of `forward`."""
    *tensors, mean, rstd = ctx.saved_tensors
    needed = ctx.needs_input_grad
    found: Sequence[Tensor | None] = (None,) * 5
    if dy is not None and torch.is_grad_enabled():
        found = _differentiable(ctx, dy, tensors)
    elif dy is not None:
        found = backward(dy, tensors[0], mean, rstd, *tensors[1:], any(needed[1:5]), ctx.backend)
    return *(g if n else None for g, n in zip(found, needed[:5], strict=True)), None, None


def _differentiable(ctx: Any, dy: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    """The same gradients by the reference, for gradients of gradients."""
    x, scale, shift, weight, bias = tensors
    wanted = [v for v in tensors if v is not None and v.requires_grad]
    y = reference.layer_norm_modulate(x, scale, shift, weight, bias, ctx.eps)
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if v is not None and v.requires_grad else None for v in tensors]


forward.register_autograd(_pull_back, setup_context=_keep)


def supports(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    """Return why the kernels cannot serve a call, or None."""
    if any(p is not None and p.dtype not in DTYPES for p in (x, scale, shift, weight, bias)):
        return "dtypes other than float32, bfloat16, float16 and float64"
    if x.numel() == 0:
        return "an empty batch"
    if x.shape[-1] > MOST_CHANNELS:
        return f"more than {MOST_CHANNELS} channels"
    return None


def _by(backend: str) -> Any:
    def run(
        x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y: Tensor = forward(x.reshape(len(x), -1, x.shape[-1]), scale, shift, weight, bias, eps, backend)[0]
        return y.reshape(x.shape)

    return run


if HAS_TRITON:
    register("layer_norm_modulate", "triton", supports)(_by("triton"))
