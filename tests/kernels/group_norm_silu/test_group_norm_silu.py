"""group_norm_silu against a float64 formula written with loops over samples and groups, and PyTorch's own operator."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

from fewstep.kernels import group_norm_silu

Layout = Callable[[Tensor], Tensor]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def strided(x: Tensor) -> Tensor:
    """The same values as every other column of a wider tensor: neither layout."""
    return torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]


LAYOUTS = [pytest.param(f, id=f.__name__) for f in (torch.Tensor.contiguous, channels_last, strided)]
SHAPES = [
    ((2, 8, 4, 4), 4), ((3, 6, 5, 3), 3), ((1, 96, 7, 5), 32), ((2, 4, 1, 1), 2), ((2, 5, 3, 3), 5), ((4, 3, 9, 1), 1),
]


def oracle(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None = None,
           shift: Tensor | None = None, act: str | None = "silu") -> Tensor:
    """The formula in float64, one sample and group at a time."""
    x, y = x.double(), torch.empty(x.shape, dtype=torch.float64)
    for b in range(len(x)):
        for channels in torch.arange(x.shape[1]).chunk(groups):
            values = x[b, channels]
            variance = ((values - values.mean()) ** 2).mean()
            y[b, channels] = (values - values.mean()) / (variance + eps) ** 0.5
    per_channel = (1, -1, *[1] * (x.ndim - 2))
    per_sample = (*x.shape[:2], *[1] * (x.ndim - 2))
    y = y * (1 if weight is None else weight.double().reshape(per_channel))
    y = y + (0 if bias is None else bias.double().reshape(per_channel))
    y = y * (1 + (0 if scale is None else scale.double().reshape(per_sample)))
    y = y + (0 if shift is None else shift.double().reshape(per_sample))
    return y / (1 + torch.exp(-y)) if act else y


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, weight, bias, scale, shift, residual."""
    g = torch.Generator().manual_seed(sum(shape))
    sizes = (shape, shape[1:2], shape[1:2], shape[:2], shape[:2], shape)
    x, *rest = (torch.randn(s, generator=g, dtype=torch.float64) for s in sizes)
    return tuple(v.to(dtype) for v in (2 * x + 0.5, *rest))


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("act", ["silu", None])
def test_forward_in_every_layout(shape: tuple[int, ...], groups: int, layout: Layout, film: bool, act: str) -> None:
    """Odd sizes, one pixel, one group, one channel per group; the layout of x must come back, else a copy follows."""
    x, weight, bias, scale, shift, _ = inputs(shape)
    x = layout(x)
    extra = (scale, shift) if film else (None, None)
    y = group_norm_silu(x, groups, weight, bias, 1e-5, *extra, act=act)  # type: ignore[call-overload]  # act is a str
    torch.testing.assert_close(y.double(), oracle(x, groups, weight, bias, 1e-5, *extra, act), rtol=2e-6, atol=2e-6)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=memory_format):
            assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (2, 6, 3, 2, 2)])
def test_forward_on_rows_sequences_and_volumes(shape: tuple[int, ...]) -> None:
    x, weight, bias, scale, shift, _ = inputs(shape)
    y = group_norm_silu(x, 3, weight, bias, 1e-5, scale, shift)
    torch.testing.assert_close(y.double(), oracle(x, 3, weight, bias, 1e-5, scale, shift), rtol=2e-6, atol=2e-6)


def test_each_of_the_optional_inputs_alone() -> None:
    """A missing bias or shift must be 0, a missing weight 1 and a missing scale 0."""
    x, weight, bias, scale, shift, _ = inputs((2, 6, 4, 3))
    for layout in (torch.Tensor.contiguous, channels_last):
        for w, b, sc, sh in ((weight, None, None, None), (None, bias, None, shift), (None, None, scale, None)):
            y = group_norm_silu(layout(x), 3, w, b, 1e-5, sc, sh)
            torch.testing.assert_close(y.double(), oracle(x, 3, w, b, 1e-5, sc, sh), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_after_and_before(layout: Layout) -> None:
    x, weight, bias, scale, shift, residual = (layout(v) if v.ndim == 4 else v for v in inputs((2, 6, 5, 3)))
    after = group_norm_silu(x, 3, weight, bias, 1e-5, scale, shift, residual)
    expected = oracle(x, 3, weight, bias, 1e-5, scale, shift) + residual.double()
    torch.testing.assert_close(after.double(), expected, rtol=2e-6, atol=2e-6)
    before, total = group_norm_silu(x, 3, weight, bias, 1e-5, scale, shift, residual, residual_at="before")
    assert torch.equal(total, x + residual)
    expected = oracle(total, 3, weight, bias, 1e-5, scale, shift)
    torch.testing.assert_close(before.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ratio", "tolerance"), [(30, 1e-5), (300, 1e-4), (3000, 1e-3)])
def test_large_means_do_not_destroy_the_variance(layout: Layout, ratio: int, tolerance: float) -> None:
    """PyTorch's channels_last CPU kernel takes E[x^2] - E[x]^2: 2 % wrong at mean / std = 300, noise at 3000."""
    x = layout(torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)) + ratio)
    error = group_norm_silu(x, 4, None, None, 1e-5, act=None).double() - oracle(x, 4, None, None, 1e-5, act=None)
    assert error.abs().max() < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_the_last_rounding(layout: Layout, dtype: torch.dtype) -> None:
    """Statistics or affine arithmetic in bf16 would cost several roundings; autocast keeps parameters float32."""
    x, weight, bias, scale, shift, residual = inputs((2, 8, 5, 5))
    x, residual = layout((x + 20).to(dtype)), layout(residual.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = group_norm_silu(x, 4, weight, bias, 1e-5, scale, shift, residual)
    assert y.dtype == dtype
    expected = oracle(x, 4, weight, bias, 1e-5, scale, shift) + residual.double()
    unit = torch.finfo(dtype).eps / 2
    assert ((y.double() - expected).abs() <= 1.02 * unit * expected.abs() + 1e-5).all()


def double_inputs(layout: Layout) -> tuple[Tensor, ...]:
    return tuple(
        (layout(v) if v.ndim == 4 else v).requires_grad_() for v in inputs((2, 4, 3, 2), torch.float64)
    )


def everything(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    """Both residual forms in one scalar-valued chain."""
    y = group_norm_silu(x, 2, weight, bias, 1e-3, scale, shift, residual)
    y, total = group_norm_silu(x, 2, weight, bias, 1e-3, scale, shift, y, residual_at="before")
    return y + total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_input_in_both_modes_and_twice(layout: Layout) -> None:
    """Group means are taken off as constants for channels_last: no derivative of any order may notice."""
    args = double_inputs(layout)
    assert torch.autograd.gradcheck(everything, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(everything, args)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_float32_gradients_match_pytorchs_operator(shape: tuple[int, ...], groups: int) -> None:
    """channels_last gradients are as near to float64 as those of F.group_norm on contiguous tensors, at odd sizes."""
    x, weight, bias, *_ = inputs(shape)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def theirs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        args = [v.to(dtype).requires_grad_() for v in (x, weight, bias)]
        return torch.autograd.grad(F.silu(F.group_norm(args[0], groups, *args[1:], 1e-5)), args, dy.to(dtype))

    args = [v.clone().requires_grad_() for v in (channels_last(x), weight, bias)]
    got = torch.autograd.grad(group_norm_silu(args[0], groups, args[1], args[2], 1e-5), args, dy)
    for a, b, exact in zip(got, theirs(torch.float32), theirs(torch.float64), strict=True):
        bound = 4 * (b - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (a - exact).abs().max() <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tangents_match_finite_differences(layout: Layout) -> None:
    """jvp (moment matching needs it), and jvp of a gradient, where the tangent hides inside functorch's wrapper."""
    args = tuple(v.detach() for v in double_inputs(layout))
    generator = torch.Generator().manual_seed(2)
    tangents = tuple(torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in args)

    def moved(function: Callable[..., Tensor], h: float) -> Tensor:
        return function(*(a + h * t for a, t in zip(args, tangents, strict=True)))

    gradient = grad(lambda *a: everything(*a).square().sum())
    for function in (everything, gradient):
        _, tangent = jvp(function, args, tangents)
        difference = (moved(function, 1e-6) - moved(function, -1e-6)) / 2e-6
        torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)


def test_per_sample_gradients_by_vmap() -> None:
    """Channels_last inside vmap: the group means that are taken off must be each sample's own."""
    x = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64).movedim(2, -1).contiguous().movedim(-1, 2)

    def loss(x: Tensor) -> Tensor:
        return group_norm_silu(x, 2, None, None, 1e-5).square().sum()

    torch.testing.assert_close(vmap(grad(loss))(x), torch.stack([grad(loss)(v.contiguous()) for v in x]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_left_alone_without_gradients(layout: Layout) -> None:
    """The activation works in place when no gradient is recorded; it must never reach x or the residual."""
    x, weight, bias, scale, shift, residual = (layout(v) if v.ndim == 4 else v for v in inputs((2, 8, 1, 1)))
    kept = [v.clone() for v in (x, residual)]
    with torch.no_grad():
        group_norm_silu(x, 8, weight, bias, 1e-5, scale, shift, residual)
        _, total = group_norm_silu(x, 8, None, None, 1e-5, residual=residual, residual_at="before")
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_graph_breaks(layout: Layout) -> None:
    torch._dynamo.reset()
    args = double_inputs(layout)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), everything(*args))


def test_an_empty_batch_is_an_empty_result() -> None:
    for layout in (torch.Tensor.contiguous, channels_last):
        assert group_norm_silu(layout(torch.empty(0, 4, 3, 3)), 2, None, None).shape == (0, 4, 3, 3)


@pytest.mark.parametrize(("change", "message"), [
    ({"groups": 4}, r"groups=4 must divide the channels of x \(2, 6, 3, 3\)"),
    ({"groups": 0}, "groups=0 must divide"),
    ({"weight": torch.ones(5)}, r"weight \(5,\) must be \(6,\)"),
    ({"scale": torch.ones(6)}, r"scale \(6,\) must be \(2, 6\)"),
    ({"residual": torch.ones(2, 6, 3, 1)}, r"residual \(2, 6, 3, 1\) must be shaped like x"),
    ({"residual_at": "before"}, "needs a residual"),
    ({"residual_at": "middle"}, "residual_at='middle'"),
    ({"act": "relu"}, "act='relu' must be"),
])
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"groups": 3, "weight": None, "bias": None} | change
    with pytest.raises(ValueError, match=message):
        group_norm_silu(torch.randn(2, 6, 3, 3), **arguments)  # type: ignore[call-overload]  # the point of the test


def test_integers_are_refused() -> None:
    """Images as bytes would come back rounded to whole numbers, without a word."""
    with pytest.raises(ValueError, match=r"x \(2, 6, 3, 3\) is torch.int64: must be of a floating dtype"):
        group_norm_silu(torch.ones(2, 6, 3, 3, dtype=torch.int64), 3, None, None)


@pytest.mark.parametrize("batch", [1, 2])
def test_groups_of_one_value(batch: int) -> None:
    """A value less its mean is 0, whatever the batch: PyTorch refuses batch 1, and is off by 300 roundings else."""
    x, weight, bias, scale, shift, _ = inputs((batch, 4, 1, 1))
    y = group_norm_silu(x.requires_grad_(), 4, weight, bias, 1e-5, scale, shift)
    expected = oracle(x.detach(), 4, weight, bias, 1e-5, scale, shift)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.abs().max() < 1e-4  # of terms of 316 each


@pytest.mark.parametrize("shape", [(2, 6, 0, 3), (2, 0, 3, 3)])
def test_groups_of_nothing_are_refused(shape: tuple[int, ...]) -> None:
    """PyTorch's own errors name neither tensor nor shape."""
    with pytest.raises(ValueError, match=r"has no channels or no pixels"):
        group_norm_silu(torch.zeros(shape), 2, None, None)
