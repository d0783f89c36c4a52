"""Attention against a float64 softmax written out, in every form: cross, padded, packed, differentiated both ways."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from fewstep.kernels import attention, attention_qkv

SIZES = [(2, 3, 64, 64, 32), (1, 2, 63, 77, 64), (2, 1, 1, 5, 72), (3, 2, 17, 1, 8), (1, 4, 111, 33, 40)]


def oracle(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, key_lengths: Tensor | None = None
           ) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp, float64, padded keys cut off sample by sample."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    results, sums = [], []
    for b in range(len(q)):
        length = k.shape[2] if key_lengths is None else int(key_lengths[b])
        scores = scale * torch.einsum("hld,hmd->hlm", q[b].double(), k[b, :, :length].double())
        weights = scores.exp()
        results.append(torch.einsum("hlm,hmd->hld", weights, v[b, :, :length].double()) / weights.sum(-1, keepdim=True))
        sums.append(weights.sum(-1).log())
    return torch.stack(results), torch.stack(sums)


def inputs(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, keys, dim = size
    g = torch.Generator().manual_seed(sum(size))
    q, k, v = (torch.randn(batch, heads, n, dim, generator=g, dtype=torch.float64) for n in (queries, keys, keys))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_forward_and_log_sum_exp(size: tuple[int, ...], scale: float | None) -> None:
    """Odd lengths, 77 keys, one query, one key, head dimension 72; the log-sum-exp is natural and of scaled scores."""
    q, k, v = inputs(size)
    expected, expected_lse = oracle(q, k, v, scale)
    torch.testing.assert_close(attention(q, k, v, scale).double(), expected, rtol=1e-5, atol=2e-6)
    result, lse = attention(q, k, v, scale, return_lse=True)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", [(3, 2, 9, 77, 16), (3, 2, 65, 8, 32)])
def test_padded_keys_count_for_nothing(size: tuple[int, ...]) -> None:
    """Texts of different length share a batch: padding that is attended to makes the image depend on its neighbours."""
    q, k, v = inputs(size)
    lengths = torch.tensor([1, size[3], size[3] // 2])
    expected, expected_lse = oracle(q, k, v, None, lengths)
    spoiled_k, spoiled_v = k.clone(), v.clone()
    for b, length in enumerate(lengths.tolist()):
        spoiled_k[b, :, length:] = 1e4
        spoiled_v[b, :, length:] = -1e4
    result = attention(q, spoiled_k, spoiled_v, key_lengths=lengths)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-6)
    result, lse = attention(q, spoiled_k, spoiled_v, key_lengths=lengths, return_lse=True)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("return_lse", [False, True])
def test_half_precision_stays_near_its_rounding(dtype: torch.dtype, return_lse: bool) -> None:
    """A softmax in bf16 has weights of 8 bits and is several roundings off; the log-sum-exp must be float32."""
    q, k, v = inputs((2, 2, 33, 77, 32), dtype)
    expected, expected_lse = oracle(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        if return_lse:
            result, lse = attention(q, k, v, return_lse=True)
            assert lse.dtype == torch.float32
            torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
        else:
            result = attention(q, k, v)
    assert result.dtype == dtype
    error = (result.double() - expected).norm() / expected.norm()
    assert error < (1 if return_lse else 2) * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("keys", [24, 300])
def test_gradients_in_half_precision_stay_near_its_rounding(keys: int) -> None:
    """On the CPU few keys are computed in float32, for speed, whatever autocast says: gradients as exact as before."""
    given = inputs((2, 2, 33, keys, 32), torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in given]
    doubles = [x.double().requires_grad_() for x in given]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attention(*leaves)
    assert result.dtype == torch.bfloat16
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(oracle(*doubles)[0], doubles, cotangent.bfloat16().double())
    for found, exact in zip(torch.autograd.grad(result, leaves, cotangent.bfloat16()), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact).norm() / exact.norm() < 2 * torch.finfo(torch.bfloat16).eps


LENGTHS = [None, torch.tensor([3, 5])]


@pytest.mark.parametrize("key_lengths", LENGTHS, ids=["full", "padded"])
def test_gradients_of_every_input_in_both_modes(key_lengths: Tensor | None) -> None:
    q, k, v = (x.requires_grad_() for x in inputs((2, 2, 3, 5, 4), torch.float64))
    assert torch.autograd.gradcheck(
        lambda *a: attention(*a, key_lengths=key_lengths), (q, k, v), check_forward_ad=True
    )
    assert torch.autograd.gradcheck(
        lambda *a: attention(*a, key_lengths=key_lengths, return_lse=True), (q, k, v), check_forward_ad=True
    )
    packed = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: attention_qkv(x, 2, key_lengths=key_lengths), (packed,), check_forward_ad=True
    )


@pytest.mark.parametrize("key_lengths", LENGTHS, ids=["full", "padded"])
def test_tangents_match_finite_differences(key_lengths: Tensor | None) -> None:
    """The fused operator has no forward mode; also inside torch.func.grad, where tensors do not show their tangents."""
    args = inputs((2, 2, 3, 5, 4), torch.float64)
    tangents = inputs((2, 2, 3, 5, 4), torch.float64)[::1]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, key_lengths=key_lengths)

    for f in (function, grad(lambda *a: function(*a).square().sum())):
        _, tangent = jvp(f, args, tangents)
        ahead, behind = (f(*(a + h * t for a, t in zip(args, tangents, strict=True))) for h in (1e-6, -1e-6))
        torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)


def test_packed_projection_is_q_k_v_in_that_order_heads_outermost() -> None:
    """State dicts depend on this order: permuted parts load without an error and produce noise."""
    batch, length, heads, dim = 2, 6, 3, 4
    q, k, v = (torch.randn(batch, heads, length, dim) for _ in range(3))
    packed = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
    expected, expected_lse = oracle(q, k, v)
    result, lse = attention_qkv(packed, heads, return_lse=True)
    torch.testing.assert_close(result.double(), expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(attention_qkv(packed, heads), result)
    lengths = torch.tensor([2, 6])
    padded, _ = oracle(q, k, v, 0.7, lengths)
    got = attention_qkv(packed, heads, 0.7, key_lengths=lengths)
    torch.testing.assert_close(got.double(), padded.transpose(1, 2).flatten(2), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_packed_images_are_rows_of_pixels(memory_format: torch.memory_format) -> None:
    image = torch.randn(2, 24, 3, 5).contiguous(memory_format=memory_format)
    rows = image.permute(0, 2, 3, 1).reshape(2, 15, 24).contiguous()
    assert torch.equal(attention_qkv(image, 2), attention_qkv(rows, 2))


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    q, k, v = inputs((2, 2, 9, 7, 8))
    lengths = torch.tensor([2, 7])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, key_lengths=lengths) + attention(q, k, v, return_lse=True)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v))


@pytest.mark.parametrize(("shapes", "message"), [
    (((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 6, 8)), "need q"),
    (((2, 3, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8)), "need q"),
    (((2, 3, 4, 8), (2, 3, 5, 4), (2, 3, 5, 4)), "need q"),
    (((2, 3, 8), (2, 3, 8), (2, 3, 8)), r"need q \(B, H, L, D\).*got \[\(2, 3, 8\)"),
])
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(s) for s in shapes))


def test_integers_are_refused() -> None:
    x = torch.ones(1, 1, 4, 24, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention of torch.int64, \(1, 1, 4, 24\): must be of a floating dtype"):
        attention(x, x, x)
    with pytest.raises(ValueError, match=r"attention of torch.int64, \(1, 4, 24\)"):
        attention_qkv(x[0], 1)


def test_bad_lengths_and_heads_are_named() -> None:
    q = torch.zeros(2, 1, 4, 8)
    for lengths, message in ((torch.tensor([0, 4]), r"lie in \[1, 4\], got \[0, 4\]"),
                             (torch.tensor([1, 5]), r"lie in \[1, 4\]"),
                             (torch.tensor([1]), r"key_lengths \(1,\) torch.int64 must be \(2,\) integers"),
                             (torch.ones(2), "torch.float32 must be")):
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, key_lengths=lengths)
    with pytest.raises(ValueError, match=r"heads=5: 3 heads must divide the channels of qkv \(2, 4, 24\)"):
        attention_qkv(torch.zeros(2, 4, 24), 5)
    with pytest.raises(ValueError, match=r"heads=1: 3 heads must divide the channels of qkv \(2, 4, 0\)"):
        attention_qkv(torch.zeros(2, 4, 0), 1)
    with pytest.raises(ValueError, match=r"qkv \(4, 24\) must be"):
        attention_qkv(torch.zeros(4, 24), 2)


@pytest.mark.parametrize("size", [(0, 4, 24), (0, 24, 3, 3), (2, 0, 24)])
def test_an_empty_packed_projection_is_an_empty_result(size: tuple[int, ...]) -> None:
    """The last, short batch of a rank may hold nothing."""
    qkv = torch.zeros(size)
    result, lse = attention_qkv(qkv, 2, return_lse=True)
    pixels = size[1] if len(size) == 3 else size[2] * size[3]
    assert result.shape == (size[0], pixels, 8)
    assert lse.shape == (size[0], 2, pixels)
