"""Attention's kernels of each fused backend that runs here, Triton interpreted and CUDA emulated, against float64."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import FAR_BELOW_ZERO, Attention, Case, excesses, inputs, results
from emulated_cuda import emulated

from fewstep.kernels.attention import fused

pytestmark = pytest.mark.usefixtures("unset_is_nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "cuda"])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A fused backend."""
    with emulated():
        yield request.param


@pytest.fixture
def kernel(name: str) -> Attention:
    """Attention by the backend, whatever it says of itself."""
    return lambda q, k, v, scale, key_lengths: fused.forward(q, k, v, scale, key_lengths, name)


CASES = {
    "aligned": Case(queries=64, keys=64, heads=1),
    "ragged, padded": Case(batch=2, heads=1, queries=33, keys=77, lengths=(5, 77)),
    "smaller than a tile": Case(queries=5, keys=3, dim=32),
    "one row": Case(queries=1, keys=1, dim=128),
    "text": Case(queries=17, keys=77, heads=1, dim=72),
    "tiles with rests": Case(heads=1, queries=70, keys=130, dim=32),
    "wide": Case(heads=1, queries=18, keys=21, dim=128),
    "large scores": Case(heads=1, queries=16, keys=33, dim=64, magnitude=30.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", CASES)
def test_against_float64(name: str, kernel: Attention, which: str, dtype: torch.dtype) -> None:
    """A wrong mask, stride or scale, an element that nobody writes, a rounding too many shows in some result."""
    if name == "cuda" and dtype == torch.float32:
        assert "float32" in str(fused.refusal_of_cuda(inputs(CASES[which]).q))
    else:
        assert not excesses(kernel, replace(CASES[which], dtype=dtype))


def test_scores_far_below_zero(kernel: Attention) -> None:
    """The weight of a key that is not there, exp(0 - lse), overflows: it must not be multiplied by its zeros."""
    assert not excesses(kernel, FAR_BELOW_ZERO)


@pytest.mark.parametrize("lengths", [None, (4, 21)])
def test_packed_is_bitwise_the_separate_form(name: str, kernel: Attention, lengths: tuple[int, ...] | None) -> None:
    """The same kernels by other strides: a wrong stride or part shows; results lie as layers read them."""
    case = Case(batch=2, heads=3, queries=21, keys=21, dim=72, dtype=torch.bfloat16, lengths=lengths)
    given = inputs(case)
    apart = results(kernel, case, given)
    packed = torch.cat([x.detach().transpose(1, 2).flatten(2) for x in (given.q, given.k, given.v)], -1)
    packed = packed.requires_grad_()
    o, lse = fused.forward_packed(packed, 3, case.dim**-0.5, case.key_lengths, name)
    d_o = given.d_result.transpose(1, 2).flatten(2)
    (gradient,) = torch.autograd.grad((o, lse), packed, (d_o, given.d_lse))
    assert o.is_contiguous()
    assert gradient.is_contiguous()
    found = (fused.heads_of(o, 3), lse, *fused.parts_of(gradient, 3))
    assert all(torch.equal(a, b) for a, b in zip(found, apart, strict=True))
    assert all(x.transpose(1, 2).is_contiguous() for x in (apart[0], *apart[2:]))


def test_padded_keys_may_hold_anything_and_get_no_gradient(kernel: Attention) -> None:
    """Padding is often left unset: one NaN in it would spoil the sample, a gradient would train what is not there."""
    case = Case(batch=2, heads=1, queries=9, keys=70, dim=32, lengths=(3, 65), dtype=torch.bfloat16)
    given = inputs(case)
    clean = results(kernel, case, given)
    with torch.no_grad():
        for b, length in enumerate(case.lengths or ()):
            given.k[b, :, length:] = float("nan")
            given.v[b, :, length:] = float("inf")
    spoiled = results(kernel, case, given)
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), clean, spoiled, strict=True):
        assert torch.equal(a, b), name
    assert not clean[3][0, :, 3:].any()
    assert not clean[4][1, :, 65:].any()


def test_lengths_beyond_the_keys_do_not_read_beyond_them(kernel: Attention) -> None:
    """On a GPU lengths cannot be checked without waiting; memory must stay safe whatever they say."""
    case = Case(queries=5, keys=7, dim=32, lengths=(1000,), dtype=torch.bfloat16)
    given = inputs(case)
    for a, b in zip(results(kernel, case, given), results(kernel, replace(case, lengths=None), given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["head by head", "keys and values apart", "gradient expanded", "heads shared"])
def test_any_strides(kernel: Attention, layout: str) -> None:
    """(B, H, L, D) in memory; k and v of different strides; the gradient of a sum, of strides 0; one k for all."""
    case = Case(queries=17, keys=23, dim=32, dtype=torch.bfloat16)
    given = inputs(case)
    plain = results(kernel, case, given)
    if layout == "head by head":
        given = type(given)(*(x.detach().contiguous().requires_grad_(x.requires_grad) for x in vars(given).values()))
    if layout == "keys and values apart":
        given = replace(given, v=given.v.detach().contiguous().requires_grad_())
    if layout == "gradient expanded":
        given = replace(given, d_result=torch.ones((), dtype=case.dtype).expand(given.d_result.shape))
        plain = results(kernel, case, replace(given, d_result=given.d_result.contiguous()))
    if layout == "heads shared":
        shared = given.k.detach()[:, :1].expand(given.k.shape).requires_grad_()
        plain = results(kernel, case, replace(given, k=shared.detach().contiguous().requires_grad_()))
        given = replace(given, k=shared)
    assert all(torch.equal(a, b) for a, b in zip(results(kernel, case, given), plain, strict=True))
