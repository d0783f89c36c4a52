"""Shapes of `layer_norm_modulate`: diffusion transformers; edge cases for correctness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.kernels.benchmark.case import BACKWARD, DTYPES, FORWARD, Case, Cost, Inputs, normal
from fewstep.kernels.layer_norm_modulate.op import layer_norm_modulate
from fewstep.kernels.layer_norm_modulate.shapes import SHAPES, Shape, bytes_moved, flops

OP = "layer_norm_modulate"
TINY = Shape("tiny", 1, 5, 32)
EDGES = (Shape("edge/odd", 2, 7, 100), Shape("edge/token", 3, 1, 64), Shape("edge/wide", 1, 3, 1152))


def eager(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """What a user of PyTorch writes, in the dtype that PyTorch gives it (float32 within autocast)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale[:, None]) + shift[:, None]


def cases(size: str) -> Iterator[Case]:
    """The cases of one of `case.SIZES`, the most valuable first."""
    if size == "tiny":
        yield _case(TINY, "fp32")
        return
    for shape in dict.fromkeys(replace(shape, batch=1) for shape in SHAPES) if size == "cpu" else SHAPES:
        yield _case(shape, "fp32" if size == "cpu" else "bf16")
    for dtype in ("bf16", "fp16", "fp32"):
        yield from (_case(shape, dtype, timed=False) for shape in EDGES)


def _case(shape: Shape, dtype: str, timed: bool = True) -> Case:
    def draw(generator: torch.Generator) -> Inputs:
        x = normal(generator, shape.batch, shape.tokens, shape.channels, dtype=dtype)
        scale, shift = (normal(generator, shape.batch, shape.channels, dtype=dtype, std=0.3) for _ in range(2))
        return x, scale, shift

    size = DTYPES[dtype].itemsize
    return Case(
        OP, f"{shape.name} {shape.batch}x{shape.tokens}x{shape.channels}", dtype, "blc", draw, 3,
        ours=layer_norm_modulate,
        eager=lambda x, scale, shift: eager(x, scale, shift, None, None, 1e-6),
        costs={
            name: Cost(bytes_moved(shape, size, back), flops(shape, back))
            for name, back in ((FORWARD, False), (BACKWARD, True))
        },
        timed=timed,
    )  # fmt: skip
