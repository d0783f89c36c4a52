"""guided_update as one operator of PyTorch with its gradient, computed by a fused kernel of Triton or CUDA."""

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.kernels.backend import HAS_TRITON, register
from fewstep.kernels.guided_update import reference
from fewstep.kernels.guided_update.arguments import DTYPES, KINDS, PREDICTIONS, Arguments, dense, laid_like, row
from fewstep.kernels.guided_update.reference import RawLike, ScheduleLike

Clip = tuple[float, float] | None


def _arguments(
    cond: Tensor, uncond: Tensor | None, z: Tensor, other: Tensor | None, weight: Tensor | None, w: float,
    levels: list[Tensor], prediction: int, kind: int, low: float, high: float,
) -> Arguments:  # fmt: skip
    z = dense(z.float())
    cond = laid_like(cond, z)
    uncond, other = (None if x is None else laid_like(x, z) for x in (uncond, other))
    return Arguments(cond, uncond, z, other, weight, w, tuple(levels * 3)[:6], prediction, kind, low, high)


@torch.library.custom_op("fewstep::guided_update", mutates_args=())
def fused(
    backend: str, cond: Tensor, uncond: Tensor | None, z: Tensor, other: Tensor | None, weight: Tensor | None, w: float,
    levels: list[Tensor], prediction: int, kind: int, low: float, high: float, with_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the update and, with_x, the clipped estimate, else an empty tensor; see `Arguments`."""
    arguments = _arguments(cond, uncond, z, other, weight, w, levels, prediction, kind, low, high)
    out, x = _like(arguments.z, with_x)
    if out.numel():
        _kernels(backend).forward(arguments, out, x if with_x else None)
    return out, x


def _like(z: Tensor, with_x: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(z, dtype=torch.float32)
    return out, torch.empty_like(out) if with_x else out.new_empty(0)


@fused.register_fake  # its arguments are of the types above
def _(backend, cond, uncond, z, other, weight, w, levels, prediction, kind, low, high, with_x):  # type: ignore[no-untyped-def]
    return _like(dense(z.float()), with_x)


@torch.library.custom_op("fewstep::guided_update_backward", mutates_args=())
def fused_backward(
    backend: str, grad: Tensor, cond: Tensor, uncond: Tensor | None, z: Tensor, weight: Tensor | None, w: float,
    levels: list[Tensor], prediction: int, kind: int, low: float, high: float, needs_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients to cond, uncond and z; empty tensors for an absent uncond and a z that needs none."""
    arguments = _arguments(cond, uncond, z, grad, weight, w, levels, prediction, kind, low, high)
    d_cond, d_uncond, d_z = _gradients(cond, uncond is not None, arguments.z, needs_z)
    if d_cond.numel():
        assert arguments.other is not None
        _kernels(backend).backward(
            arguments, arguments.other, d_cond, d_uncond if uncond is not None else None, d_z if needs_z else None
        )
    return d_cond, d_uncond, d_z.to(z.dtype)


def _gradients(cond: Tensor, guided: bool, z: Tensor, needs_z: bool) -> tuple[Tensor, Tensor, Tensor]:
    d_cond = torch.empty_like(z, dtype=cond.dtype)
    return (
        d_cond,
        torch.empty_like(d_cond) if guided else d_cond.new_empty(0),
        torch.empty_like(z) if needs_z else z.new_empty(0),
    )


@fused_backward.register_fake  # and so are these
def _(backend, grad, cond, uncond, z, weight, w, levels, prediction, kind, low, high, needs_z):  # type: ignore[no-untyped-def]
    d_cond, d_uncond, d_z = _gradients(cond, uncond is not None, dense(z.float()), needs_z)
    return d_cond, d_uncond, d_z.to(z.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    backend, cond, uncond, z, _, weight, w, levels, prediction, kind, low, high, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cond, uncond, z, weight, *levels)
    ctx.plain = backend, w, prediction, kind, low, high


def _differentiate(ctx: Any, grad: Tensor | None, grad_x: Tensor | None) -> tuple[Any, ...]:
    nothing: list[Any] = [None] * 13
    if grad is None:
        return tuple(nothing)
    (cond, uncond, z, weight, *levels), (backend, w, prediction, kind, low, high) = ctx.saved_tensors, ctx.plain
    nothing[7] = [None] * len(levels)
    if torch.is_grad_enabled():
        nothing[1:4] = _differentiable(ctx, grad)
        return tuple(nothing)
    needs_z = ctx.needs_input_grad[3]
    d_cond, d_uncond, d_z = fused_backward(
        backend, grad, cond, uncond, z, weight, w, levels, prediction, kind, low, high, needs_z
    )
    nothing[1:4] = d_cond, None if uncond is None else d_uncond, d_z if needs_z else None
    return tuple(nothing)


class _Outputs(NamedTuple):
    """A network's outputs, as `RawLike` has them."""

    cond_output: Tensor
    uncond_output: Tensor | None
    prediction: str


class _Levels(NamedTuple):
    """alpha and sigma at three times, which are called 0, 1 and 2: what is saved of a schedule."""

    levels: list[Tensor]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.levels[2 * int(t)], self.levels[2 * int(t) + 1]


def _differentiable(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The same gradients by the reference, for gradients of gradients; no noise, which none of them depends on."""
    (cond, uncond, z, weight, *levels), (_, w, prediction, kind, low, high) = ctx.saved_tensors, ctx.plain
    raw = _Outputs(cond, uncond, PREDICTIONS[prediction])
    t, s, third = torch.arange(3)
    end, jump = None if KINDS[kind] == "estimate" else s, levels[2] if KINDS[kind] == "blend" else third
    needed = [x for x, needs in zip((cond, uncond, z), ctx.needs_input_grad[1:4], strict=True) if needs]
    none, strength = torch.zeros_like(z), w if weight is None else weight
    out = reference.guided_update(
        raw, z, t, end, _Levels(levels), strength, KINDS[kind], none, (low, high), jump, False
    )
    found = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
    return [next(found) if needs else None for needs in ctx.needs_input_grad[1:4]]


fused.register_autograd(_differentiate, setup_context=_save)


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"fewstep.kernels.guided_update.{backend}_kernel")


def _unsupported(
    raw: RawLike, z: Tensor, t: Tensor, s: Tensor | None, schedule: ScheduleLike, w: Tensor | float | None,
    kind: str, noise: Tensor | None, clip: Clip, jump: Tensor | None, with_x: bool,
) -> str | None:  # fmt: skip
    """Return why the fused kernels cannot run this call. Asked at every call: no more than it needs."""
    cond, uncond = raw.cond_output, raw.uncond_output
    if cond.dtype not in DTYPES:
        return f"outputs are {cond.dtype}"
    if uncond is not None and uncond.dtype != cond.dtype:
        return "conditional and unconditional output differ in dtype"
    if z.dtype not in DTYPES:
        return f"z are {z.dtype}"
    if torch.float64 in (t.dtype, None if s is None else s.dtype, None if jump is None else jump.dtype):
        return "times are float64"
    return _undifferentiable(cond, uncond, z, t, s, w, noise, jump, with_x) if torch.is_grad_enabled() else None


def _undifferentiable(
    cond: Tensor, uncond: Tensor | None, z: Tensor, t: Tensor, s: Tensor | None, w: Tensor | float | None,
    noise: Tensor | None, jump: Tensor | None, with_x: bool,
) -> str | None:  # fmt: skip
    """Return which gradient is needed that the fused kernels do not have."""
    for name, value in (("times", t), ("s", s), ("w", w), ("noise", noise), ("jump", jump)):
        if isinstance(value, Tensor) and value.requires_grad:
            return f"a gradient to {name} is needed"
    if with_x and (cond.requires_grad or z.requires_grad or (uncond is not None and uncond.requires_grad)):
        return "the estimate beside the update needs a gradient"
    return None


def _levels(
    schedule: ScheduleLike, z: Tensor, t: Tensor, s: Tensor | None, kind: str, jump: Tensor | None
) -> list[Tensor]:
    """Return the levels that a kind needs, as (B,) float32."""
    levels = list(schedule.alpha_sigma(t))
    if kind == "blend":
        assert jump is not None
        levels += [jump, jump]
    elif s is not None:
        levels += schedule.alpha_sigma(s)
        if kind == "renoise":
            levels += schedule.alpha_sigma((2 * s - t).clamp(min=0.0) if jump is None else jump)
    return [row(level, z) for level in levels]


def _by(backend: str) -> Any:
    def run(
        raw: RawLike, z: Tensor, t: Tensor, s: Tensor | None, schedule: ScheduleLike, w: Tensor | float | None,
        kind: str, noise: Tensor | None, clip: Clip, jump: Tensor | None, with_x: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        if s is None and kind != "blend":
            kind, noise = "estimate", None
        uncond = None if w is None else raw.uncond_output
        weight = row(w, z) if isinstance(w, Tensor) and uncond is not None else None
        low, high = clip or (-math.inf, math.inf)
        other = None if kind in ("estimate", "ddim") or noise is None else noise.float()
        out, x = fused(
            backend, raw.cond_output, uncond, z, other, weight,
            0.0 if w is None or isinstance(w, Tensor) else float(w), _levels(schedule, z, t, s, kind, jump),
            PREDICTIONS.index(raw.prediction), KINDS.index(kind), low, high, with_x,
        )  # fmt: skip
        return (out, x) if with_x else out

    return run


register("guided_update", "cuda", _unsupported)(_by("cuda"))
if HAS_TRITON:
    register("guided_update", "triton", _unsupported)(_by("triton"))
