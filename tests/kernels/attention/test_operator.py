"""The custom operators around the fused kernels: what PyTorch's compiler, autograd and checkpoints ask of them."""

import logging
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, inputs
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fewstep.kernels import attention, attention_qkv, backend, use_backend
from fewstep.kernels.attention import choice, fused
from fewstep.kernels.attention.choice import order, order_packed
from fewstep.kernels.attention.shapes import SHAPES, Shape, bytes_moved, flops

pytestmark = pytest.mark.usefixtures("unset_is_nan")
TINY = Case(batch=2, heads=2, queries=3, keys=5, dim=16)
LENGTHS = torch.tensor([2, 5])


def packed_inputs(length: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(length)
    return torch.randn(2, length, 96, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def both_forms(q: Tensor, k: Tensor, v: Tensor, packed: Tensor) -> Tensor:
    """Every output of both operators in one number, so that each gradient passes through each."""
    result, lse = attention(q, k, v, key_lengths=LENGTHS, return_lse=True)
    pixels = attention_qkv(packed, 2)
    return result.square().sum() + lse.sin().sum() + pixels.square().sum()


@pytest.mark.slow
@pytest.mark.parametrize("key_lengths", [None, LENGTHS], ids=["full", "padded"])
def test_operator_contracts(key_lengths: Tensor | None) -> None:
    """Schema, fake shapes and strides, autograd registration, and AOT dispatch with dynamic shapes."""
    given, packed = inputs(replace(TINY, dtype=torch.bfloat16)), packed_inputs(dtype=torch.bfloat16)
    apart = (given.q, given.k, given.v, 0.25, key_lengths, "triton")
    torch.library.opcheck(fused.forward, apart)
    torch.library.opcheck(fused.forward_packed, (packed, 2, 0.25, key_lengths, "triton"))
    q, k, v = (x.detach() for x in apart[:3])
    o, lse = fused.forward(q, k, v, *apart[3:])
    for d_lse in (None, given.d_lse):
        torch.library.opcheck(fused.backward, (given.d_result, d_lse, q, k, v, o, lse, *apart[3:]))
    qkv = packed.detach()
    o, lse = fused.forward_packed(qkv, 2, 0.25, key_lengths, "triton")
    rest = (qkv, o, lse, 2, 0.25, key_lengths, "triton")
    torch.library.opcheck(fused.backward_packed, (torch.ones_like(o), None, *rest))


def test_compiles_whole_with_dynamic_shapes() -> None:
    """One graph serves two lengths, forward and backward: choosing a backend breaks nothing while tracing."""
    torch._dynamo.reset()
    compiled = torch.compile(both_forms, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((3, 5), (4, 7)):
        given = inputs(Case(batch=2, heads=2, queries=queries, keys=keys, dim=16))
        args = (given.q, given.k, given.v, packed_inputs(keys))
        with use_backend("triton"):
            got = torch.autograd.grad(compiled(*args), args)
        expected = torch.autograd.grad(both_forms(*args), args)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_images_give_their_gradient_in_channels_last(layout: torch.memory_format) -> None:
    """A projection of channels_last pixels is read where it is, and its gradient needs no copy on the way back."""
    image = torch.randn(2, 96, 2, 3).contiguous(memory_format=layout).requires_grad_()
    with use_backend("triton"):
        result = attention_qkv(image, 2)
        (gradient,) = torch.autograd.grad(result.square().sum(), image)
    expected = attention_qkv(image, 2)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), image)[0], rtol=1e-4, atol=1e-5)
    assert layout is torch.contiguous_format or gradient.is_contiguous(memory_format=torch.channels_last)


def test_autocast_casts_as_for_pytorchs_operator() -> None:
    """q from a float32 norm, k and v from bf16 layers: all in autocast's dtype, and so is the result."""
    given = inputs(TINY)
    args = (given.q, given.k.bfloat16(), given.v.bfloat16())
    for name in ("reference", "triton"):
        with torch.autocast("cpu", dtype=torch.bfloat16), use_backend(name):
            result, lse = attention(*args, return_lse=True)
            packed = attention_qkv(packed_inputs(), 2)
        assert result.dtype == packed.dtype == torch.bfloat16
        assert lse.dtype == torch.float32
        assert torch.autograd.grad(result.float().sum() + lse.sum(), given.q)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="one dtype and device, got float32 on cpu, bfloat16 on cpu, bfloat16 on cpu"):
        attention(*args)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    given = inputs(TINY)
    args = (given.q, given.k, given.v, packed_inputs())
    with use_backend("triton"):
        plain = torch.autograd.grad(both_forms(*args), args)
        again = torch.autograd.grad(checkpoint(both_forms, *args, use_reentrant=False), args)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("used", [0, 1], ids=["result", "log-sum-exp"])
def test_one_result_alone_may_be_differentiated(used: int) -> None:
    """Training uses the result alone, a regulariser perhaps the log-sum-exp alone: the other has no gradient at all."""
    given, packed = inputs(TINY), packed_inputs()
    args = (given.q, given.k, given.v)

    def gradients() -> tuple[Tensor, ...]:
        apart, together = attention(*args, return_lse=True)[used], attention_qkv(packed, 2, return_lse=True)[used]
        return torch.autograd.grad(apart.sin().sum() + together.sin().sum(), (given.q, given.k, packed))

    expected = gradients()
    with use_backend("triton"):
        torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients_by_the_reference() -> None:
    """A gradient penalty differentiates the backward pass: the kernels have no second one, the reference does."""
    given, packed = inputs(TINY), packed_inputs()
    args = (given.q, given.k, given.v, packed)

    def penalty() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(both_forms(*args), args, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in first), torch.tensor(0.0)), args)

    with sdpa_kernel(SDPBackend.MATH):                            # the only one that can be differentiated twice
        expected = penalty()
    with use_backend("triton"):
        torch.testing.assert_close(penalty(), expected, rtol=1e-3, atol=1e-4)


def test_forward_mode_and_functional_transforms_reach_the_reference() -> None:
    """An operator without a forward rule would return a tangent of zero, without a word."""
    given = inputs(TINY)
    q, k, v = (x.detach().double() for x in (given.q, given.k, given.v))
    with use_backend("triton"):
        _, tangent = jvp(lambda x: attention(x, k, v), (q,), (torch.ones_like(q),))
        per_sample = vmap(grad(lambda x: attention(x[None], k[:1], v[:1]).square().sum()))(q)
    ahead, behind = (attention(q + h, k, v) for h in (1e-6, -1e-6))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
    assert per_sample.abs().sum() > 0


def test_what_the_kernels_cannot_serve_is_refused_by_name() -> None:
    """A wrong answer, a launch error or a silent fallback would each be worse than one line."""
    q = torch.randn(2, 2, 4, 32)
    cases = (
        ((q[..., :24],) * 3, {}, "head dimension 24, not one of 16, 32, 64, 72, 128"),
        ((q.double(),) * 3, {}, "dtype torch.float64"), ((q[:0],) * 3, {}, "an empty tensor"),
        ((torch.randn(2, 2, 4, 64)[..., ::2],) * 3, {}, "strides that are not"),
        ((torch.randn(2, 2, 4, 33)[..., :32],) * 3, {}, "strides that are not"),
        ((q, q, q, -0.5), {}, "a scale that is not positive"),
    )
    for args, options, reason in cases:
        with use_backend("triton"), pytest.raises(ValueError, match=rf"cannot run .*{reason}.*; use \"reference\""):
            attention(*args, **options)
    for qkv, reason in ((torch.randn(2, 4, 144), "head dimension 24"), (torch.randn(0, 4, 96), "an empty tensor")):
        with use_backend("triton"), pytest.raises(ValueError, match=reason):
            attention_qkv(qkv, 2)
    with pytest.raises(ValueError, match="key_lengths on meta must be on the device of the queries, cpu"):
        attention(q, q, q, key_lengths=torch.ones(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_promised_shapes_do_not_fall_back(shape: Shape, dtype: torch.dtype) -> None:
    """A layout that networks leave, or a head dimension, that kernels refuse would cost every user the kernel."""
    q, k = (
        torch.empty(shape.batch, n, shape.heads, shape.dim, dtype=dtype, device="meta").transpose(1, 2)
        for n in (shape.queries, shape.keys)
    )
    assert fused.supports(q, k, k, shape.dim**-0.5, None, False) is None
    if shape.packed:
        packed = torch.empty(shape.batch, shape.queries, 3 * shape.heads * shape.dim, dtype=dtype, device="meta")
        assert fused.supports_packed(packed, shape.heads, shape.dim**-0.5, None, False) is None
        assert shape.queries == shape.keys


def test_work_of_a_shape_written_out() -> None:
    """Rooflines and shares of peak rest on these: one product counted twice would move every figure."""
    shape = Shape("", 2, 3, 5, 7, 11)
    assert flops(shape) == 2 * 3 * (5 * 7 * 11 * 2 + 5 * 7 * 11 * 2)
    assert flops(shape, backward=True) == 2.5 * flops(shape)
    q, k, lse = 2 * 3 * 5 * 11, 2 * 3 * 7 * 11, 2 * 3 * 5
    assert bytes_moved(shape, 2) == 2 * (q + k + k + q) + 4 * lse
    assert bytes_moved(shape, 2, backward=True) == 2 * (2 * (q + k + k) + 2 * q) + 4 * lse


def test_automatic_choice_before_anything_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operator where its kernels are known to be faster; never where it would store all scores."""
    monkeypatch.setattr(choice, "arch", lambda index: "sm_90")
    monkeypatch.setattr(choice, "_device", lambda x: "cuda")
    q = torch.randn(1, 2, 4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert order(q, q, q, 0.1, None, False)[0] == "triton"
        assert order_packed(torch.randn(1, 4, 384).bfloat16(), 2, 0.1, None, False)[0] == "triton"
        wide = torch.randn(1, 2, 4, 128, dtype=torch.bfloat16)
        assert order(wide, wide, wide, 0.1, None, False)[0] == "reference"
    trained = q.clone().requires_grad_()
    assert order(trained, q, q, 0.1, None, False)[0] == "reference"
    assert order(trained, q, q, 0.1, LENGTHS, False)[0] == "triton"
    assert order(trained, q, q, 0.1, None, True)[0] == "triton"
    monkeypatch.setattr(choice, "arch", lambda index: "sm_80")
    assert order(q, q, q, 0.1, None, False)[0] == "reference"


def test_on_a_cpu_the_reference_runs(caplog: pytest.LogCaptureFixture) -> None:
    given = inputs(TINY)
    with caplog.at_level(logging.INFO):
        assert backend.explain("attention", given.q, given.k, given.v, 1.0, None, False).backend == "reference"
