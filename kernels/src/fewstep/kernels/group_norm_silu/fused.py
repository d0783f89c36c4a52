"""`group_norm_silu` as custom operators with their gradient, whichever backend's kernels they launch.

Forward-mode differentiation never comes here (see `backend.dispatch`): a custom operator would drop the tangent.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.kernels.backend import BACKENDS, HAS_TRITON, declare, layout, register
from fewstep.kernels.group_norm_silu import reference
from fewstep.kernels.group_norm_silu.plan import MOST_CHANNELS

MOST_CUDA_CHANNELS = 1024                  # of one group, for which a program has room
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"fewstep.kernels.group_norm_silu.{backend}_kernel")


def wide_of(x: Tensor) -> torch.dtype:
    """The dtype of statistics: float32, or wider if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """The value in the layout of x, a copy only if it lies otherwise."""
    format_ = torch.channels_last if layout(x) == "channels_last" else torch.contiguous_format
    return value.contiguous(memory_format=format_)


def rows_of(parameter: Tensor | None) -> Tensor | None:
    """The parameter with channels next to each other; rows may lie apart, as the halves of a projection do."""
    return parameter if parameter is None or parameter.stride(-1) == 1 else parameter.contiguous()


@torch.library.custom_op("fewstep::group_norm_silu_forward", mutates_args=())
def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, groups: int, eps: float, act: bool, before: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, x + residual (empty unless `before`), and mean and rstd (B, groups) in float32 or wider.

    The means are of what is normalised less each group's first value, which `backward` reads again.
    """
    y, total, mean, rstd = _outputs(x, groups, before)
    _kernels(backend).forward(
        x, groups, rows_of(weight), rows_of(bias), eps, rows_of(scale), rows_of(shift),
        None if residual is None else _like(residual, x), act, before, y, total if before else None, mean, rstd,
    )
    return y, total, mean, rstd


def _outputs(x: Tensor, groups: int, before: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((len(x), groups), dtype=wide_of(x)) for _ in range(2))
    return torch.empty_like(x), torch.empty_like(x) if before else x.new_empty(0), mean, rstd


@forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, groups: int, eps: float, act: bool, before: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, groups, before)


@torch.library.custom_op("fewstep::group_norm_silu_backward", mutates_args=())
def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, groups: int, act: bool, parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and of weight, bias, scale and shift, those empty where absent or not wanted."""
    dx, *rest = _gradients(x, weight, bias, scale, shift, parameters)
    wanted = tuple(gradient if gradient.numel() else None for gradient in rest)
    _kernels(backend).backward(
        _like(dy, x), None if dtotal is None else _like(dtotal, x), x, groups, rows_of(weight), rows_of(bias),
        rows_of(scale), rows_of(shift), mean, rstd, act, dx, wanted,
    )
    return dx, rest[0], rest[1], rest[2], rest[3]


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight, bias, scale, shift = (
        x.new_empty(0) if p is None or not parameters else p.new_empty(p.shape) for p in (weight, bias, scale, shift)
    )
    return torch.empty_like(x), weight, bias, scale, shift


@backward.register_fake
def _(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, groups: int, act: bool, parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, scale, shift, parameters)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, scale, shift, ctx.groups, ctx.eps, ctx.act, ctx.before, ctx.backend = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.before else x, weight, bias, scale, shift, mean, rstd)


def _pull_back(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: None) -> tuple[Any, ...]:
    """Gradients of the inputs of `forward`, where y or x + residual may have had no use."""
    x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dtotal = dtotal if ctx.before else None                      # of the empty tensor otherwise
    gradients: Sequence[Tensor | None] = (dtotal, None, None, None, None)
    if dy is not None and torch.is_grad_enabled():
        gradients = _differentiable(ctx, dy, dtotal, x, (weight, bias, scale, shift))
    elif dy is not None:
        gradients = backward(
            dy, dtotal, x, mean, rstd, weight, bias, scale, shift, ctx.groups, ctx.act, any(needed[2:6]), ctx.backend
        )
    dresidual = gradients[0] if ctx.before else dy
    found = (gradients[0], dresidual, *gradients[1:])
    return *(g if n else None for g, n in zip(found, needed[:6], strict=True)), *(None,) * 5


def _differentiable(
    ctx: Any, dy: Tensor, dtotal: Tensor | None, x: Tensor, parameters: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The same gradients by the reference, for gradients of gradients."""
    weight, bias, scale, shift = parameters
    act = "silu" if ctx.act else None
    y = reference.group_norm_silu(x, ctx.groups, weight, bias, ctx.eps, scale, shift, None, act, "after")
    wanted = [v for v in (x, *parameters) if v is not None and v.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    dx, *rest = [next(found) if v is not None and v.requires_grad else None for v in (x, *parameters)]
    return [dx if dx is None or dtotal is None else dx + dtotal, *rest]


forward.register_autograd(_pull_back, setup_context=_keep)


def supports(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, act: str | None, residual_at: str,
) -> str | None:
    """Return why the kernels cannot serve a call, or None."""
    if x.dtype not in DTYPES or any(p is not None and p.dtype not in DTYPES for p in (weight, bias, scale, shift)):
        return "dtypes other than float32, bfloat16, float16 and float64"
    if residual is not None and residual.dtype != x.dtype:
        return "a residual of another dtype than x"
    if layout(x) == "strided":
        return "x neither contiguous nor channels_last"
    if x.numel() == 0:
        return "an empty batch"
    if x[0].numel() >= 2**31:
        return "samples of 2^31 elements"
    if layout(x) == "channels_last" and x.shape[1] // groups > MOST_CHANNELS:
        return f"more than {MOST_CHANNELS} channels in a group"
    return None


def _by(backend: str) -> Any:
    def run(
        x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None,
        shift: Tensor | None, residual: Tensor | None, act: str | None, residual_at: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        before = residual_at == "before"
        y, total, _, _ = forward(x, residual, weight, bias, scale, shift, groups, eps, act == "silu", before, backend)
        return (y, total) if before else y

    return run


def cuda_supports(x: Tensor, groups: int, *rest: Any) -> str | None:
    """Return why the CUDA kernels cannot serve a call, or None."""
    if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in (x, *rest)):
        return "float64"
    if x.shape[1] // groups > MOST_CUDA_CHANNELS:
        return f"more than {MOST_CUDA_CHANNELS} channels in a group"
    return supports(x, groups, *rest)


def _sizes(x: Tensor, groups: int, *_: Any) -> tuple[int, ...]:
    return len(x), x.shape[1], groups, x[0, 0].numel()


declare("group_norm_silu", BACKENDS, _sizes)
register("group_norm_silu", "cuda", cuda_supports)(_by("cuda"))
if HAS_TRITON:
    register("group_norm_silu", "triton", supports)(_by("triton"))
