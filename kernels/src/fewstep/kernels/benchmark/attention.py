"""Shapes of `attention` and `attention_qkv`: those that the kernels promise, and edge cases for correctness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.kernels import attention, attention_qkv
from fewstep.kernels.attention.shapes import SHAPES, Shape, bytes_moved, flops
from fewstep.kernels.benchmark.case import BACKWARD, DTYPES, FORWARD, Case, Cost, Function, Inputs, normal

OP, PACKED = "attention", "attention_qkv"
RIVALS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TINY = (Shape("tiny/4x4", 1, 1, 16, 16, 32), Shape("tiny/text", 1, 1, 17, 5, 32, packed=False))
EDGES = tuple(
    Shape("edge", 2, 2, queries, keys, dim, packed=queries == keys)
    for dim in (32, 64, 72, 128)
    for queries, keys in ((64, 64), (33, 77), (129, 129), (1, 5))
)


def eager(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None = None, return_lse: bool = False
) -> Tensor:
    """PyTorch's fused operator, by the kernel that PyTorch picks."""
    assert key_lengths is None  # neither the cases nor the networks measured here pad
    assert not return_lse
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def eager_packed(
    qkv: Tensor, heads: int, scale: float, key_lengths: Tensor | None = None, return_lse: bool = False
) -> Tensor:
    """The same from (B, L, 3 H D) to (B, L, H D), as networks written in PyTorch do it."""
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return eager(q, k, v, scale, key_lengths, return_lse).transpose(1, 2).flatten(2)


def cases(size: str) -> Iterator[Case]:
    """The cases of one of `case.SIZES`, the most valuable first."""
    if size == "tiny":
        yield _separate(TINY[1], "fp32")
        yield from (_packed(TINY[0], dtype, timed=dtype == "fp32") for dtype in ("fp32", "bf16"))
        return
    dtype = "fp32" if size == "cpu" else "bf16"
    shapes = [replace(shape, batch=1) for shape in SHAPES] if size == "cpu" else SHAPES
    distinct = {_words(shape): shape for shape in shapes}.values()
    for shape in distinct:
        yield _separate(shape, dtype)
        if shape.packed:
            yield _packed(shape, dtype)
    for dtype in ("bf16", "fp16", "fp32"):
        for shape in EDGES:
            yield _separate(shape, dtype, timed=False)
            if shape.packed:
                yield _packed(shape, dtype, timed=False)


def _words(shape: Shape) -> str:
    return f"{shape.name} {shape.batch}x{shape.heads}x{shape.queries}x{shape.keys}x{shape.dim}"


def _separate(shape: Shape, dtype: str, timed: bool = True) -> Case:
    scale = shape.dim**-0.5

    def draw(generator: torch.Generator) -> Inputs:
        """Stored as projections leave them, (B, L, H, D)."""
        lengths = (shape.queries, shape.keys, shape.keys)
        return tuple(
            normal(generator, shape.batch, n, shape.heads, shape.dim, dtype=dtype).transpose(1, 2) for n in lengths
        )

    return Case(
        OP, _words(shape), dtype, "blhd", draw, 3,
        ours=attention,
        eager=lambda q, k, v: eager(q, k, v, scale),
        costs=_costs(shape, dtype),
        rivals=_rivals(dtype, lambda q, k, v: eager(q, k, v, scale)),
        compiled=False,                       # of one operator there is nothing to compile
        timed=timed,
    )  # fmt: skip


def _packed(shape: Shape, dtype: str, timed: bool = True) -> Case:
    width, scale = 3 * shape.heads * shape.dim, shape.dim**-0.5

    def run(qkv: Tensor) -> Tensor:
        return eager_packed(qkv, shape.heads, scale)

    return Case(
        PACKED, _words(shape), dtype, "bl3hd",
        draw=lambda generator: (normal(generator, shape.batch, shape.queries, width, dtype=dtype),),
        samples=1,
        ours=lambda qkv: attention_qkv(qkv, shape.heads),
        eager=run,
        costs=_costs(shape, dtype),
        rivals=_rivals(dtype, run),
        timed=timed,
    )  # fmt: skip


def _costs(shape: Shape, dtype: str) -> dict[str, Cost]:
    size = DTYPES[dtype].itemsize
    return {
        FORWARD: Cost(bytes_moved(shape, size), flops(shape)),
        BACKWARD: Cost(bytes_moved(shape, size, backward=True), flops(shape, backward=True)),
    }


def _rivals(dtype: str, function: Function) -> dict[str, Function]:
    """The kernels behind PyTorch's operator; of float32 only one exists."""
    return {
        name: partial(_restricted, backend, function)
        for name, backend in RIVALS.items()
        if dtype != "fp32" or name == "efficient"
    }


def _restricted(backend: SDPBackend, function: Function, *inputs: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        result = function(*inputs)
    assert isinstance(result, Tensor)
    return result
