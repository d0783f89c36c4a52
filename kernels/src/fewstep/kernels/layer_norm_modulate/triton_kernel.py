"""Modulated LayerNorm in Triton, forward and backward; memory is read once.

Everywhere: xhat = (x - mean) rstd, y = xhat gain + offset with gain = weight (1 + scale) and offset = bias (1 + scale)
+ shift per sample and channel. Each row's first value is taken off x before anything else, and means are of what is
left: where they are hundreds of standard deviations, no digit is lost. A program takes rows of one sample, in tiles of
ROWS x CHANNELS, each a power of two.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.configuration import Configuration
from fewstep.kernels.group_norm_silu.plan import power_above
from fewstep.kernels.group_norm_silu.triton_kernel import Launch, affine_of, bound, parameter_launches, variants
from fewstep.kernels.layer_norm_modulate.shapes import SHAPES, Shape

PROGRAMS = 512                             # to aim at in the backward pass, each of which leaves sums over its rows
TILE = 4096                                # elements; a backward tile has half


@triton.jit
def _off_pivot(x, at, row, row_live, live, C, ACC: tl.constexpr):
    """[r, c]: x less the first value of its row, 0 where it is not live."""
    pivot = tl.load(x + row * C, row_live, other=0.0).to(ACC)
    return tl.where(live, tl.load(x + at, live, other=0.0).to(ACC) - pivot[:, None], 0.0)


@triton.jit
def _moments(x, live, C, eps):
    """[r]: mean and rstd of each row, by two passes over what is on chip; x is 0 where it is not live."""
    mean = tl.sum(x, 1) / C
    off = tl.where(live, x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(off * off, 1) / C + eps)


@triton.jit
def forward_kernel(
    x, scale, shift, weight, bias, y, mean, rstd, scale_row, shift_row, L, C, parts, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """One program per ROWS rows of a sample. x, y (B, L, C); mean, rstd (B, L)."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample = (tl.program_id(0) // parts).to(tl.int64)
    row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    live = (row < L)[:, None] & (channel < C)[None, :]
    at = (sample * L + row)[:, None] * C + channel[None, :]
    value = _off_pivot(x, at, sample * L + row, row < L, live, C, ACC)
    row_mean, row_rstd = _moments(value, live, C, eps)
    gain, offset = affine_of(weight, bias, scale, shift, sample, scale_row, shift_row, channel, channel < C, ACC)
    result = (value - row_mean[:, None]) * row_rstd[:, None] * gain[None, :] + offset[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), live)
    tl.store(mean + sample * L + row, row_mean, row < L)
    tl.store(rstd + sample * L + row, row_rstd, row < L)


@triton.jit
def backward_kernel(
    x, dy, scale, shift, weight, bias, mean, rstd, dx, a, b, scale_row, shift_row, L, C, parts, part_rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """One program per part of a sample's rows: dx, and a = sum(dy xhat), b = sum(dy) (B, parts, C) over its rows."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    channel = tl.arange(0, CHANNELS)
    gain, _ = affine_of(weight, bias, scale, shift, sample, scale_row, shift_row, channel, channel < C, ACC)
    lane_a = tl.zeros([ROWS, CHANNELS], ACC)
    lane_b = tl.zeros([ROWS, CHANNELS], ACC)
    end = tl.minimum((part + 1) * part_rows, L)
    for first in range(part * part_rows, end, ROWS):
        row = first + tl.arange(0, ROWS)
        live = (row < end)[:, None] & (channel < C)[None, :]
        at = (sample * L + row)[:, None] * C + channel[None, :]
        row_mean = tl.load(mean + sample * L + row, row < end, other=0.0)
        row_rstd = tl.load(rstd + sample * L + row, row < end, other=0.0)
        xhat = _off_pivot(x, at, sample * L + row, row < end, live, C, ACC)
        xhat = tl.where(live, (xhat - row_mean[:, None]) * row_rstd[:, None], 0.0)
        gradient = tl.load(dy + at, live, other=0.0).to(ACC)
        lane_a += gradient * xhat
        lane_b += gradient
        gradient *= gain[None, :]
        mean_a = tl.sum(gradient * xhat, 1) / C
        mean_b = tl.sum(gradient, 1) / C
        gradient = row_rstd[:, None] * (gradient - mean_b[:, None] - xhat * mean_a[:, None])
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), live)
    at = (sample * parts + part) * C + channel
    tl.store(a + at, tl.sum(lane_a, 0), channel < C)
    tl.store(b + at, tl.sum(lane_b, 0), channel < C)


class Plan(NamedTuple):
    """How rows are cut: rows of a tile, programs per sample, rows of each, warps."""

    rows: int
    parts: int
    part_rows: int
    warps: int


@lru_cache(maxsize=4096)
def plan(batch: int, length: int, channels: int, backward: bool) -> Plan:
    """Cut x (batch, length, channels)."""
    across, tile = power_above(channels), TILE // 2 if backward else TILE
    rows = max(1, min(tile // across, power_above(length)))
    tiles = -(-length // rows)
    parts = min(tiles, max(1, PROGRAMS // batch)) if backward else tiles
    part_rows = -(-tiles // parts) * rows
    warps = min(16, max(4, rows * across // (256 if backward else 512)))
    return Plan(rows, -(-length // part_rows), part_rows, warps)


def forward_launches(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor,
    mean: Tensor, rstd: Tensor,
) -> list[Launch]:
    """Return what computes y, mean and rstd, all allocated by the caller."""
    batch, length, channels = x.shape
    p = plan(batch, length, channels, backward=False)
    args = {"x": x, "scale": scale, "shift": shift, "weight": weight, "bias": bias, "y": y, "mean": mean, "rstd": rstd,
            "scale_row": scale.stride(0), "shift_row": shift.stride(0), "L": length, "C": channels, "parts": p.parts,
            "eps": eps}
    return [bound(forward_kernel, batch * p.parts, p.warps, args, _tile(p, channels))]


def backward_launches(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    rstd: Tensor, dx: Tensor, parameters: tuple[Tensor | None, ...],
) -> list[Launch]:
    """Return what computes dx and the gradients of weight, bias, scale and shift, all allocated by the caller."""
    batch, length, channels = x.shape
    p = plan(batch, length, channels, backward=True)
    a, b = torch.empty((2, batch, p.parts, channels), dtype=mean.dtype, device=x.device)
    affine = {"scale": scale, "shift": shift, "weight": weight, "bias": bias}
    args = {"x": x, "dy": dy, **affine, "mean": mean, "rstd": rstd, "dx": dx, "a": a, "b": b,
            "scale_row": scale.stride(0), "shift_row": shift.stride(0), "L": length, "C": channels, "parts": p.parts,
            "part_rows": p.part_rows}
    return [
        bound(backward_kernel, batch * p.parts, p.warps, args, _tile(p, channels)),
        *parameter_launches({"a": a, "b": b}, affine, parameters, batch, channels, p.parts),
    ]


def _tile(p: Plan, channels: int) -> dict[str, Any]:
    return {"ROWS": p.rows, "CHANNELS": power_above(channels)}


def forward(*args: Any) -> None:
    """Compute what `forward_launches` says."""
    for launch in forward_launches(*args):
        launch.run()


def backward(*args: Any) -> None:
    """Compute what `backward_launches` says."""
    for launch in backward_launches(*args):
        launch.run()


def configurations() -> Iterator[Configuration]:
    """Yield what the promised shapes launch, forward and backward, in every dtype."""
    yield from variants(
        launch
        for shape in SHAPES
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for launch in _launches_of(shape, dtype)
    )


def _launches_of(shape: Shape, dtype: torch.dtype) -> list[Launch]:
    """What a training step launches for a shape, on tensors without memory."""
    x = torch.empty(shape.batch, shape.tokens, shape.channels, dtype=dtype, device="meta")
    scale, shift = torch.empty(shape.batch, 6 * shape.channels, dtype=dtype, device="meta").chunk(6, 1)[:2]
    mean = torch.empty(shape.batch, shape.tokens, device="meta")
    return forward_launches(x, scale, shift, None, None, 1e-6, x, mean, mean) + backward_launches(
        x, x, scale, shift, None, None, mean, mean, x, (None, None, scale, shift)
    )
