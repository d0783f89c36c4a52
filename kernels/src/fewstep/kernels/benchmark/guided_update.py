"""Shapes of `guided_update`: images and latents, one to many, guided and not, with noise and without."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.kernels import guided_update, two_step_target
from fewstep.kernels.benchmark.case import DTYPES, FORWARD, Case, Cost, Function, Inputs, normal

OP = "guided_update"
# (B, C, H, W), prediction, kind; the most telling first
SHAPES = (
    ((256, 3, 64, 64), "v", "ddim"), ((64, 4, 64, 64), "eps", "ddim"), ((1, 3, 64, 64), "v", "ddim"),
    ((8, 3, 512, 512), "v", "ddim"), ((256, 3, 64, 64), "v", "renoise"), ((256, 3, 64, 64), "v", "posterior"),
    ((256, 3, 64, 64), "v", "x"),
)  # fmt: skip
KINDS, PREDICTIONS = ("ddim", "renoise", "posterior", "x"), ("x", "eps", "v", "flow")


class Outputs(NamedTuple):
    """A network's outputs before conversion, as `fewstep.schedules.Raw` carries them."""

    cond_output: Tensor
    uncond_output: Tensor | None
    prediction: str


class Circle:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> (B,), (B,)."""
        return torch.cos(t * (math.pi / 2)), torch.sin(t * (math.pi / 2))


def eager(
    raw: Outputs, z: Tensor, t: Tensor, s: Tensor | None, schedule: Circle, w: Tensor, *, kind: str,
    noise: Tensor | None,
) -> Tensor:
    """What a user of PyTorch writes: guidance, x from it, the step, each by its formula."""
    assert raw.uncond_output is not None
    output = (1 + _image(w)) * raw.cond_output - _image(w) * raw.uncond_output
    (alpha, sigma) = (_image(a) for a in schedule.alpha_sigma(t))
    x = {
        "x": lambda: output,
        "eps": lambda: (z - sigma * output) / alpha,
        "v": lambda: alpha * z - sigma * output,                       # alpha^2 + sigma^2 = 1
        "flow": lambda: (z - sigma * output) / (alpha + sigma),
    }[raw.prediction]()
    if s is None:
        return x
    if kind == "ddim":
        return _ddim(x, z, t, s, schedule)
    assert noise is not None
    if kind == "renoise":
        k = (2 * s - t).clamp(min=0)
        return _add_noise(_ddim(x, z, t, k, schedule), k, s, schedule, noise)
    return _posterior(x, z, t, s, schedule, noise)


def _image(a: Tensor) -> Tensor:
    return a[:, None, None, None]


def _ddim(x: Tensor, z: Tensor, t: Tensor, s: Tensor, schedule: Circle) -> Tensor:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (map(_image, schedule.alpha_sigma(u)) for u in (t, s))
    return alpha_s * x + sigma_s * (z - alpha_t * x) / sigma_t


def _add_noise(z: Tensor, k: Tensor, s: Tensor, schedule: Circle, noise: Tensor) -> Tensor:
    (alpha_k, sigma_k), (alpha_s, sigma_s) = (map(_image, schedule.alpha_sigma(u)) for u in (k, s))
    ratio = alpha_s / alpha_k
    return ratio * z + (sigma_s**2 - (ratio * sigma_k) ** 2).sqrt() * noise


def _posterior(x: Tensor, z: Tensor, t: Tensor, s: Tensor, schedule: Circle, noise: Tensor) -> Tensor:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (map(_image, schedule.alpha_sigma(u)) for u in (t, s))
    ratio = alpha_t / alpha_s
    added = sigma_t**2 - (ratio * sigma_s) ** 2
    mean = ratio * (sigma_s / sigma_t) ** 2 * z + alpha_s * added / sigma_t**2 * x
    return mean + added.sqrt() * sigma_s / sigma_t * noise


def cases(size: str) -> Iterator[Case]:
    """The cases of one of `case.SIZES`, the most valuable first."""
    if size == "tiny":
        yield _case((2, 3, 8, 8), "fp32", "v", "ddim")
        yield _case((2, 3, 5, 3), "fp32", "eps", "renoise", timed=False)
        yield _blend((2, 3, 8, 8), "fp32", timed=False)
        return
    yield _blend((1 if size == "cpu" else 256, 3, 64, 64), "bf16" if size == "gpu" else "fp32")
    for (batch, *rest), prediction, kind in SHAPES:
        yield _case((1 if size == "cpu" else batch, *rest), "bf16" if size == "gpu" else "fp32", prediction, kind)
    for dtype in ("bf16", "fp16", "fp32"):
        for prediction in PREDICTIONS:
            yield from (_case((3, 3, 9, 7), dtype, prediction, kind, timed=False) for kind in KINDS)
        yield _blend((3, 3, 9, 7), dtype, timed=False)


def _case(shape: tuple[int, ...], dtype: str, prediction: str, kind: str, timed: bool = True) -> Case:
    """`dtype` is that of the network's outputs; z, noise and the result are float32."""
    noisy = kind in ("renoise", "posterior")

    def draw(generator: torch.Generator) -> Inputs:
        outputs = [normal(generator, *shape, dtype=dtype) for _ in range(2)]
        states = [normal(generator, *shape) for _ in range(1 + noisy)]
        t, w = (torch.rand(shape[0], generator=generator, device=generator.device) for _ in range(2))
        return (*outputs, 0.25 + t / 2, 0.1 + t / 2, 4 * w, *states)     # s = t - 0.15

    taken: Any = "ddim" if kind == "x" else kind

    def by(function: Function) -> Function:
        def run(cond: Tensor, uncond: Tensor, t: Tensor, s: Tensor, w: Tensor, z: Tensor, noise: Tensor | None = None
                ) -> Tensor | tuple[Tensor, ...]:
            raw = Outputs(cond, uncond, prediction)
            return function(raw, z, t, None if kind == "x" else s, Circle(), w, kind=taken, noise=noise)

        return run

    elements, size = math.prod(shape), DTYPES[dtype].itemsize
    return Case(
        OP, f"{'x'.join(map(str, shape))} {prediction} {kind}", dtype, "nchw", draw,
        samples=6 + noisy,
        ours=by(guided_update),
        eager=by(eager),
        costs={FORWARD: Cost(elements * (2 * size + 4 * (2 + noisy)))},
        timed=timed,
    )  # fmt: skip


def _blend(shape: tuple[int, ...], dtype: str, timed: bool = True) -> Case:
    """The target of progressive distillation, from a teacher that takes w itself (one output)."""

    def draw(generator: torch.Generator) -> Inputs:
        output, z, first = (normal(generator, *shape, dtype=d) for d in (dtype, "fp32", "fp32"))
        t, share = (torch.rand(shape[0], generator=generator, device=generator.device) for _ in range(2))
        return output, z, first, 0.25 + t / 2, share

    def ours(output: Tensor, z: Tensor, first: Tensor, t: Tensor, share: Tensor) -> Tensor:
        return two_step_target(Outputs(output, None, "v"), z, t, Circle(), first, share)

    def plain(output: Tensor, z: Tensor, first: Tensor, t: Tensor, share: Tensor) -> Tensor:
        alpha, sigma = (_image(a) for a in Circle().alpha_sigma(t))
        return _image(share) * first + (1 - _image(share)) * (alpha * z - sigma * output)

    moved = math.prod(shape) * (DTYPES[dtype].itemsize + 3 * 4)
    return Case(
        OP, f"{'x'.join(map(str, shape))} v two-step", dtype, "nchw", draw, 5, ours, plain,
        costs={FORWARD: Cost(moved)}, timed=timed,
    )  # fmt: skip
