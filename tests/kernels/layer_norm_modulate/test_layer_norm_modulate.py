"""layer_norm_modulate: reference against a float64 formula, kernels in the strict interpreter, and the operators."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mutants import mutant
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.errors import InterpreterError

from fewstep.kernels import layer_norm_modulate, use_backend
from fewstep.kernels.layer_norm_modulate import fused, triton_kernel
from fewstep.kernels.layer_norm_modulate.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("unset_is_nan")
UNITS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SIZES = {"aligned": (2, 4, 16), "ragged": (2, 7, 20), "one row": (2, 1, 12), "one channel": (1, 3, 1)}


def inputs(size: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 0.5) -> tuple[Tensor, ...]:
    """x, a projection in halves of which scale and shift lie, weight, bias."""
    generator = torch.Generator().manual_seed(sum(size))
    sizes = (size, (size[0], 4 * size[-1]), size[-1:], size[-1:])
    x, film, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return tuple(v.to(dtype).requires_grad_() for v in (2 * (x + mean), film, weight, bias))


def modulated(x: Tensor, film: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale, shift = film.chunk(4, 1)[1:3]
    return layer_norm_modulate(x, scale, shift, weight, bias)


def formula(x: Tensor, film: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale, shift = (v.unflatten(1, (*[1] * (x.ndim - 2), -1)) for v in film.chunk(4, 1)[1:3])
    off = x - x.mean(-1, keepdim=True)
    normed = off / (off.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (normed * weight + bias) * (1 + scale) + shift


def results(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> list[Tensor]:
    """The result and the gradient of each input."""
    y = function(*args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, args, dy)]


def excesses(args: tuple[Tensor, ...]) -> list[str]:
    """Where the kernels are beyond a rounding of the dtype and 12 of float32, or 1.5 times PyTorch's error and one."""
    exact = results(formula, tuple(v.detach().double().requires_grad_() for v in args))
    with use_backend("reference"):
        plain = results(modulated, args)
    with use_backend("triton"):
        fused_ = results(modulated, args)
    unit = UNITS[args[0].dtype]
    arithmetic, found = min(unit, UNITS[torch.float32]), []
    for name, a, b, c in zip(("y", "dx", "dfilm", "dweight", "dbias"), fused_, plain, exact, strict=True):
        scale = c.detach().norm() + 1e-30
        ours, theirs = (float((v.detach().double() - c.detach()).norm() / scale) for v in (a, b))
        if not ours <= unit + 12 * arithmetic or not ours <= 1.5 * theirs + unit + 4 * arithmetic:
            found.append(f"{name}: {ours:.2e}, PyTorch {theirs:.2e}")
    return found


@pytest.mark.parametrize("shape", [(2, 5, 12), (3, 12), (2, 3, 4, 12)])
def test_reference_against_the_formula(shape: tuple[int, ...]) -> None:
    args = inputs(shape)
    with use_backend("reference"):
        got = results(modulated, args)
    exact = results(formula, tuple(v.detach().double().requires_grad_() for v in args))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_reference_without_modulation_is_pytorchs_layer_norm() -> None:
    x, film, weight, bias = inputs((2, 5, 12), torch.float64)
    y = layer_norm_modulate(x, *torch.zeros_like(film).chunk(4, 1)[:2], weight, bias, 1e-3)
    torch.testing.assert_close(y, F.layer_norm(x, (12,), weight, bias, 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", ["aligned", "ragged", "one row"])
def test_kernels_against_float64(dtype: torch.dtype, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of two rows, so that a sample has several and the last is not full: masks, offsets, sums over parts."""
    monkeypatch.setattr(triton_kernel, "TILE", 128)
    monkeypatch.setattr(triton_kernel, "PROGRAMS", 4)
    triton_kernel.plan.cache_clear()
    assert not excesses(inputs(SIZES[size], dtype))
    triton_kernel.plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_of_three_hundred_deviations(dtype: torch.dtype) -> None:
    """E[x^2] - E[x]^2 would lose all but two digits of the variance; a mean rounded to float32 loses two of xhat."""
    assert not excesses(inputs((1, 3, 20), dtype, mean=300.0))


def test_one_channel_and_more_dimensions() -> None:
    """The variance of one value is 0: the result is shift plus bias (1 + scale), the gradient to x is 0."""
    with use_backend("triton"):
        y, dx, *_ = results(modulated, inputs(SIZES["one channel"]))
        x, film, _, bias = inputs(SIZES["one channel"])
        assert not dx.any()
        scale, shift = film.chunk(4, 1)[1:3]
        torch.testing.assert_close(y, (bias * (1 + scale) + shift)[:, None].expand(x.shape))
    assert not excesses(inputs((2, 2, 3, 12)))


def test_without_weight_and_bias_as_dit_has_it() -> None:
    """Missing ones are 1 and 0, also in the gradients of scale and shift."""
    x, film, *_ = inputs((2, 3, 12))
    expected, got = [], []
    for backend, found in (("reference", expected), ("triton", got)):
        with use_backend(backend):
            found += results(lambda x, film: modulated(x, film, None, None), (x, film))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


BUGS = {
    "rows of the next sample": ("end = tl.minimum((part + 1) * part_rows, L)", "end = (part + 1) * part_rows"),
    "channels beyond the last": ("tl.where(live, x - mean[:, None], 0.0)", "x - mean[:, None]"),
    "gradient of the variance": (" - xhat * mean_a[:, None]", ""),
    "the next sample's modulation": ("scale, shift, sample, scale_row", "scale, shift, 0 * sample, scale_row"),
    "every row's sum is the last's": ("lane_a += gradient * xhat", "lane_a = gradient * xhat"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above must see a wrong mask, a lost term, a wrong row of the modulation."""
    kernels = mutant(triton_kernel, tmp_path, BUGS[bug], ("TILE = 4096", "TILE = 128"), ("= 512", "= 4"))
    monkeypatch.setattr(fused, "_kernels", lambda backend: kernels)
    try:
        caught = excesses(inputs(SIZES["ragged"]))
    except InterpreterError as raised:
        caught = [str(raised)]
    assert caught


def test_operators_fulfil_their_contracts() -> None:
    """Finite differences in both orders, schema, fake strides, and AOT dispatch with dynamic shapes."""
    args = inputs((1, 2, 3), torch.float64)
    with use_backend("triton"):
        assert torch.autograd.gradcheck(modulated, args, fast_mode=True)
        assert torch.autograd.gradgradcheck(modulated, args, fast_mode=True)
    x, film, weight, bias = (v.detach().requires_grad_() for v in inputs((2, 3, 4)))
    scale, shift = (v.detach().requires_grad_() for v in film.chunk(4, 1)[1:3])
    torch.library.opcheck(fused.forward, (x, scale, shift, weight, bias, 1e-6, "triton"))
    plain = [v.detach() for v in (x, scale, shift, weight, bias)]
    y, mean, rstd = fused.forward(*plain, 1e-6, "triton")
    torch.library.opcheck(fused.backward, (y, plain[0], mean, rstd, *plain[1:], True, "triton"))


def test_compiles_whole_with_dynamic_shapes_and_under_checkpoints() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(modulated, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 3, 8), (3, 5, 8)):
        args = inputs(size)
        with use_backend("reference"):
            expected = results(modulated, args)
        with use_backend("triton"):
            for function in (compiled, lambda *a: checkpoint(modulated, *a, use_reentrant=False)):
                torch.testing.assert_close(results(function, args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_promised_shapes_do_not_fall_back(shape: object) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.empty(shape.batch, shape.tokens, shape.channels, dtype=dtype, device="meta")
        assert fused.supports(x, x[:, 0], x[:, 0], None, None, 1e-6) is None


@pytest.mark.parametrize(("change", "message"), [
    ({"scale": torch.ones(6)}, r"scale \(6,\) must be \(2, 6\) for x \(2, 3, 6\)"),
    ({"bias": torch.ones(5)}, r"bias \(5,\) must be \(6,\)"),
    ({"x": torch.ones(2, 3, 6, dtype=torch.int64)}, r"x \(2, 3, 6\) torch.int64 must be"),
    ({"x": torch.ones(6)}, r"x \(6,\) torch.float32 must be \(B, ..., C\)"),
    ({"shift": torch.ones(2, 6, device="meta")}, "shift is on meta and x on cpu"),
])
def test_bad_input_is_named(change: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.ones(2, 3, 6), "scale": torch.ones(2, 6), "shift": torch.ones(2, 6)} | change
    with pytest.raises(ValueError, match=message):
        layer_norm_modulate(**given)


def test_an_empty_batch_is_an_empty_result() -> None:
    assert layer_norm_modulate(torch.ones(0, 3, 6), torch.ones(0, 6), torch.ones(0, 6)).shape == (0, 3, 6)
