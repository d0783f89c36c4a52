"""The strict interpreter must see each planted bug, and leave correct kernels alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError


@triton.jit
def scaled(X, Y, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(Y + at, (x * FACTOR).to(Y.dtype.element_ty), mask=at < n)


@triton.jit
def no_mask(X, Y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < n, other=0.0))


@triton.jit
def no_other(X, Y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(X + at, mask=at < n), 0)
    tl.store(Y + at, total + at * 0.0, mask=at < n)


@triton.jit
def neighbours(X, Y, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(Y + program, tl.load(X + program))
    tl.store(Y + program + 50, tl.load(Y + (program + 3) % 4))


@triton.jit
def one_cell(X, Y, n, BLOCK: tl.constexpr):
    tl.store(Y, tl.load(X + tl.program_id(0)))


@triton.jit
def in_place_shift(X, Y, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(X + program + 1, tl.load(X + program))


@triton.jit
def summed_by_atomics(X, Y, n, BLOCK: tl.constexpr):
    tl.atomic_add(Y, tl.load(X + tl.program_id(0)))


@triton.jit
def read_back(X, Y, n, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < n), mask=at < n)
    if BARRIER:
        tl.debug_barrier()
    turned = tl.program_id(0) * BLOCK + (BLOCK - 1 - tl.arange(0, BLOCK))
    value = tl.load(Y + turned, mask=turned < n)
    tl.debug_barrier()
    tl.store(Y + at, value, mask=at < n)


@triton.jit
def bf16_sum(X, Y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(Y + at, x + x)


@triton.jit
def product(A, B, Y, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None]
    a, b = tl.load(A + row * BLOCK + column), tl.load(B + row * BLOCK + column)
    tl.store(Y + row * BLOCK + column, tl.dot(a, b, input_precision=PRECISION))


def test_casts_round_to_the_nearest_bf16() -> None:
    """The plain interpreter truncates, which doubles every error bound of the kernels."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[:3] = torch.tensor([1.00390625, 1.01171875, float("nan")])          # two ties, to even below and above
    y = torch.full_like(x, float("nan"), dtype=torch.bfloat16)
    scaled[(8,)](x, y, 1000, FACTOR=3.0, BLOCK=128)
    assert torch.equal(y.view(torch.int16)[3:], (x * 3).bfloat16().view(torch.int16)[3:])
    once = torch.empty_like(y)
    scaled[(8,)](x, once, 1000, FACTOR=1.0, BLOCK=128)
    assert once[:2].tolist() == [1.0, 1.015625]
    assert once[2].isnan()
    back = torch.empty_like(x)
    scaled[(8,)](y, back, 1000, FACTOR=1.0, BLOCK=128)
    assert torch.equal(back.nan_to_num(), y.float().nan_to_num())


def test_products_of_bf16_accumulate_in_float32() -> None:
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.full((32, 32), float("nan"))
    product[(1,)](a, b, y, PRECISION="tf32", BLOCK=32)
    torch.testing.assert_close(y.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "message"), [
    (no_mask, "Bounds.*write of 28 lanes outside"),
    (neighbours, "Hazard.*reads what another program wrote"),
    (one_cell, "Hazard.*write one address"),
    (in_place_shift, "Hazard.*(overwrites|reads) what another program"),
    (summed_by_atomics, "Hazard.*atomics"),
])
def test_planted_bugs_are_named(kernel: Any, message: str) -> None:
    """Each corrupts memory or gives other numbers on another run, while the plain interpreter is content."""
    x, y = torch.ones(100), torch.zeros(100)
    with pytest.raises(InterpreterError, match=message):
        kernel[(4,)](x, y, 100, BLOCK=32)


def test_gaps_of_a_strided_tensor_are_out_of_bounds() -> None:
    """A kernel given every other row must not write the rows between, which belong to another tensor."""
    x, wide = torch.ones(64), torch.zeros(64)
    with pytest.raises(InterpreterError, match="Bounds"):
        scaled[(1,)](x, wide[::2], 32, FACTOR=1.0, BLOCK=32)


def test_unset_lanes_are_nan() -> None:
    """They are whatever the registers held on a GPU; zeros would hide it from a sum."""
    x, y = torch.ones(20), torch.zeros(20)
    no_other[(1,)](x, y, 20, BLOCK=32)
    assert y.isnan().all()


def test_what_a_program_wrote_needs_a_barrier_before_other_threads_read_it() -> None:
    def run(barrier: bool) -> Tensor:
        x, y = torch.arange(64.0), torch.full((64,), float("nan"))
        read_back[(2,)](x, y, 64, BARRIER=barrier, BLOCK=32)
        return y

    assert torch.equal(run(barrier=True), torch.cat([torch.arange(32.0).flip(0), torch.arange(32.0, 64.0).flip(0)]))
    with pytest.raises(InterpreterError, match=r"Hazard.*without a barrier"):
        run(barrier=False)


def _add_bf16() -> None:
    x = torch.ones(32, dtype=torch.bfloat16)
    bf16_sum[(1,)](x, torch.empty_like(x), 32, BLOCK=32)


def _multiply_tf32() -> None:
    x = torch.ones(32, 32)
    product[(1,)](x, x.clone(), x.clone(), PRECISION="tf32", BLOCK=32)


@pytest.mark.parametrize(("run", "message"), [(_add_bf16, "Unsimulated.*bf16"), (_multiply_tf32, "Unsimulated.*tf32")])
def test_what_the_interpreter_would_compute_wrongly_is_refused(run: Callable[[], None], message: str) -> None:
    with pytest.raises(InterpreterError, match=message):
        run()
