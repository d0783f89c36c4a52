"""Guidance, conversion to x, clipping and one update in one pass over memory, in Triton; and its gradient.

One program takes BLOCK consecutive elements of one sample, as they lie in memory. Kind and prediction are numbers, not
constants: they only decide about a few scalars per program.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.configuration import Configuration
from fewstep.kernels.guided_update.arguments import Arguments

BLOCK = 1024
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
LEVELS = ("alpha_t", "sigma_t", "alpha_s", "sigma_s", "alpha_k", "sigma_k")


@triton.jit
def _conversion(alpha, sigma, prediction):
    """x = (from_z z + from_output output) over; predictions in the order of PREDICTIONS."""
    from_z = tl.where(prediction == 0, 0.0, tl.where(prediction == 2, alpha, 1.0))
    from_output = tl.where(prediction == 0, 1.0, -sigma)
    divisor = tl.where(prediction == 1, alpha, tl.where(prediction == 2, alpha * alpha + sigma * sigma, alpha + sigma))
    return from_z, from_output, tl.where(prediction == 0, 1.0, tl.div_rn(1.0, divisor))


@triton.jit
def _ddim(alpha_t, sigma_t, alpha_s, sigma_s):
    ratio = tl.div_rn(sigma_s, sigma_t)
    return ratio, alpha_s - ratio * alpha_t


@triton.jit
def _snr_ratio(alpha_t, sigma_t, alpha_s, sigma_s):
    root = tl.div_rn(alpha_t * sigma_s, sigma_t * alpha_s)
    rest = (1 - root) * (1 + root)
    return root * root, tl.where(rest < 0, 0.0, rest)


@triton.jit
def _step(alpha_t, sigma_t, alpha_s, sigma_s, alpha_k, sigma_k, kind):
    """z_s = from_z z + from_x x + from_other other, kinds in the order of KINDS; "blend" has its share in alpha_s."""
    ddim_z, ddim_x = _ddim(alpha_t, sigma_t, alpha_s, sigma_s)
    jump_z, jump_x = _ddim(alpha_t, sigma_t, alpha_k, sigma_k)
    back = tl.div_rn(alpha_s, alpha_k)
    _, added = _snr_ratio(alpha_s, sigma_s, alpha_k, sigma_k)
    kept, rest = _snr_ratio(alpha_t, sigma_t, alpha_s, sigma_s)
    from_z = tl.where(kind == 1, ddim_z, 0.0)
    from_x = tl.where(kind == 0, 1.0, tl.where(kind == 1, ddim_x, 1 - alpha_s))
    from_other = tl.where(kind == 4, alpha_s, 0.0)
    from_z = tl.where(kind == 2, back * jump_z, tl.where(kind == 3, tl.div_rn(kept * alpha_s, alpha_t), from_z))
    from_x = tl.where(kind == 2, back * jump_x, tl.where(kind == 3, rest * alpha_s, from_x))
    from_other = tl.where(kind == 2, sigma_s * tl.sqrt_rn(added), from_other)
    return from_z, from_x, tl.where(kind == 3, sigma_s * tl.sqrt_rn(rest), from_other)


@triton.jit
def _clipped(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))            # NaN stays


@triton.jit
def _place(size, BLOCK: tl.constexpr):
    """Return this program's sample, the offsets of its elements, and which of them there are."""
    blocks = tl.cdiv(size, BLOCK)
    sample = tl.program_id(0) // blocks
    within = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return sample, sample.to(tl.int64) * size + within, within < size


@triton.jit(do_not_specialize=["prediction", "kind"])
def forward_kernel(
    cond, uncond, z, other, out, out_x, weight, alpha_t, sigma_t, alpha_s, sigma_s, alpha_k, sigma_k,
    w, low, high, size, prediction, kind, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = from_z z + from_x x + from_other other, x the guided, converted and clipped estimate, also to out_x."""
    sample, at, inside = _place(size, BLOCK)
    a_t, s_t, a_s = tl.load(alpha_t + sample), tl.load(sigma_t + sample), tl.load(alpha_s + sample)
    s_s, a_k, s_k = tl.load(sigma_s + sample), tl.load(alpha_k + sample), tl.load(sigma_k + sample)
    z_to_x, output_to_x, over = _conversion(a_t, s_t, prediction)
    from_z, from_x, from_other = _step(a_t, s_t, a_s, s_s, a_k, s_k, kind)
    output = tl.load(cond + at, inside, 0.0).to(tl.float32)
    if uncond is not None:
        if weight is not None:
            w = tl.load(weight + sample)
        output += w * (output - tl.load(uncond + at, inside, 0.0).to(tl.float32))
    state = tl.load(z + at, inside, 0.0).to(tl.float32)
    x = _clipped((z_to_x * state + output_to_x * output) * over, low, high)
    moved = from_z * state + from_x * x
    if other is not None:
        moved += from_other * tl.load(other + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, moved, inside)
    if out_x is not None:
        tl.store(out_x + at, x, inside)


@triton.jit(do_not_specialize=["prediction", "kind"])
def backward_kernel(
    grad, cond, uncond, z, grad_cond, grad_uncond, grad_z, weight, alpha_t, sigma_t, alpha_s, sigma_s, alpha_k, sigma_k,
    w, low, high, size, prediction, kind, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of out; without limits of x they need nothing but grad, as all of it is linear."""
    sample, at, inside = _place(size, BLOCK)
    a_t, s_t, a_s = tl.load(alpha_t + sample), tl.load(sigma_t + sample), tl.load(alpha_s + sample)
    s_s, a_k, s_k = tl.load(sigma_s + sample), tl.load(alpha_k + sample), tl.load(sigma_k + sample)
    z_to_x, output_to_x, over = _conversion(a_t, s_t, prediction)
    from_z, from_x, _ = _step(a_t, s_t, a_s, s_s, a_k, s_k, kind)
    if grad_uncond is not None:
        if weight is not None:
            w = tl.load(weight + sample)
    else:
        w = 0.0
    d_out = tl.load(grad + at, inside, 0.0).to(tl.float32)
    d_x = from_x * d_out
    if cond is not None:
        output = tl.load(cond + at, inside, 0.0).to(tl.float32)
        if uncond is not None:
            output += w * (output - tl.load(uncond + at, inside, 0.0).to(tl.float32))
        x = (z_to_x * tl.load(z + at, inside, 0.0).to(tl.float32) + output_to_x * output) * over
        d_x = tl.where((x < low) | (x > high), 0.0, d_x)
    d_x *= over
    d_output = output_to_x * d_x
    tl.store(grad_cond + at, ((1 + w) * d_output).to(grad_cond.dtype.element_ty), inside)
    if grad_uncond is not None:
        tl.store(grad_uncond + at, (-w * d_output).to(grad_uncond.dtype.element_ty), inside)
    if grad_z is not None:
        tl.store(grad_z + at, (from_z * d_out + z_to_x * d_x).to(grad_z.dtype.element_ty), inside)


def _variant(kernel: object, pointers: dict[str, str | None], weights: bool) -> Configuration:
    """Return the variant of a kernel that has these pointers; those that are None it does without."""
    kinds = pointers | {"weight": "*fp32" if weights else None} | dict.fromkeys(LEVELS, "*fp32")
    numbers = dict.fromkeys(("w", "low", "high"), "fp32") | dict.fromkeys(("size", "prediction", "kind"), "i32")
    present = {name: kind for name, kind in kinds.items() if kind is not None}
    way = "forward" if kernel is forward_kernel else "backward"
    name = " ".join([way, *(f"{name}:{kind[1:]}" for name, kind in present.items() if name not in LEVELS)])
    absent = dict.fromkeys(name for name in kinds if name not in present)
    return Configuration(name, kernel, present | numbers, absent | {"BLOCK": BLOCK}, divisible=("size",))


@cache
def forward_variant(output: torch.dtype, guided: bool, weights: bool, other: bool, with_x: bool) -> Configuration:
    """Return the variant for network outputs of a dtype; `weights`: w is a tensor; `other`: there is noise or alike."""
    raw = POINTERS[output]
    return _variant(forward_kernel, {
        "cond": raw, "uncond": raw if guided else None, "z": "*fp32", "other": "*fp32" if other else None,
        "out": "*fp32", "out_x": "*fp32" if with_x else None,
    }, weights)  # fmt: skip


@cache
def backward_variant(output: torch.dtype, guided: bool, weights: bool, needs_z: bool, clips: bool) -> Configuration:
    """Return the variant for the gradient; `needs_z`: also to z; `clips`: x was clipped, so it is computed again."""
    raw = POINTERS[output]
    return _variant(backward_kernel, {
        "grad": "*fp32", "cond": raw if clips else None, "uncond": raw if clips and guided else None,
        "z": "*fp32" if clips else None, "grad_cond": raw, "grad_uncond": raw if guided else None,
        "grad_z": "*fp32" if needs_z else None,
    }, weights)  # fmt: skip


def configurations() -> Iterator[Configuration]:
    """Yield every variant that `forward` and `backward` launch."""
    guidance = [(False, False), (True, False), (True, True)]
    more = [(False, False), (True, False), (False, True), (True, True)]
    for output, (guided, weights), (other, with_x) in product(POINTERS, guidance, more):
        yield forward_variant(output, guided, weights, other, with_x)
    for output, (guided, weights), (needs_z, clips) in product(POINTERS, guidance, more):
        yield backward_variant(output, guided, weights, needs_z, clips)


def forward(arguments: Arguments, out: Tensor, out_x: Tensor | None) -> None:
    """Write the update, float32, into `out` and, where asked for, the clipped estimate into `out_x`."""
    a = arguments
    variant = forward_variant(
        a.cond.dtype, a.uncond is not None, a.weight is not None, a.other is not None, out_x is not None
    )
    _launch(variant, a, [a.cond, a.uncond, a.z, a.other, out, out_x])


def backward(
    arguments: Arguments, grad: Tensor, grad_cond: Tensor, grad_uncond: Tensor | None, grad_z: Tensor | None
) -> None:
    """Write the gradients of the update's product with `grad`, float32, into the given tensors."""
    a = arguments
    guided = grad_uncond is not None
    variant = backward_variant(grad_cond.dtype, guided, a.weight is not None, grad_z is not None, a.clips)
    read = [a.cond, a.uncond, a.z] if a.clips else [None, None, None]
    _launch(variant, a, [grad, *read, grad_cond, grad_uncond, grad_z])


def _launch(variant: Configuration, a: Arguments, pointers: list[Tensor | None]) -> None:
    size = a.z[0].numel()
    present = [pointer for pointer in (*pointers, a.weight) if pointer is not None]
    numbers = (a.w, a.low, a.high, size, a.prediction, a.kind)
    variant.launch((len(a.z) * triton.cdiv(size, BLOCK),), *present, *a.levels, *numbers)
