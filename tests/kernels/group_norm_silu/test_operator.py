"""The custom operators around the fused kernels: what PyTorch's compiler, autograd and checkpoints ask of them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from group_norm_cases import NAMES, Case, inputs, laid, results
from torch import Tensor
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from fewstep.kernels import backend, group_norm_silu, use_backend
from fewstep.kernels.group_norm_silu import fused

LAYOUTS = ["contiguous", "channels_last"]
TINY = Case(shape=(1, 4, 3, 1), groups=2, dtype=torch.float64)
Function = Callable[..., Tensor]


def both_residuals(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> Tensor:
    """Both forms in one chain, so that each gradient passes through each."""
    y = group_norm_silu(x, 2, weight, bias, 1e-3, scale, shift, residual)
    y, total = group_norm_silu(x, 2, weight, bias, 1e-3, scale, shift, y, residual_at="before")
    return y + total


def arguments(case: Case) -> tuple[Tensor, ...]:
    given = inputs(replace(case, residual="after"))
    return tuple(v for v in (given[name] for name in NAMES) if v is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_against_finite_differences(layout: str) -> None:
    """Of first order by the kernels, of second by the reference from the kernels' own saved sums."""
    args = arguments(replace(TINY, layout=layout))
    with use_backend("triton"):
        assert torch.autograd.gradcheck(both_residuals, args, fast_mode=True)
        assert torch.autograd.gradgradcheck(both_residuals, args, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("before", [False, True])
def test_operator_contracts(layout: str, before: bool) -> None:
    """Schema, fake shapes and strides, autograd registration, and AOT dispatch with dynamic shapes."""
    given = inputs(replace(TINY, layout=layout, residual="before", dtype=torch.float32))
    named = [given[k] for k in ("x", "residual", "weight", "bias", "scale", "shift")]
    torch.library.opcheck(fused.forward, (*named, 2, 1e-5, True, before, "triton"))
    plain = [None if v is None else v.detach() for v in named]
    _, _, mean, rstd = fused.forward(*plain, 2, 1e-5, True, before, "triton")
    x, residual, *parameters = plain
    torch.library.opcheck(fused.backward, (x, residual, x, mean, rstd, *parameters, 2, True, True, "triton"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole_with_dynamic_shapes(layout: str) -> None:
    """One graph serves two sizes, forward and backward: choosing a backend breaks nothing while tracing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(both_residuals, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 4, 3, 2), (3, 4, 5, 2)):
        args = arguments(replace(TINY, shape=shape, layout=layout, dtype=torch.float32))
        with use_backend("triton"):
            got = torch.autograd.grad(compiled(*args).square().sum(), args)
        expected = torch.autograd.grad(both_residuals(*args).square().sum(), args)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 2


def test_autocast_leaves_the_parameters_float32() -> None:
    """x is bf16, FiLM bf16 from a linear layer, in two halves of one tensor, weights float32: each is read as it is."""
    generator = torch.Generator().manual_seed(0)
    x, film = (torch.randn(2, c, *s, generator=generator).bfloat16() for c, s in ((8, (3, 3)), (16, ())))
    weight, bias = (torch.randn(8, generator=generator) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = group_norm_silu(x, 4, weight, bias, 1e-5, *film.chunk(2, 1))
        with use_backend("triton"):
            y = group_norm_silu(x, 4, weight, bias, 1e-5, *film.chunk(2, 1))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-6)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    args = arguments(replace(TINY, dtype=torch.float32))
    with use_backend("triton"):
        plain = torch.autograd.grad(both_residuals(*args).square().sum(), args)
        again = torch.autograd.grad(checkpoint(both_residuals, *args, use_reentrant=False).square().sum(), args)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("unused", ["y", "total"])
def test_a_result_without_use_sends_no_gradient(unused: str) -> None:
    """A block may use the sum alone, or drop it: the missing gradient is None, not a tensor of zeros."""
    args = arguments(replace(TINY, dtype=torch.float32))
    x, weight, bias, scale, shift, residual = args

    def kept(name: str) -> Tensor:
        y, total = group_norm_silu(x, 2, weight, bias, 1e-5, scale, shift, residual, residual_at="before")
        return total if name == "y" else y

    expected = torch.autograd.grad(kept(unused).square().sum(), args, allow_unused=True)
    with use_backend("triton"):
        got = torch.autograd.grad(kept(unused).square().sum(), args, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_gradient_in_another_layout_is_taken_in() -> None:
    """Gradients come as a convolution or a sum leaves them: contiguous for channels_last, or expanded."""
    case = replace(TINY, layout="channels_last", dtype=torch.float32)
    reference = backend._implementations["group_norm_silu"]["reference"]
    for make in (lambda y: y.contiguous().square().sum(), lambda y: y.sum()):
        args = arguments(case)
        gradients = []
        for function in (reference, backend._implementations["group_norm_silu"]["triton"]):
            y = function(args[0], 2, *args[1:3], 1e-5, *args[3:5], None, "silu", "after")
            gradients.append(torch.autograd.grad(make(y), args[:5]))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_functional_transforms_reach_the_same_gradient() -> None:
    """torch.func.grad, and vmap of it, as per-sample gradients take them."""
    x = torch.randn(3, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(x: Tensor) -> Tensor:
        return group_norm_silu(x, 2, None, None, 1e-5).square().sum()

    expected = torch.stack([grad(loss)(v) for v in x])
    with use_backend("triton"):
        torch.testing.assert_close(torch.stack([grad(loss)(v) for v in x]), expected)
        torch.testing.assert_close(vmap(grad(loss))(x), expected)


def test_what_the_kernels_cannot_serve_is_refused_by_name() -> None:
    x = torch.randn(1, 4, 3, 6)
    for bad, reason in (
        ((x[:, :, :, ::2], None), "neither contiguous nor channels_last"), ((x[:0], None), "empty"),
        ((x.to(torch.float8_e4m3fn), None), "dtypes other than"), ((x.to(torch.complex64), None), "a floating dtype"),
        ((x, x.bfloat16()), "residual of another dtype"),
    ):
        with use_backend("triton"), pytest.raises(ValueError, match=reason):
            group_norm_silu(bad[0], 2, None, None, residual=bad[1])
    with pytest.raises(ValueError, match="weight is on meta and x on cpu; both must be on one device"):
        group_norm_silu(x, 2, torch.ones(4, device="meta"), None)


def test_layouts_come_back_as_the_reference_gives_them() -> None:
    """Else a compiled graph would be traced for strides that do not come."""
    for layout in LAYOUTS:
        for shape in ((2, 4, 1, 1), (2, 1, 3, 2), (1, 4, 3, 2)):
            case = Case(shape=shape, groups=1, layout=layout)
            got = results(backend._implementations["group_norm_silu"]["triton"], case, inputs(case))
            assert got["y"].stride() == laid(torch.empty(shape), layout).stride()
