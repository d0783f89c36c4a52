"""Kernels with a fault that only compilation for a GPU shows; `test_ahead_of_time.py` must see each."""

from collections.abc import Iterator

import triton
import triton.language as tl

from fewstep.kernels.configuration import Configuration


@triton.jit
def doubled(X, Y, n, BLOCK: tl.constexpr):
    row = tl.program_id(0) * n
    at = tl.arange(0, BLOCK)
    tl.store(Y + row + at, tl.load(X + row + at, mask=at < n, other=0.0) * 2, mask=at < n)


@triton.jit
def variance(X, Y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + tl.program_id(0) * n + at, mask=at < n, other=0.0)
    centred = x - tl.sum(x, 0) / n
    tl.store(Y + tl.program_id(0) * n + at, centred / tl.sqrt(tl.sum(centred * centred, 0)), mask=at < n)


@triton.jit
def product(X, Y, n, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n, BLOCK):
        a, b = tl.load(X + row * n + k + column), tl.load(X + (k + row) * n + column)
        total = tl.dot(a, b, total)
    tl.store(Y + row * n + column, total)


def configurations() -> Iterator[Configuration]:
    pointers = {"X": "*fp32", "Y": "*fp32", "n": "i32"}
    halves = {"X": "*bf16", "Y": "*fp32", "n": "i32"}
    yield Configuration("good", doubled, pointers, {"BLOCK": 4096}, divisible=("n",))
    yield Configuration("narrow", doubled, pointers, {"BLOCK": 4096}, architectures=(90,))
    yield Configuration("spills", variance, pointers, {"BLOCK": 65536}, divisible=("n",), architectures=(90,))
    yield Configuration(
        "hoards", product, halves, {"BLOCK": 128}, num_warps=8, num_stages=6, divisible=("n",), architectures=(80,)
    )
    yield Configuration(
        "claims wgmma", doubled, pointers, {"BLOCK": 4096}, divisible=("n",), wgmma=True, architectures=(90,)
    )
