"""Attention in Triton, forward and backward, reading q, k and v through strides (arXiv 2205.14135, 2307.08691).

Scores are never stored. One program owns a tile of queries (forward, gradient of q) or of keys (gradients of k and v)
and walks over the other side; nobody else writes what it writes, so results are the same bits on every run.

A tile is a pair of blocks of columns: head dimensions are cut into a power of two, MAIN, and what is left, REST, so
that 72 costs 64 + 16 columns of matrix product, not 128. Without a rest the second block is absent. Exponentials are of
base 2; the log-sum-exp is natural only in memory.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.attention.fused import DIMS
from fewstep.kernels.configuration import ARCHITECTURES, Configuration

STRIDES = [f"{tensor}_{of}" for tensor in ("q", "kv", "o", "d_o", "dq", "dkv") for of in ("batch", "head", "row")]
INTEGERS = ["is_padded", "heads", "queries", "keys", *STRIDES]    # one variant for all values: alignment is said here
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(size, heads, BLOCK: tl.constexpr):
    """Return the first row of this program's tile, its sample and its head; tiles of a head run together."""
    tiles = tl.cdiv(size, BLOCK)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    return tl.program_id(0) % tiles * BLOCK, pair // heads, pair % heads


@triton.jit
def _at(base, batch, head, start, batch_stride, head_stride, row_stride):
    """Return a pointer to a row. Every stride is a multiple of 8, which the launcher's hints of 16 do not say."""
    offset = batch * batch_stride + head * head_stride + tl.cast(start, tl.int64) * row_stride
    return base + tl.multiple_of(offset, 8)


@triton.jit
def _block(stride, left, ROWS: tl.constexpr, first, COLUMNS: tl.constexpr, DIM: tl.constexpr):
    """Return the offsets of a block of columns and which of its elements exist: `left` rows, columns up to DIM."""
    rows, columns = tl.arange(0, ROWS)[:, None], first + tl.arange(0, COLUMNS)[None, :]
    return tl.multiple_of(rows * stride, [8, 8]) + columns, (rows < left) & (columns < DIM)


@triton.jit
def _load_block(
    pointer, stride, left, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    offsets, exists = _block(stride, left if RAGGED else ROWS, ROWS, FIRST, COLUMNS, DIM)
    if RAGGED or FIRST + COLUMNS > DIM:
        value = tl.load(pointer + offsets, mask=exists, other=0.0)
    else:
        value = tl.load(pointer + offsets)
    return value


@triton.jit
def _load(
    pointer, stride, left, ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Load a tile, zeros where there is nothing; RAGGED where rows may be missing."""
    main = _load_block(pointer, stride, left, ROWS, 0, MAIN, DIM, RAGGED)
    rest = main
    if REST:
        rest = _load_block(pointer, stride, left, ROWS, MAIN, REST, DIM, RAGGED)
    return main, rest


@triton.jit
def _store(pointer, stride, left, main, rest, ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
           DIM: tl.constexpr):  # fmt: skip
    offsets, exists = _block(stride, left, ROWS, 0, MAIN, DIM)
    tl.store(pointer + offsets, main.to(pointer.dtype.element_ty), mask=exists)
    if REST:
        offsets, exists = _block(stride, left, ROWS, MAIN, REST, DIM)
        tl.store(pointer + offsets, rest.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    main = tl.zeros([ROWS, MAIN], tl.float32)
    rest = main
    if REST:
        rest = tl.zeros([ROWS, REST], tl.float32)
    return main, rest


@triton.jit
def _product(
    a, a_rest, b, b_rest, a_at, a_row, a_left, b_at, b_row, b_left,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return a b^T over all columns, float32; with CHUNK it is read that many columns at a time, from memory again.

    Products in float32 run without tensor cores and hold all columns of their operands in registers, which spills.
    """
    if CHUNK:
        result = tl.zeros([A_ROWS, B_ROWS], tl.float32)
        for first in range(0, DIM, CHUNK):
            a_offsets, a_exists = _block(a_row, a_left, A_ROWS, first, CHUNK, DIM)
            b_offsets, b_exists = _block(b_row, b_left, B_ROWS, first, CHUNK, DIM)
            a_part = tl.load(a_at + a_offsets, mask=a_exists, other=0.0)
            b_part = tl.load(b_at + b_offsets, mask=b_exists, other=0.0)
            result = tl.dot(a_part, tl.trans(b_part), result, input_precision="ieee")
    else:
        result = tl.dot(a, tl.trans(b), input_precision="ieee")
        if REST:
            result = tl.dot(a_rest, tl.trans(b_rest), result, input_precision="ieee")
    return result


@triton.jit
def _add_product(total, total_rest, a, b, b_rest, REST: tl.constexpr):
    """Return total + a b, a rounded to b's dtype."""
    total = tl.dot(a.to(b.dtype), b, total, input_precision="ieee")
    if REST:
        total_rest = tl.dot(a.to(b.dtype), b_rest, total_rest, input_precision="ieee")
    return total, total_rest


@triton.jit
def _row_sums(a, a_rest, b, b_rest, REST: tl.constexpr):
    """Return sum(a b) of each row, float32."""
    result = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if REST:
        result += tl.sum(a_rest.to(tl.float32) * b_rest.to(tl.float32), 1)
    return result


@triton.jit
def _length(key_lengths, is_padded, batch, keys):
    """Return how many keys this sample attends to; never more than there are, whatever the tensor says."""
    return tl.minimum(tl.load(key_lengths + batch, mask=is_padded != 0, other=keys), keys)


@triton.jit
def _attend(
    total, total_rest, weight, peak, q, q_rest, q_at, q_row, q_left, k_at, v_at, kv_row, left, scale2,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Take a tile of keys into the running softmax: the sums of weighted values and of weights, the highest score."""
    k, k_rest = _load(k_at, kv_row, left, BLOCK_N, MAIN, REST, DIM, RAGGED)
    scores = _product(
        q, q_rest, k, k_rest, q_at, q_row, q_left, k_at, kv_row, left, BLOCK_M, BLOCK_N, REST, DIM, CHUNK
    )  # fmt: skip
    if RAGGED:
        scores = tl.where((tl.arange(0, BLOCK_N) < left)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale2)
    weights = tl.exp2(scores * scale2 - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    weight = weight * shrink + tl.sum(weights, 1)
    total = total * shrink[:, None]
    if REST:
        total_rest = total_rest * shrink[:, None]
    v, v_rest = _load(v_at, kv_row, left, BLOCK_N, MAIN, REST, DIM, RAGGED)
    total, total_rest = _add_product(total, total_rest, weights, v, v_rest, REST)
    return total, total_rest, weight, new_peak


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    q, k, v, o, lse, key_lengths, is_padded, scale, heads, queries, keys,
    q_batch, q_head, q_row, kv_batch, kv_head, kv_row, o_batch, o_head, o_row,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write o = softmax(scale q k^T) v and lse for BLOCK_M queries of one head."""
    start, batch, head = _place(queries, heads, BLOCK_M)
    left, length = queries - start, _length(key_lengths, is_padded, batch, keys)
    q_at = _at(q, batch, head, start, q_batch, q_head, q_row)
    q_main, q_rest = _load(q_at, q_row, left, BLOCK_M, MAIN, REST, DIM, True)
    total, total_rest = _zeros(BLOCK_M, MAIN, REST)
    weight, peak = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for n in range(0, whole, BLOCK_N):
        k_at = _at(k, batch, head, n, kv_batch, kv_head, kv_row)
        v_at = _at(v, batch, head, n, kv_batch, kv_head, kv_row)
        total, total_rest, weight, peak = _attend(
            total, total_rest, weight, peak, q_main, q_rest, q_at, q_row, left, k_at, v_at, kv_row, BLOCK_N,
            scale * LOG2E, DIM, MAIN, REST, CHUNK, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    if whole < length:
        k_at = _at(k, batch, head, whole, kv_batch, kv_head, kv_row)
        v_at = _at(v, batch, head, whole, kv_batch, kv_head, kv_row)
        total, total_rest, weight, peak = _attend(
            total, total_rest, weight, peak, q_main, q_rest, q_at, q_row, left, k_at, v_at, kv_row, length - whole,
            scale * LOG2E, DIM, MAIN, REST, CHUNK, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    o_at = _at(o, batch, head, start, o_batch, o_head, o_row)
    inverse = 1.0 / weight[:, None]
    total = total * inverse
    if REST:
        total_rest = total_rest * inverse
    _store(o_at, o_row, left, total, total_rest, BLOCK_M, MAIN, REST, DIM)
    rows = tl.arange(0, BLOCK_M)
    lse_at = lse + (batch * heads + head) * queries + start
    tl.store(lse_at + rows, (peak + tl.log2(weight)) * LN2, mask=rows < left)


@triton.jit
def _query_step(
    total, total_rest, q, q_rest, d_o, d_o_rest, lse2, delta, q_at, q_row, d_o_at, d_o_row, q_left,
    k_at, v_at, kv_row, left, scale2, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the gradient of a tile of queries."""
    k, k_rest = _load(k_at, kv_row, left, BLOCK_N, MAIN, REST, DIM, RAGGED)
    v, v_rest = _load(v_at, kv_row, left, BLOCK_N, MAIN, REST, DIM, RAGGED)
    scores = _product(
        q, q_rest, k, k_rest, q_at, q_row, q_left, k_at, kv_row, left, BLOCK_M, BLOCK_N, REST, DIM, CHUNK
    )  # fmt: skip
    d_weights = _product(
        d_o, d_o_rest, v, v_rest, d_o_at, d_o_row, q_left, v_at, kv_row, left, BLOCK_M, BLOCK_N, REST, DIM, CHUNK
    )  # fmt: skip
    d_scores = tl.exp2(scores * scale2 - lse2[:, None]) * (d_weights - delta[:, None])
    if RAGGED:
        d_scores = tl.where((tl.arange(0, BLOCK_N) < left)[None, :], d_scores, 0.0)
    return _add_product(total, total_rest, d_scores, k, k_rest, REST)


@triton.jit(do_not_specialize=INTEGERS)
def query_gradient_kernel(
    q, k, v, o, lse, d_o, d_lse, lse_counts, dq, delta, key_lengths, is_padded, scale, heads, queries, keys,
    q_batch, q_head, q_row, kv_batch, kv_head, kv_row, o_batch, o_head, o_row, d_o_batch, d_o_head, d_o_row,
    dq_batch, dq_head, dq_row,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dq for BLOCK_M queries, and delta = sum(o d_o) - d_lse for `key_gradient_kernel`."""
    start, batch, head = _place(queries, heads, BLOCK_M)
    left, length = queries - start, _length(key_lengths, is_padded, batch, keys)
    o_at = _at(o, batch, head, start, o_batch, o_head, o_row)
    d_o_at = _at(d_o, batch, head, start, d_o_batch, d_o_head, d_o_row)
    o_main, o_rest = _load(o_at, o_row, left, BLOCK_M, MAIN, REST, DIM, True)
    d_o_main, d_o_rest = _load(d_o_at, d_o_row, left, BLOCK_M, MAIN, REST, DIM, True)
    row_delta = _row_sums(o_main, o_rest, d_o_main, d_o_rest, REST)
    rows = tl.arange(0, BLOCK_M)
    flat = (batch * heads + head) * queries + start
    row_delta -= lse_counts * tl.load(d_lse + flat + rows, mask=rows < left, other=0.0)
    tl.store(delta + flat + rows, row_delta, mask=rows < left)
    lse2 = tl.load(lse + flat + rows, mask=rows < left, other=0.0) * LOG2E
    q_at = _at(q, batch, head, start, q_batch, q_head, q_row)
    q_main, q_rest = _load(q_at, q_row, left, BLOCK_M, MAIN, REST, DIM, True)
    total, total_rest = _zeros(BLOCK_M, MAIN, REST)
    whole = length // BLOCK_N * BLOCK_N
    for n in range(0, whole, BLOCK_N):
        k_at = _at(k, batch, head, n, kv_batch, kv_head, kv_row)
        v_at = _at(v, batch, head, n, kv_batch, kv_head, kv_row)
        total, total_rest = _query_step(
            total, total_rest, q_main, q_rest, d_o_main, d_o_rest, lse2, row_delta, q_at, q_row, d_o_at, d_o_row, left,
            k_at, v_at, kv_row, BLOCK_N, scale * LOG2E, DIM, MAIN, REST, CHUNK, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    if whole < length:
        k_at = _at(k, batch, head, whole, kv_batch, kv_head, kv_row)
        v_at = _at(v, batch, head, whole, kv_batch, kv_head, kv_row)
        total, total_rest = _query_step(
            total, total_rest, q_main, q_rest, d_o_main, d_o_rest, lse2, row_delta, q_at, q_row, d_o_at, d_o_row, left,
            k_at, v_at, kv_row, length - whole, scale * LOG2E, DIM, MAIN, REST, CHUNK, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    dq_at = _at(dq, batch, head, start, dq_batch, dq_head, dq_row)
    _store(dq_at, dq_row, left, total * scale, total_rest * scale, BLOCK_M, MAIN, REST, DIM)


@triton.jit
def _key_step(
    dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, k_at, v_at, kv_row, k_left,
    q_at, d_o_at, lse_at, delta_at, q_row, d_o_row, left, scale2, DIM: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries to the gradients of a tile of keys; missing queries are zeros and add nothing."""
    rows = tl.arange(0, BLOCK_M)
    exists = rows < left
    q, q_rest = _load(q_at, q_row, left, BLOCK_M, MAIN, REST, DIM, RAGGED)
    lse2 = tl.load(lse_at + rows, mask=exists, other=0.0) * LOG2E
    scores = _product(
        k, k_rest, q, q_rest, k_at, kv_row, k_left, q_at, q_row, left, BLOCK_N, BLOCK_M, REST, DIM, CHUNK
    )  # fmt: skip
    weights = tl.exp2(scores * scale2 - lse2[None, :])
    d_o, d_o_rest = _load(d_o_at, d_o_row, left, BLOCK_M, MAIN, REST, DIM, RAGGED)
    dv, dv_rest = _add_product(dv, dv_rest, weights, d_o, d_o_rest, REST)
    delta = tl.load(delta_at + rows, mask=exists, other=0.0)
    d_weights = _product(
        v, v_rest, d_o, d_o_rest, v_at, kv_row, k_left, d_o_at, d_o_row, left, BLOCK_N, BLOCK_M, REST, DIM, CHUNK
    )  # fmt: skip
    d_scores = weights * (d_weights - delta[None, :])
    dk, dk_rest = _add_product(dk, dk_rest, d_scores, q, q_rest, REST)
    return dk, dk_rest, dv, dv_rest


@triton.jit(do_not_specialize=INTEGERS)
def key_gradient_kernel(
    q, k, v, lse, d_o, delta, dk, dv, key_lengths, is_padded, scale, heads, queries, keys,
    q_batch, q_head, q_row, kv_batch, kv_head, kv_row, d_o_batch, d_o_head, d_o_row, dkv_batch, dkv_head, dkv_row,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dk and dv for BLOCK_N keys of one head, zeros for keys that the sample does not attend to."""
    start, batch, head = _place(keys, heads, BLOCK_N)
    length = _length(key_lengths, is_padded, batch, keys)
    k_at = _at(k, batch, head, start, kv_batch, kv_head, kv_row)
    v_at = _at(v, batch, head, start, kv_batch, kv_head, kv_row)
    k_main, k_rest = _load(k_at, kv_row, length - start, BLOCK_N, MAIN, REST, DIM, True)
    v_main, v_rest = _load(v_at, kv_row, length - start, BLOCK_N, MAIN, REST, DIM, True)
    dk_total, dk_rest = _zeros(BLOCK_N, MAIN, REST)
    dv_total, dv_rest = _zeros(BLOCK_N, MAIN, REST)
    flat = (batch * heads + head) * queries
    walked = tl.where(start < length, queries, 0)
    whole = walked // BLOCK_M * BLOCK_M
    for m in range(0, whole, BLOCK_M):
        q_at = _at(q, batch, head, m, q_batch, q_head, q_row)
        d_o_at = _at(d_o, batch, head, m, d_o_batch, d_o_head, d_o_row)
        dk_total, dk_rest, dv_total, dv_rest = _key_step(
            dk_total, dk_rest, dv_total, dv_rest, k_main, k_rest, v_main, v_rest, k_at, v_at, kv_row, length - start,
            q_at, d_o_at, lse + flat + m, delta + flat + m, q_row, d_o_row, BLOCK_M, scale * LOG2E,
            DIM, MAIN, REST, CHUNK, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    if whole < walked:
        q_at = _at(q, batch, head, whole, q_batch, q_head, q_row)
        d_o_at = _at(d_o, batch, head, whole, d_o_batch, d_o_head, d_o_row)
        dk_total, dk_rest, dv_total, dv_rest = _key_step(
            dk_total, dk_rest, dv_total, dv_rest, k_main, k_rest, v_main, v_rest, k_at, v_at, kv_row, length - start,
            q_at, d_o_at, lse + flat + whole, delta + flat + whole, q_row, d_o_row, walked - whole, scale * LOG2E,
            DIM, MAIN, REST, CHUNK, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    attended = (start + tl.arange(0, BLOCK_N) < length)[:, None]
    dk_at = _at(dk, batch, head, start, dkv_batch, dkv_head, dkv_row)
    dv_at = _at(dv, batch, head, start, dkv_batch, dkv_head, dkv_row)
    dk_total, dv_total = tl.where(attended, dk_total * scale, 0.0), tl.where(attended, dv_total, 0.0)
    if REST:
        dk_rest, dv_rest = tl.where(attended, dk_rest * scale, 0.0), tl.where(attended, dv_rest, 0.0)
    _store(dk_at, dkv_row, keys - start, dk_total, dk_rest, BLOCK_N, MAIN, REST, DIM)
    _store(dv_at, dkv_row, keys - start, dv_total, dv_rest, BLOCK_N, MAIN, REST, DIM)


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time: queries and keys; its warps; how many steps ahead it loads."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Step:
    """One of the three kernels, and whether its programs own tiles of queries or of keys."""

    name: str
    kernel: Any
    owns_queries: bool = True


FORWARD = Step("forward", forward_kernel)
QUERIES = Step("query gradient", query_gradient_kernel)
KEYS = Step("key gradient", key_gradient_kernel, owns_queries=False)
CHUNK = 16                # columns of a float32 product at a time
FEW_PROGRAMS = 128        # fewer leave a large GPU partly idle, so tiles are then smaller
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# The tile for many programs and the one for few, by head dimension. None spills on its chips: tests compile them all.
Tiles = dict[Step, dict[int, tuple[Tile, Tile]]]
EARLIER: Tiles = {   # sm_80 to sm_89, sm_120: 99 KB of shared memory, mma.sync
    FORWARD: {
        16: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)), 32: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
        64: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)), 72: (Tile(128, 32, 8, 2), Tile(64, 64, 4, 2)),
        128: (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    },
    QUERIES: {
        16: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)), 32: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        64: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)), 72: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        128: (Tile(128, 32, 8, 2), Tile(32, 32, 4, 2)),
    },
    KEYS: {
        16: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)), 32: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        64: (Tile(32, 128, 8, 2), Tile(32, 64, 4, 2)), 72: (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
        128: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
}  # fmt: skip
HOPPER: Tiles = {    # sm_90: 227 KB, wgmma
    FORWARD: {
        16: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)), 32: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
        64: (Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)), 72: (Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)),
        128: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    },
    QUERIES: dict.fromkeys(DIMS, (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2))),
    KEYS: {
        **dict.fromkeys((16, 32, 64, 72), (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2))),
        128: (Tile(64, 64, 8, 2), Tile(32, 64, 4, 2)),
    },
}  # fmt: skip
BLACKWELL: Tiles = {   # sm_100: as much, tcgen05
    **HOPPER,
    KEYS: {**HOPPER[KEYS], 64: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))},
}
WIDE: Tiles = {      # float32, without tensor cores, on every chip
    FORWARD: dict.fromkeys(DIMS, (Tile(32, 32, 4, 1),) * 2),
    QUERIES: {
        **dict.fromkeys(DIMS, (Tile(32, 16, 4, 1),) * 2), **dict.fromkeys((72, 128), (Tile(32, 16, 8, 1),) * 2),
    },
    KEYS: {
        **dict.fromkeys(DIMS, (Tile(16, 16, 4, 1),) * 2), 16: (Tile(16, 32, 4, 1),) * 2, 72: (Tile(16, 16, 8, 1),) * 2,
    },
}


def columns(dim: int) -> tuple[int, int]:
    """Return the two blocks that a head dimension is cut into: the largest power of two in it, and one for the rest."""
    main = 1 << (dim.bit_length() - 1)
    return main, 0 if main == dim else max(16, 1 << (dim - main - 1).bit_length())


@functools.cache
def configuration(step: Step, dtype: torch.dtype, dim: int, tile: Tile,
                  architectures: tuple[int, ...] = ARCHITECTURES) -> Configuration:  # fmt: skip
    """Return one variant of a kernel."""
    main, rest = columns(dim)
    chunk = CHUNK if dtype == torch.float32 else 0
    constants = {
        "DIM": dim, "MAIN": main, "REST": rest, "CHUNK": chunk, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys
    }  # fmt: skip
    names = [name for name in step.kernel.arg_names if name not in constants]
    return Configuration(
        f"{step.name} {KINDS[dtype]} {dim} {tile.queries}x{tile.keys} {tile.warps} warps {tile.stages} stages",
        step.kernel, {name: _kind(name, KINDS[dtype]) for name in names}, constants, tile.warps, tile.stages,
        architectures=architectures, wgmma=not chunk,
    )  # fmt: skip


def _kind(argument: str, kind: str) -> str:
    if argument in ("scale", "lse_counts"):
        return "fp32"
    if argument in ("lse", "d_lse", "delta"):
        return "*fp32"
    if argument == "key_lengths":
        return "*i32"
    return "i32" if argument in INTEGERS else f"*{kind}"


def configurations() -> Iterator[Configuration]:
    """Yield every variant that can be launched."""
    for dtype in KINDS:
        chips: dict[tuple[int, ...], Tiles]
        chips = {(80, 89): EARLIER, (90,): HOPPER, (100,): BLACKWELL}
        if dtype == torch.float32:
            chips = {ARCHITECTURES: WIDE}
        for step in (FORWARD, QUERIES, KEYS):
            for dim in DIMS:
                found: dict[Tile, tuple[int, ...]] = {}
                for architectures, tiles in chips.items():
                    for tile in set(tiles[step][dim]):
                        found[tile] = (*found.get(tile, ()), *architectures)
                for tile, architectures in found.items():
                    yield configuration(step, dtype, dim, tile, architectures)


@functools.cache
def _tiles(device: torch.device, dtype: torch.dtype) -> Tiles:
    if dtype == torch.float32:
        return WIDE
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {9: HOPPER, 10: BLACKWELL}.get(major, EARLIER)


def _run(
    step: Step, pointers: dict[str, Tensor], strided: dict[str, Tensor], scale: float, key_lengths: Tensor | None,
    **numbers: float,
) -> None:  # fmt: skip
    """Launch a step: `pointers` by name of argument, `strided` (B, H, length, D) by prefix of their strides."""
    q, k = pointers["q"], pointers["k"]
    batch, heads, queries, dim = q.shape
    rows = queries if step.owns_queries else k.shape[2]
    tile = _tile(step, q, rows, batch * heads)
    lengths = pointers["lse"].view(torch.int32) if key_lengths is None else key_lengths.to(torch.int32)   # or anything
    values: dict[str, Any] = {
        **pointers, "key_lengths": lengths, "is_padded": int(key_lengths is not None), "scale": scale, "heads": heads,
        "queries": queries, "keys": k.shape[2], **numbers,
        **{f"{name}_{of}": x.stride(i) for name, x in strided.items() for i, of in enumerate(("batch", "head", "row"))},
    }  # fmt: skip
    variant = configuration(step, q.dtype, dim, tile)
    programs = -(-rows // _owned(step, tile)) * batch * heads
    variant.launch((programs,), *(values[name] for name in variant.signature))


def _owned(step: Step, tile: Tile) -> int:
    return tile.queries if step.owns_queries else tile.keys


def _tile(step: Step, q: Tensor, rows: int, pairs: int) -> Tile:
    """Return the tile for as many rows of as many pairs of sample and head."""
    many, few = _tiles(q.device, q.dtype)[step][q.shape[-1]]
    programs = -(-rows // _owned(step, many)) * pairs
    return many if programs >= FEW_PROGRAMS and rows > _owned(step, few) else few


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and v with the same strides, which kernels take once: copies if they differ."""
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())


def forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, key_lengths: Tensor | None) -> None:
    """Write o (B, H, L, D) and lse (B, H, L); q, k, v and o by any strides that `fused.is_readable` allows."""
    k, v = _alike(k, v)
    _run(FORWARD, {"q": q, "k": k, "v": v, "o": o, "lse": lse}, {"q": q, "kv": k, "o": o}, scale, key_lengths)


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor, d_lse: Tensor | None, dq: Tensor, dk: Tensor,
    dv: Tensor, scale: float, key_lengths: Tensor | None,
) -> None:  # fmt: skip
    """Write dq, dk and dv, these two with the same strides, from the gradients of o and, if any, of lse."""
    k, v = _alike(k, v)
    given = {"q": q, "k": k, "v": v, "lse": lse, "d_o": d_o, "delta": torch.empty_like(lse)}
    strided = {"q": q, "kv": k, "d_o": d_o}
    _run(
        QUERIES, {**given, "o": o, "d_lse": lse if d_lse is None else d_lse, "dq": dq}, {**strided, "o": o, "dq": dq},
        scale, key_lengths, lse_counts=float(d_lse is not None),
    )  # fmt: skip
    _run(KEYS, {**given, "dk": dk, "dv": dv}, {**strided, "dkv": dk}, scale, key_lengths)
