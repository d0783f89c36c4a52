"""GroupNorm, FiLM, SiLU and residual in Triton, forward and backward, contiguous and channels_last in one source.

Everywhere: xhat = (x - mean) rstd, v = xhat gain + offset, y = silu(v) with gain = weight (1 + scale) and
offset = bias (1 + scale) + shift per sample and channel. Each group's first value, its pivot, is taken off x before
anything else, and means are of what is left: where they are hundreds of standard deviations, no digit is lost.
A program takes GROUPS whole groups of one sample, from its channel `first` on, and the pixels [start, end); it walks
over them in tiles of CHANNELS x PIXELS.

Shapes: [c] CHANNELS, [p] PIXELS, [g] GROUPS_TILE, [k] CHUNKS_TILE, powers of two whose surplus lanes are masked.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.backend import layout
from fewstep.kernels.configuration import Configuration
from fewstep.kernels.group_norm_silu.plan import Plan, plan, power_above, registers_for
from fewstep.kernels.group_norm_silu.shapes import SHAPES, Shape


@triton.jit
def _place(blocks, chunks, REVERSED: tl.constexpr):
    """Sample, chunk and block of this program; the second of two launches begins with what was read last."""
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    return (program // blocks // chunks).to(tl.int64), program // blocks % chunks, program % blocks


@triton.jit
def _members(lane, SIZE: tl.constexpr, GROUPS_TILE: tl.constexpr):
    """[g, c]: whether a channel lane is of a group."""
    return (lane // SIZE)[None, :] == tl.arange(0, GROUPS_TILE)[:, None]


@triton.jit
def _per_group(value, member):
    """[c] -> [g]: the sum over the channels of each group."""
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)


@triton.jit
def _per_channel(value, member):
    """[g] -> [c]: the value of each channel's group."""
    return tl.sum(tl.where(member, value[:, None], 0.0), 0)


@triton.jit
def _at(channel, pixel, C, S, LAST: tl.constexpr):
    """[c, p]: offsets within one sample."""
    if LAST:
        at = pixel[None, :] * C + channel[:, None]
    else:
        at = channel[:, None] * S + pixel[None, :]
    return at


@triton.jit
def _read(x, residual, at, live, BEFORE: tl.constexpr, ACC: tl.constexpr):
    """x, or x + residual rounded as it is stored."""
    value = tl.load(x + at, live, other=0.0).to(ACC)
    if BEFORE:
        value = (value + tl.load(residual + at, live, other=0.0).to(ACC)).to(x.dtype.element_ty).to(ACC)
    return value


@triton.jit
def _pivot(
    x, residual, lane, first, C, S, SIZE: tl.constexpr, GROUPS: tl.constexpr, BEFORE: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """[c]: the first value of each channel's group. A group that is walked over in several tiles is the only one."""
    channel = first + lane // SIZE * SIZE
    live = (lane < SIZE * GROUPS) & (channel < C)
    return _read(x, residual, channel if LAST else channel * S, live, BEFORE, ACC)


@triton.jit
def affine_of(weight, bias, scale, shift, sample, scale_row, shift_row, channel, live, ACC: tl.constexpr):
    """[c]: gain and offset."""
    gain = tl.full(channel.shape, 1.0, ACC)
    offset = tl.zeros(channel.shape, ACC)
    if weight is not None:
        gain = tl.load(weight + channel, live, other=0.0).to(ACC)
    if bias is not None:
        offset = tl.load(bias + channel, live, other=0.0).to(ACC)
    if scale is not None:
        factor = 1.0 + tl.load(scale + sample * scale_row + channel, live, other=0.0).to(ACC)
        gain = gain * factor
        offset = offset * factor
    if shift is not None:
        offset = offset + tl.load(shift + sample * shift_row + channel, live, other=0.0).to(ACC)
    return gain, offset


@triton.jit
def _moments(mean, m2, count, member, total):
    """Merge the mean and sum of squared deviations that each lane [c, p] has of `count` values (Chan et al. 1983).

    Returns [g]: those of the `total` values of each group. With one value per lane this is the variance by two passes.
    """
    group_mean = _per_group(tl.sum(mean * count, 1), member) / total
    off = mean - _per_channel(group_mean, member)[:, None]
    return group_mean, _per_group(tl.sum(m2 + count * off * off, 1), member)


@triton.jit
def _walk_moments(
    x, residual, total, first, C, S, start, end, SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, BEFORE: tl.constexpr, STORES: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """[g]: mean and sum of squared deviations over the pixels [start, end), updated lane by lane (Welford)."""
    lane, pixel_lane = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    SPAN: tl.constexpr = SIZE * GROUPS
    mean = tl.zeros([CHANNELS, PIXELS], ACC)
    m2 = tl.zeros([CHANNELS, PIXELS], ACC)
    seen = tl.zeros([CHANNELS], tl.int32)                        # values that a channel lane has met
    pivot = _pivot(x, residual, lane, first, C, S, SIZE, GROUPS, BEFORE, LAST, ACC)
    for p in range(start, end, PIXELS):
        pixel = p + pixel_lane
        for k in range(0, SPAN, CHANNELS):
            channel_live = (k + lane < SPAN) & (first + k + lane < C)
            live = channel_live[:, None] & (pixel < end)[None, :]
            at = _at(first + k + lane, pixel, C, S, LAST)
            value = _read(x, residual, at, live, BEFORE, ACC)
            if STORES:
                tl.store(total + at, value.to(total.dtype.element_ty), live)
            seen += channel_live.to(tl.int32)
            share = 1.0 / tl.maximum(seen, 1).to(ACC)
            value -= pivot[:, None]
            off = tl.where(live, value - mean, 0.0)
            mean += off * share[:, None]
            m2 += off * (value - mean)
    of_channel = (tl.minimum(SPAN, C - first) - lane + CHANNELS - 1) // CHANNELS
    of_pixel = (end - start - pixel_lane + PIXELS - 1) // PIXELS
    count = (of_channel[:, None] * of_pixel[None, :]).to(ACC)
    return _moments(mean, m2, count, _members(lane, SIZE, GROUPS_TILE), tl.cast(SIZE * (end - start), ACC))


@triton.jit
def _result(value, pivot, mean, rstd, gain, offset, ACT: tl.constexpr):
    """[c, p]: act(xhat gain + offset)."""
    slope = rstd * gain
    v = (value - pivot[:, None]) * slope[:, None] + (offset - mean * slope)[:, None]
    if ACT:
        v = v * tl.sigmoid(v)
    return v


@triton.jit
def _walk_result(
    x, residual, weight, bias, scale, shift, y, total, sample, scale_row, shift_row, first, C, S, start, end,
    mean, rstd, SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, ACT: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write y (and x + residual) from the groups' mean and rstd [g]."""
    lane, pixel_lane = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    SPAN: tl.constexpr = SIZE * GROUPS
    member = _members(lane, SIZE, GROUPS_TILE)
    mean, rstd = _per_channel(mean, member), _per_channel(rstd, member)
    pivot = _pivot(x, residual, lane, first, C, S, SIZE, GROUPS, BEFORE, LAST, ACC)
    for k in range(0, SPAN, CHANNELS):
        channel = first + k + lane
        channel_live = (k + lane < SPAN) & (channel < C)
        gain, offset = affine_of(weight, bias, scale, shift, sample, scale_row, shift_row, channel, channel_live, ACC)
        for p in range(start, end, PIXELS):
            pixel = p + pixel_lane
            live = channel_live[:, None] & (pixel < end)[None, :]
            at = _at(channel, pixel, C, S, LAST)
            value = _read(x, residual, at, live, BEFORE, ACC)
            if BEFORE:
                tl.store(total + at, value.to(total.dtype.element_ty), live)
            v = _result(value, pivot, mean, rstd, gain, offset, ACT)
            if AFTER:
                v += tl.load(residual + at, live, other=0.0).to(ACC)
            tl.store(y + at, v.to(y.dtype.element_ty), live)


@triton.jit
def _store_groups(
    out, value, row, block, C, SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr
):
    """[g] into row `row` of out (rows, C / SIZE)."""
    lane = tl.arange(0, GROUPS_TILE)
    group = block * GROUPS + lane
    tl.store(out + row * (C // SIZE) + group, value, (lane < GROUPS) & (group < C // SIZE))


@triton.jit
def forward_one(
    x, residual, weight, bias, scale, shift, y, total, mean, rstd, scale_row, shift_row, C, S, blocks, eps,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    RESIDENT: tl.constexpr, ACT: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, LAST: tl.constexpr,
):
    """One program per sample and block of groups. x, residual, y, total (B, C, S); mean, rstd (B, C / SIZE)."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample, _, block = _place(blocks, 1, False)
    first = block * (SIZE * GROUPS)
    x += sample * C * S
    y += sample * C * S
    if BEFORE or AFTER:
        residual += sample * C * S
    if BEFORE:
        total += sample * C * S
    lane, pixel = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    if RESIDENT:
        member = _members(lane, SIZE, GROUPS_TILE)
        channel_live = (lane < SIZE * GROUPS) & (first + lane < C)
        live = channel_live[:, None] & (pixel < S)[None, :]
        at = _at(first + lane, pixel, C, S, LAST)
        value = _read(x, residual, at, live, BEFORE, ACC)
        if BEFORE:
            tl.store(total + at, value.to(total.dtype.element_ty), live)
        pivot = _pivot(x, residual, lane, first, C, S, SIZE, GROUPS, BEFORE, LAST, ACC)
        group_mean, m2 = _moments(value - pivot[:, None], 0.0, live.to(ACC), member, tl.cast(SIZE * S, ACC))
    else:
        group_mean, m2 = _walk_moments(
            x, residual, total, first, C, S, 0, S, SIZE, GROUPS, GROUPS_TILE, CHANNELS, PIXELS, BEFORE, False, LAST, ACC
        )
    group_rstd = 1.0 / tl.sqrt(m2 / tl.cast(SIZE * S, ACC) + eps)
    if RESIDENT:
        gain, offset = affine_of(
            weight, bias, scale, shift, sample, scale_row, shift_row, first + lane, channel_live, ACC
        )
        v = _result(
            value, pivot, _per_channel(group_mean, member), _per_channel(group_rstd, member), gain, offset, ACT
        )
        if AFTER:
            v += tl.load(residual + at, live, other=0.0).to(ACC)
        tl.store(y + at, v.to(y.dtype.element_ty), live)
    else:
        _walk_result(
            x, residual, weight, bias, scale, shift, y, total, sample, scale_row, shift_row, first, C, S, 0, S,
            group_mean, group_rstd, SIZE, GROUPS, GROUPS_TILE, CHANNELS, PIXELS, ACT, BEFORE, AFTER, LAST, ACC
        )
    _store_groups(mean, group_mean, sample, block, C, SIZE, GROUPS, GROUPS_TILE)
    _store_groups(rstd, group_rstd, sample, block, C, SIZE, GROUPS, GROUPS_TILE)


@triton.jit
def forward_moments(
    x, residual, total, part_mean, part_m2, C, S, blocks, chunks, chunk,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    BEFORE: tl.constexpr, LAST: tl.constexpr,
):
    """First of two launches: mean and sum of squared deviations of each chunk into (B, chunks, C / SIZE)."""
    ACC: tl.constexpr = part_mean.dtype.element_ty
    sample, part, block = _place(blocks, chunks, False)
    x += sample * C * S
    if BEFORE:
        residual += sample * C * S
        total += sample * C * S
    start = part * chunk
    group_mean, m2 = _walk_moments(
        x, residual, total, block * (SIZE * GROUPS), C, S, start, tl.minimum(start + chunk, S),
        SIZE, GROUPS, GROUPS_TILE, CHANNELS, PIXELS, BEFORE, BEFORE, LAST, ACC
    )
    row = sample * chunks + part
    _store_groups(part_mean, group_mean, row, block, C, SIZE, GROUPS, GROUPS_TILE)
    _store_groups(part_m2, m2, row, block, C, SIZE, GROUPS, GROUPS_TILE)


@triton.jit
def _load_parts(
    part, sample, block, chunks, C, SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr,
    CHUNKS_TILE: tl.constexpr,
):
    """[k, g]: what the chunks of this program's groups left in part (B, chunks, C / SIZE)."""
    k, lane = tl.arange(0, CHUNKS_TILE), tl.arange(0, GROUPS_TILE)
    group = block * GROUPS + lane
    live = (k < chunks)[:, None] & ((lane < GROUPS) & (group < C // SIZE))[None, :]
    return tl.load(part + (sample * chunks + k[:, None]) * (C // SIZE) + group[None, :], live, other=0.0)


@triton.jit
def forward_apply(
    x, residual, weight, bias, scale, shift, part_mean, part_m2, y, mean, rstd, scale_row, shift_row, C, S, blocks,
    chunks, chunk, eps,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    CHUNKS_TILE: tl.constexpr, ACT: tl.constexpr, AFTER: tl.constexpr, LAST: tl.constexpr,
):
    """Second of two launches: merge the chunks' moments, write y. Where x + residual is normalised, x is that sum."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample, part, block = _place(blocks, chunks, True)
    k = tl.arange(0, CHUNKS_TILE)
    count = (SIZE * tl.maximum(tl.minimum(chunk, S - k * chunk), 0)).to(ACC)[:, None]
    part_means = _load_parts(part_mean, sample, block, chunks, C, SIZE, GROUPS, GROUPS_TILE, CHUNKS_TILE)
    part_m2s = _load_parts(part_m2, sample, block, chunks, C, SIZE, GROUPS, GROUPS_TILE, CHUNKS_TILE)
    total_count = tl.cast(SIZE * S, ACC)
    group_mean = tl.sum(part_means * count, 0) / total_count
    off = part_means - group_mean[None, :]
    group_rstd = 1.0 / tl.sqrt(tl.sum(part_m2s + count * off * off, 0) / total_count + eps)
    x += sample * C * S
    y += sample * C * S
    if AFTER:
        residual += sample * C * S
    start = part * chunk
    _walk_result(
        x, residual, weight, bias, scale, shift, y, y, sample, scale_row, shift_row, block * (SIZE * GROUPS), C, S,
        start, tl.minimum(start + chunk, S), group_mean, group_rstd,
        SIZE, GROUPS, GROUPS_TILE, CHANNELS, PIXELS, ACT, False, AFTER, LAST, ACC
    )
    if part == 0:
        _store_groups(mean, group_mean, sample, block, C, SIZE, GROUPS, GROUPS_TILE)
        _store_groups(rstd, group_rstd, sample, block, C, SIZE, GROUPS, GROUPS_TILE)


@triton.jit
def _load_groups(
    source, sample, block, C, SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr
):
    """[g] of source (B, C / SIZE)."""
    lane = tl.arange(0, GROUPS_TILE)
    group = block * GROUPS + lane
    return tl.load(source + sample * (C // SIZE) + group, (lane < GROUPS) & (group < C // SIZE), other=0.0)


@triton.jit
def _pulled_back(value, dy, pivot, mean, rstd, gain, offset, ACT: tl.constexpr):
    """[c, p]: xhat and the gradient of v = xhat gain + offset."""
    xhat = (value - pivot[:, None]) * rstd[:, None] - (mean * rstd)[:, None]
    if ACT:
        v = xhat * gain[:, None] + offset[:, None]
        s = tl.sigmoid(v)
        dy = dy * (s * (1.0 + v * (1.0 - s)))
    return xhat, dy


@triton.jit
def _walk_sums(
    x, dy, weight, bias, scale, shift, a, b, sample, row, scale_row, shift_row, first, C, S, start, end, mean, rstd,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    ACT: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):
    """Write each channel's a = sum(dv xhat), b = sum(dv); return their sums over each group [g], times gain."""
    lane, pixel_lane = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    SPAN: tl.constexpr = SIZE * GROUPS
    member = _members(lane, SIZE, GROUPS_TILE)
    mean, rstd = _per_channel(mean, member), _per_channel(rstd, member)
    pivot = _pivot(x, x, lane, first, C, S, SIZE, GROUPS, False, LAST, ACC)
    group_a = tl.zeros([GROUPS_TILE], ACC)
    group_b = tl.zeros([GROUPS_TILE], ACC)
    for k in range(0, SPAN, CHANNELS):
        channel = first + k + lane
        channel_live = (k + lane < SPAN) & (channel < C)
        gain, offset = affine_of(weight, bias, scale, shift, sample, scale_row, shift_row, channel, channel_live, ACC)
        lane_a = tl.zeros([CHANNELS, PIXELS], ACC)
        lane_b = tl.zeros([CHANNELS, PIXELS], ACC)
        for p in range(start, end, PIXELS):
            pixel = p + pixel_lane
            live = channel_live[:, None] & (pixel < end)[None, :]
            at = _at(channel, pixel, C, S, LAST)
            value = tl.load(x + at, live, other=0.0).to(ACC)
            dv = tl.load(dy + at, live, other=0.0).to(ACC)
            xhat, dv = _pulled_back(value, dv, pivot, mean, rstd, gain, offset, ACT)
            lane_a += dv * xhat
            lane_b += dv
        channel_a, channel_b = tl.sum(lane_a, 1), tl.sum(lane_b, 1)
        tl.store(a + row * C + channel, channel_a, channel_live)
        tl.store(b + row * C + channel, channel_b, channel_live)
        group_a += _per_group(channel_a * gain, member)
        group_b += _per_group(channel_b * gain, member)
    return group_a, group_b


@triton.jit
def _walk_gradient(
    x, dy, dtotal, weight, bias, scale, shift, dx, sample, scale_row, shift_row, first, C, S, start, end, mean, rstd,
    mean_a, mean_b, SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, ACT: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):
    """Write dx = rstd (dv gain - mean_b - xhat mean_a) (+ dtotal); mean_a, mean_b [g]: group means of those sums."""
    lane, pixel_lane = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    SPAN: tl.constexpr = SIZE * GROUPS
    member = _members(lane, SIZE, GROUPS_TILE)
    mean, rstd = _per_channel(mean, member), _per_channel(rstd, member)
    mean_a, mean_b = _per_channel(mean_a, member), _per_channel(mean_b, member)
    pivot = _pivot(x, x, lane, first, C, S, SIZE, GROUPS, False, LAST, ACC)
    for k in range(0, SPAN, CHANNELS):
        channel = first + k + lane
        channel_live = (k + lane < SPAN) & (channel < C)
        gain, offset = affine_of(weight, bias, scale, shift, sample, scale_row, shift_row, channel, channel_live, ACC)
        for p in range(start, end, PIXELS):
            pixel = p + pixel_lane
            live = channel_live[:, None] & (pixel < end)[None, :]
            at = _at(channel, pixel, C, S, LAST)
            value = tl.load(x + at, live, other=0.0).to(ACC)
            dv = tl.load(dy + at, live, other=0.0).to(ACC)
            xhat, dv = _pulled_back(value, dv, pivot, mean, rstd, gain, offset, ACT)
            gradient = _gradient(xhat, dv, rstd, gain, mean_a, mean_b)
            if dtotal is not None:
                gradient += tl.load(dtotal + at, live, other=0.0).to(ACC)
            tl.store(dx + at, gradient.to(dx.dtype.element_ty), live)


@triton.jit
def _gradient(xhat, dv, rstd, gain, mean_a, mean_b):
    return rstd[:, None] * (dv * gain[:, None] - mean_b[:, None] - xhat * mean_a[:, None])


@triton.jit
def backward_one(
    x, dy, dtotal, weight, bias, scale, shift, mean, rstd, dx, a, b, scale_row, shift_row, C, S, blocks,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    RESIDENT: tl.constexpr, ACT: tl.constexpr, LAST: tl.constexpr,
):
    """One program per sample and block of groups. x, dy, dtotal, dx (B, C, S); a, b (B, C)."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample, _, block = _place(blocks, 1, False)
    first = block * (SIZE * GROUPS)
    x += sample * C * S
    dy += sample * C * S
    dx += sample * C * S
    if dtotal is not None:
        dtotal += sample * C * S
    group_mean = _load_groups(mean, sample, block, C, SIZE, GROUPS, GROUPS_TILE)
    group_rstd = _load_groups(rstd, sample, block, C, SIZE, GROUPS, GROUPS_TILE)
    count = tl.cast(SIZE * S, ACC)
    if RESIDENT:
        lane, pixel = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
        member = _members(lane, SIZE, GROUPS_TILE)
        channel = first + lane
        channel_live = (lane < SIZE * GROUPS) & (channel < C)
        live = channel_live[:, None] & (pixel < S)[None, :]
        at = _at(channel, pixel, C, S, LAST)
        value = tl.load(x + at, live, other=0.0).to(ACC)
        dv = tl.load(dy + at, live, other=0.0).to(ACC)
        gain, offset = affine_of(weight, bias, scale, shift, sample, scale_row, shift_row, channel, channel_live, ACC)
        channel_rstd = _per_channel(group_rstd, member)
        pivot = _pivot(x, x, lane, first, C, S, SIZE, GROUPS, False, LAST, ACC)
        channel_mean = _per_channel(group_mean, member)
        xhat, dv = _pulled_back(value, dv, pivot, channel_mean, channel_rstd, gain, offset, ACT)
        channel_a, channel_b = tl.sum(dv * xhat, 1), tl.sum(dv, 1)
        tl.store(a + sample * C + channel, channel_a, channel_live)
        tl.store(b + sample * C + channel, channel_b, channel_live)
        mean_a = _per_channel(_per_group(channel_a * gain, member) / count, member)
        mean_b = _per_channel(_per_group(channel_b * gain, member) / count, member)
        gradient = _gradient(xhat, dv, channel_rstd, gain, mean_a, mean_b)
        if dtotal is not None:
            gradient += tl.load(dtotal + at, live, other=0.0).to(ACC)
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), live)
    else:
        group_a, group_b = _walk_sums(
            x, dy, weight, bias, scale, shift, a, b, sample, sample, scale_row, shift_row, first, C, S, 0, S,
            group_mean, group_rstd, SIZE, GROUPS, GROUPS_TILE, CHANNELS, PIXELS, ACT, LAST, ACC
        )
        _walk_gradient(
            x, dy, dtotal, weight, bias, scale, shift, dx, sample, scale_row, shift_row, first, C, S, 0, S,
            group_mean, group_rstd, group_a / count, group_b / count,
            SIZE, GROUPS, GROUPS_TILE, CHANNELS, PIXELS, ACT, LAST, ACC
        )


@triton.jit
def backward_sums(
    x, dy, weight, bias, scale, shift, mean, rstd, a, b, part_a, part_b, scale_row, shift_row, C, S, blocks, chunks,
    chunk,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    ACT: tl.constexpr, LAST: tl.constexpr,
):
    """First of two launches: each chunk's sums, per channel into a, b (B, chunks, C), per group into part_a, part_b."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample, part, block = _place(blocks, chunks, False)
    row, start = sample * chunks + part, part * chunk
    group_a, group_b = _walk_sums(
        x + sample * C * S, dy + sample * C * S, weight, bias, scale, shift, a, b, sample, row, scale_row, shift_row,
        block * (SIZE * GROUPS), C, S, start, tl.minimum(start + chunk, S),
        _load_groups(mean, sample, block, C, SIZE, GROUPS, GROUPS_TILE),
        _load_groups(rstd, sample, block, C, SIZE, GROUPS, GROUPS_TILE),
        SIZE, GROUPS, GROUPS_TILE, CHANNELS, PIXELS, ACT, LAST, ACC
    )
    _store_groups(part_a, group_a, row, block, C, SIZE, GROUPS, GROUPS_TILE)
    _store_groups(part_b, group_b, row, block, C, SIZE, GROUPS, GROUPS_TILE)


@triton.jit
def backward_apply(
    x, dy, dtotal, weight, bias, scale, shift, mean, rstd, part_a, part_b, dx, scale_row, shift_row, C, S, blocks,
    chunks, chunk,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUPS_TILE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    CHUNKS_TILE: tl.constexpr, ACT: tl.constexpr, LAST: tl.constexpr,
):
    """Second of two launches: add the chunks' sums and write dx."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample, part, block = _place(blocks, chunks, True)
    count = tl.cast(SIZE * S, ACC)
    mean_a = tl.sum(_load_parts(part_a, sample, block, chunks, C, SIZE, GROUPS, GROUPS_TILE, CHUNKS_TILE), 0) / count
    mean_b = tl.sum(_load_parts(part_b, sample, block, chunks, C, SIZE, GROUPS, GROUPS_TILE, CHUNKS_TILE), 0) / count
    if dtotal is not None:
        dtotal += sample * C * S
    start = part * chunk
    _walk_gradient(
        x + sample * C * S, dy + sample * C * S, dtotal, weight, bias, scale, shift, dx + sample * C * S, sample,
        scale_row, shift_row, block * (SIZE * GROUPS), C, S, start, tl.minimum(start + chunk, S),
        _load_groups(mean, sample, block, C, SIZE, GROUPS, GROUPS_TILE),
        _load_groups(rstd, sample, block, C, SIZE, GROUPS, GROUPS_TILE),
        mean_a, mean_b, SIZE, GROUPS, GROUPS_TILE, CHANNELS, PIXELS, ACT, LAST, ACC
    )


@triton.jit
def parameter_gradients(
    a, b, weight, bias, scale, dweight, dbias, dscale, dshift, scale_row, B, C, chunks,
    SAMPLES: tl.constexpr, CHUNKS_TILE: tl.constexpr, CHANNELS: tl.constexpr,
):
    """One program per CHANNELS channels: all samples and chunks of a, b (B, chunks, C), in a fixed order.

    v = (xhat weight + bias) (1 + scale) + shift: dshift = b, dscale = weight a + bias b, dweight = sum((1 + scale) a).
    """
    ACC: tl.constexpr = a.dtype.element_ty
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_live = channel < C
    total_a = tl.zeros([SAMPLES, CHANNELS], ACC)
    total_b = tl.zeros([SAMPLES, CHANNELS], ACC)
    for first in range(0, B, SAMPLES):
        sample = first + tl.arange(0, SAMPLES).to(tl.int64)
        live = (sample < B)[:, None] & channel_live[None, :]
        sample_a = tl.zeros([SAMPLES, CHANNELS], ACC)
        sample_b = tl.zeros([SAMPLES, CHANNELS], ACC)
        for k in range(0, chunks, CHUNKS_TILE):
            part = k + tl.arange(0, CHUNKS_TILE)
            at = ((sample[:, None] * chunks + part[None, :]) * C)[:, :, None] + channel[None, None, :]
            here = live[:, None, :] & (part < chunks)[None, :, None]
            sample_a += tl.sum(tl.load(a + at, here, other=0.0), 1)
            sample_b += tl.sum(tl.load(b + at, here, other=0.0), 1)
        at = sample[:, None] * C + channel[None, :]
        if dshift is not None:
            tl.store(dshift + at, sample_b.to(dshift.dtype.element_ty), live)
        if dscale is not None:
            gradient = sample_a
            if weight is not None:
                gradient *= tl.load(weight + channel, channel_live, other=0.0).to(ACC)[None, :]
            if bias is not None:
                gradient += sample_b * tl.load(bias + channel, channel_live, other=0.0).to(ACC)[None, :]
            tl.store(dscale + at, gradient.to(dscale.dtype.element_ty), live)
        factor = tl.full([SAMPLES, CHANNELS], 1.0, ACC)
        if scale is not None:
            factor += tl.load(scale + sample[:, None] * scale_row + channel[None, :], live, other=0.0).to(ACC)
        total_a += factor * sample_a
        total_b += factor * sample_b
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(total_a, 0).to(dweight.dtype.element_ty), channel_live)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(total_b, 0).to(dbias.dtype.element_ty), channel_live)


POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
_planned = lru_cache(maxsize=4096)(plan)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments, complete but not started."""

    configuration: Configuration
    programs: int
    args: tuple[Any, ...]

    def run(self) -> None:
        """Start it on the current stream."""
        self.configuration.launch((self.programs,), *self.args)


def bound(
    kernel: Any, programs: int, warps: int, args: Mapping[str, Any], constants: Mapping[str, Any],
    registers: int | None = None,
) -> Launch:
    """Bind arguments, in the order of the kernel's parameters; absent tensors become constants."""
    given = {name: value for name, value in args.items() if value is not None}
    absent = {name: None for name, value in args.items() if value is None}
    types = {name: _type(value) for name, value in given.items()}
    configuration = Configuration(
        f"{kernel.__name__} {' '.join(types.values())} {dict(constants)} {sorted(absent)}", kernel, types,
        absent | dict(constants), num_warps=warps, maxnreg=registers,
        divisible=tuple(name for name, value in given.items() if isinstance(value, int) and value % 16 == 0),
    )
    return Launch(configuration, programs, tuple(given.values()))


def variants(launches: Iterable[Launch]) -> Iterator[Configuration]:
    """Yield the configurations of launches, each once."""
    yield from {launch.configuration.name: launch.configuration for launch in launches}.values()


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def _cut(x: Tensor, groups: int, backward: bool) -> Plan:
    batch, channels = x.shape[:2]
    last = layout(x) == "channels_last"
    return _planned(batch, channels, groups, x[0, 0].numel(), x.element_size(), last, backward)


def _row(per_sample: Tensor | None) -> int:
    return 0 if per_sample is None else per_sample.stride(0)


def _tile(p: Plan, x: Tensor, groups: int) -> dict[str, Any]:
    return {
        "SIZE": x.shape[1] // groups, "GROUPS": p.groups, "GROUPS_TILE": power_above(p.groups), "CHANNELS": p.channels,
        "PIXELS": p.pixels, "LAST": layout(x) == "channels_last",
    }


def forward_launches(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, act: bool, before: bool, y: Tensor, total: Tensor | None,
    mean: Tensor, rstd: Tensor,
) -> list[Launch]:
    """Return what computes y, mean and rstd (and total = x + residual if `before`), all allocated by the caller."""
    p, tile = _cut(x, groups, backward=False), _tile(_cut(x, groups, backward=False), x, groups)
    batch, channels, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
    programs = batch * p.blocks * p.chunks
    affine = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    rows = {"scale_row": _row(scale), "shift_row": _row(shift)}
    sizes = {"C": channels, "S": pixels, "blocks": p.blocks}
    modes = {"ACT": act, "AFTER": residual is not None and not before}
    if p.tier != "two_phase":
        args = {"x": x, "residual": residual, **affine, "y": y, "total": total, "mean": mean, "rstd": rstd, **rows,
                **sizes, "eps": eps}
        constants = tile | modes | {"BEFORE": before, "RESIDENT": p.tier == "resident"}
        return [bound(forward_one, programs, p.warps, args, constants, p.registers)]
    part_mean, part_m2 = torch.empty((2, batch, p.chunks, groups), dtype=mean.dtype, device=x.device)
    parts, sizes = {"part_mean": part_mean, "part_m2": part_m2}, sizes | {"chunks": p.chunks, "chunk": p.chunk}
    first = {"x": x, "residual": residual if before else None, "total": total, **parts, **sizes}
    second = {"x": total if before else x, "residual": None if before else residual, **affine, **parts, "y": y,
              "mean": mean, "rstd": rstd, **rows, **sizes, "eps": eps}
    return [
        bound(forward_moments, programs, p.warps, first, tile | {"BEFORE": before}),
        bound(forward_apply, programs, p.warps, second, tile | modes | {"CHUNKS_TILE": power_above(p.chunks)}),
    ]


def backward_launches(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, mean: Tensor, rstd: Tensor, act: bool, dx: Tensor,
    parameters: tuple[Tensor | None, ...],
) -> list[Launch]:
    """Return what computes dx and the gradients of weight, bias, scale and shift, all allocated by the caller."""
    p, tile = _cut(x, groups, backward=True), _tile(_cut(x, groups, backward=True), x, groups)
    batch, channels, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
    programs = batch * p.blocks * p.chunks
    affine = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    sizes = {"scale_row": _row(scale), "shift_row": _row(shift), "C": channels, "S": pixels, "blocks": p.blocks}
    moments, modes = {"mean": mean, "rstd": rstd}, {"ACT": act}
    a, b = torch.empty((2, batch, p.chunks, channels), dtype=mean.dtype, device=x.device)
    sums = {"a": a, "b": b}
    last = parameter_launches(sums, affine, parameters, batch, channels, p.chunks)
    if p.tier != "two_phase":
        args = {"x": x, "dy": dy, "dtotal": dtotal, **affine, **moments, "dx": dx, **sums, **sizes}
        constants = tile | modes | {"RESIDENT": p.tier == "resident"}
        return [bound(backward_one, programs, p.warps, args, constants, p.registers), *last]
    part_a, part_b = torch.empty((2, batch, p.chunks, groups), dtype=mean.dtype, device=x.device)
    parts, sizes = {"part_a": part_a, "part_b": part_b}, sizes | {"chunks": p.chunks, "chunk": p.chunk}
    first = {"x": x, "dy": dy, **affine, **moments, **sums, **parts, **sizes}
    second = {"x": x, "dy": dy, "dtotal": dtotal, **affine, **moments, **parts, "dx": dx, **sizes}
    return [
        bound(backward_sums, programs, p.warps, first, tile | modes),
        bound(backward_apply, programs, p.warps, second, tile | modes | {"CHUNKS_TILE": power_above(p.chunks)}),
        *last,
    ]


def parameter_launches(
    sums: dict[str, Tensor], affine: dict[str, Tensor | None], parameters: tuple[Tensor | None, ...], batch: int,
    channels: int, chunks: int,
) -> list[Launch]:
    """Return what makes the gradients of weight, bias, scale and shift from the sums a, b (batch, chunks, channels)."""
    if all(gradient is None for gradient in parameters):
        return []
    chunks_tile = min(16, power_above(chunks))
    samples = min(16 // chunks_tile * 2, power_above(batch))
    rows = samples * chunks_tile
    channels_tile = max(32, 128 // rows)
    warps = rows * channels_tile // 128             # 16 bytes of fp32 to a thread
    tile = {"SAMPLES": samples, "CHUNKS_TILE": chunks_tile, "CHANNELS": channels_tile}
    gradients = dict(zip(("dweight", "dbias", "dscale", "dshift"), parameters, strict=True))
    args = {**sums, **{name: affine[name] for name in ("weight", "bias", "scale")}, **gradients,
            "scale_row": _row(affine["scale"]), "B": batch, "C": channels, "chunks": chunks}
    return [bound(parameter_gradients, -(-channels // channels_tile), warps, args, tile, registers_for(warps))]


def forward(*args: Any) -> None:
    """Compute what `forward_launches` says."""
    for launch in forward_launches(*args):
        launch.run()


def backward(*args: Any) -> None:
    """Compute what `backward_launches` says."""
    for launch in backward_launches(*args):
        launch.run()


def configurations() -> Iterator[Configuration]:
    """Yield what the promised shapes launch, forward and backward, in every dtype and layout."""
    yield from variants(
        launch
        for shape in SHAPES
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for memory_format in (torch.contiguous_format, torch.channels_last)
        for launch in _launches_of(shape, dtype, memory_format)
    )


def _launches_of(shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Launch]:
    """What a training step launches for a shape, on tensors without memory."""
    x = torch.empty(shape.batch, shape.channels, shape.side, shape.side, dtype=dtype, device="meta")
    x = x.to(memory_format=memory_format)
    weight = torch.empty(shape.channels, device="meta")
    film = torch.empty(shape.batch, 2 * shape.channels, dtype=dtype, device="meta")
    scale, shift = film.chunk(2, 1) if shape.film else (None, None)
    mean = torch.empty(shape.batch, shape.groups, device="meta")
    before = shape.residual == "before"
    parameters = (weight, weight, scale, shift)
    return forward_launches(
        x, shape.groups, weight, weight, 1e-5, scale, shift, x if shape.residual else None, shape.act, before, x,
        x if before else None, mean, mean,
    ) + backward_launches(
        x, x if before else None, x, shape.groups, weight, weight, scale, shift, mean, mean, shape.act, x, parameters
    )
