"""Shapes of `group_norm_silu`: ADM-64 and Stable Diffusion U-Nets, a VAE's decoder; edge cases for correctness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.kernels import group_norm_silu, use_backend
from fewstep.kernels.benchmark.case import BACKWARD, DTYPES, FORWARD, Case, Cost, Function, Inputs, Outputs, normal
from fewstep.kernels.group_norm_silu.shapes import CLUSTER as CLUSTER_PROGRAMS
from fewstep.kernels.group_norm_silu.shapes import CTA_BYTES, SHAPES, Shape, bytes_moved, flops, passes

OP, CLUSTER = "group_norm_silu", "cuda+cluster"
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
BOUNDS = {1: "one read", 2: "two reads"}
TINY = Shape("tiny", 1, 32, 2, 6, film=True)
# Groups of two elements have next to no gradient, so what little they have has no digits: eight are the fewest here.
EDGES = (
    Shape("edge/narrow", 2, 96, 32, 9), Shape("edge/pixel", 3, 256, 32, 1), Shape("edge/batch1", 1, 192, 32, 16),
    Shape("edge/odd", 2, 64, 8, 33),
)  # fmt: skip
VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"film": True}, {"act": False}, {"residual": "after"}, {"residual": "before", "film": True},
)  # fmt: skip


def eager(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, act: str | None, residual_at: str,
) -> Outputs:
    """What a user of PyTorch writes, in the dtype that PyTorch gives it (float32 within autocast)."""
    total = x if residual is None or residual_at == "after" else x + residual
    y = F.group_norm(total, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    y = F.silu(y) if act == "silu" else y
    y = y + residual if residual is not None and residual_at == "after" else y
    return (y, total) if residual_at == "before" else y


def cases(size: str) -> Iterator[Case]:
    """The cases of one of `case.SIZES`, the most valuable first."""
    if size == "tiny":
        yield from (_case(TINY, "fp32", layout, timed=layout == "channels_last") for layout in LAYOUTS)
        yield _case(replace(TINY, residual="before"), "fp32", "channels_last", timed=False)
        return
    distinct = dict.fromkeys(replace(shape, batch=1) for shape in SHAPES) if size == "cpu" else SHAPES
    for shape in distinct:
        yield from (_case(shape, "fp32" if size == "cpu" else "bf16", layout) for layout in LAYOUTS)
    if size == "gpu":
        yield _case(SHAPES[0], "fp32", "channels_last")
    for dtype in ("bf16", "fp16", "fp32"):
        for layout in LAYOUTS:
            yield from (_case(replace(e, **v), dtype, layout, timed=False) for e in EDGES for v in VARIANTS)
            yield _case(EDGES[2], dtype, layout, timed=False, mean=300.0)


def _words(shape: Shape, mean: float) -> str:
    extras = ["film"] * shape.film + ["linear"] * (not shape.act)
    extras += [f"residual {shape.residual}"] if shape.residual else []
    sizes = f"{shape.batch}x{shape.channels}x{shape.side}x{shape.side} g{shape.groups}"
    return " ".join([shape.name, sizes, *extras, *([f"mean {mean:g}"] if mean else [])])


def _case(shape: Shape, dtype: str, layout: str, *, timed: bool = True, mean: float = 0.0) -> Case:
    def draw(generator: torch.Generator) -> Inputs:
        size = shape.batch, shape.channels, shape.side, shape.side
        images = [normal(generator, *size, dtype=dtype, mean=m) for m in (mean, 0.0)[: 1 + bool(shape.residual)]]
        film = [normal(generator, *size[:2], dtype=dtype, std=0.3) for _ in range(2 * shape.film)]
        affine = [normal(generator, shape.channels, dtype=dtype, mean=m, std=0.3) for m in (1.0, 0.0)]
        return (*(x.contiguous(memory_format=LAYOUTS[layout]) for x in images), *film, *affine)

    def by(function: Function) -> Function:
        def run(*inputs: Tensor) -> Outputs:
            x, *more, weight, bias = inputs
            added = more.pop(0) if shape.residual else None
            scale, shift = more or (None, None)
            return function(x, shape.groups, weight, bias, 1e-5, scale, shift, added)

        return run

    act, at = "silu" if shape.act else None, shape.residual or "after"
    return Case(
        OP, _words(shape, mean), dtype, layout, draw,
        samples=1 + bool(shape.residual) + 2 * shape.film,
        ours=by(partial(group_norm_silu, act=act, residual_at=at)),
        eager=by(partial(eager, act=act, residual_at=at)),
        costs=_costs(shape, DTYPES[dtype].itemsize),
        variants={CLUSTER: clustered} if _fits_a_cluster(shape, DTYPES[dtype].itemsize) else {},
        timed=timed,
        loose=max(1.0, mean),
    )  # fmt: skip


def _fits_a_cluster(shape: Shape, size: int) -> bool:
    """Whether a group is too large for one program and not for the programs of a cluster."""
    return CTA_BYTES < shape.group * size <= CLUSTER_PROGRAMS * CTA_BYTES


@contextmanager
def clustered() -> Iterator[None]:
    """Within, the CUDA kernels take their cluster tier wherever it can serve, as if the tuning table said so."""
    from fewstep.kernels.group_norm_silu import cuda_kernel

    looked_up_in = vars(cuda_kernel)
    kept = looked_up_in["tuned"]
    looked_up_in["tuned"] = lambda *_: {"backend": "cuda", "cluster": True}
    try:
        with use_backend("cuda"):
            yield
    finally:
        looked_up_in["tuned"] = kept


def _costs(shape: Shape, size: int) -> dict[str, Cost]:
    return {
        name: Cost(bytes_moved(shape, size, back), flops(shape, back), BOUNDS[passes(shape, size, back)])
        for name, back in ((FORWARD, False), (BACKWARD, True))
    }
