"""The fused guided_update on each backend that runs here, against the reference, itself tested in float64."""

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from emulated_cuda import emulated
from torch import Tensor
from torch.func import grad, jvp
from torch.utils.checkpoint import checkpoint

from fewstep.kernels import backend, guided_update, two_step_target, use_backend
from fewstep.kernels.guided_update import fused
from fewstep.schedules import Cosine, Karras, Raw, Schedule

KINDS = ("estimate", "ddim", "renoise", "posterior", "blend")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COSINE = Cosine()
SHAPES = ((2, 4, 16, 16), (2, 3, 21, 17), (1, 1, 1, 1), (3, 5))   # aligned, ragged and over a block, one element, flat
pytestmark = pytest.mark.usefixtures("unset_is_nan")


@pytest.fixture(params=["triton", "cuda"])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A fused backend, Triton interpreted and CUDA emulated; within a test `use_backend(name)` selects it."""
    with emulated():
        yield request.param


def drawn(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g) for _ in range(count))


def run(
    kind: str, raw: Raw, z: Tensor, w: Tensor | float | None, noise: Tensor, clip: tuple[float, float] | None = None,
    schedule: Schedule = COSINE,
) -> Tensor:  # fmt: skip
    count, wide = len(z), torch.promote_types(z.dtype, torch.float32)
    t, s = (torch.tensor(times, dtype=wide)[:count] for times in ([1.0, 0.8, 0.3], [0.9, 0.4, 0.0]))
    if kind == "blend":
        return two_step_target(raw, z, t, schedule, noise, s, w, clip=clip)
    if kind == "estimate":
        return guided_update(raw, z, t, None, schedule, w, clip=clip)
    return guided_update(raw, z, t, s, schedule, w, kind=kind, noise=noise, clip=clip)


def worst(got: Tensor, expected: Tensor) -> float:
    """Largest error, relative to the largest value of its sample."""
    size = expected.flatten(1).abs().amax(1).clamp(min=1.0)
    return float(((got.double() - expected).flatten(1).abs().amax(1) / size).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["x", "eps", "v", "flow"])
def test_as_exact_as_the_reference(name: str, kind: str, prediction: str) -> None:
    """Over dtypes, sizes, guidance and limits: the error against float64 may not be more than the reference's own."""
    cases = itertools.product(DTYPES, ((None, None), (1.5, None), (torch.tensor([0.0, 1.0, 4.0]), (-1.0, 0.5))))
    for i, (dtype, (w, clip)) in enumerate(cases):
        z, cond, uncond, noise = drawn(SHAPES[(i + KINDS.index(kind)) % len(SHAPES)], 4, seed=i)
        raw = Raw(cond.to(dtype), None if i == 0 else uncond.to(dtype), prediction)
        w = w[: len(z)] if isinstance(w, Tensor) else w
        exact_raw = Raw(raw.cond_output.double(), None if i == 0 else raw.uncond_output.double(), raw.prediction)
        exact = run(kind, exact_raw, z.double(), w, noise.double(), clip, schedule=Karras() if i % 2 else Cosine())
        plain = run(kind, raw, z, w, noise, clip, schedule=Karras() if i % 2 else Cosine())
        with use_backend(name):
            got = run(kind, raw, z, w, noise, clip, schedule=Karras() if i % 2 else Cosine())
        assert got.dtype == torch.float32
        assert worst(got, exact) <= 1.5 * worst(plain, exact) + 5e-7, (dtype, w, clip, z.shape)


def gradients_of(
    kind: str, prediction: str, leaves: list[Tensor], needed: list[Tensor], w: Tensor | float | None, noise: Tensor,
    clip: tuple[float, float] | None, upstream: Tensor,
) -> list[Tensor]:  # fmt: skip
    for leaf in leaves:
        leaf.requires_grad_()
    moved = run(kind, Raw(leaves[0], leaves[1], prediction), leaves[2], w, noise, clip)
    found = torch.autograd.grad(moved, needed, upstream, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, needed, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_references(name: str, kind: str) -> None:
    """Student losses go through it: to both outputs and to z, of each dtype, none where x was clipped."""
    for i, (dtype, prediction, w, clip) in enumerate([
        (torch.float32, "v", torch.tensor([0.5, 3.0]), None), (torch.bfloat16, "eps", 1.5, (-1.0, 1.0)),
        (torch.float16, "x", None, (-0.45, 0.45)), (torch.float32, "flow", 0.0, (-1.0, 0.25)),
    ]):
        z, cond, uncond, noise, upstream = drawn((2, 3, 21, 17), 5, seed=i)
        leaves = [cond.to(dtype), uncond.to(dtype), z.bfloat16() if i == 1 else z]
        needed = leaves if w is not None else [leaves[0], leaves[2]]

        gradients = partial(gradients_of, kind, prediction, leaves, needed, w, noise, clip, upstream)
        expected = gradients()
        with use_backend(name):
            got = gradients()
        for one, other, leaf in zip(got, expected, needed, strict=True):
            assert one.dtype == leaf.dtype
            bound = 1.01 * torch.finfo(leaf.dtype).eps + 4e-7      # both round once; one unit in the last place
            assert ((one - other).abs() <= bound * other.abs() + 1e-6 * upstream.abs().max()).all(), (i, leaf.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients_by_the_reference(name: str, kind: str) -> None:
    """A gradient penalty differentiates the backward pass: the kernels have no second one, the reference does."""
    z, cond, uncond, noise = drawn((2, 3, 5, 4), 4)
    leaves = [x.requires_grad_() for x in (cond, uncond, z)]

    def penalty(w: Tensor | float) -> tuple[Tensor, ...]:
        moved = run(kind, Raw(cond, uncond, "v"), z, w, noise, clip=(-1.5, 1.0))
        first = torch.autograd.grad(moved.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in first), torch.tensor(0.0)), leaves)

    for w in (1.5, torch.tensor([0.5, 3.0])):
        expected = penalty(w)
        with use_backend(name):
            got = penalty(w)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_needed_gets_a_gradient(name: str) -> None:
    """A teacher's output and a fixed z must not cost memory traffic, nor break the graph."""
    z, cond, uncond, noise = drawn((2, 3, 4, 4), 4)
    with use_backend(name):
        run("ddim", Raw(cond.requires_grad_(), uncond, "v"), z, 2.0, noise).sum().backward()
    assert cond.grad is not None
    assert uncond.grad is None
    assert z.grad is None


def test_every_layout_gives_the_same(name: str) -> None:
    """Networks answer in channels_last while the state is contiguous; slices come from users."""
    z, cond, uncond, noise = drawn((2, 3, 6, 6), 4)

    def both(state: Tensor, a: Tensor, b: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        leaf = a.detach().requires_grad_()
        moved = run("posterior", Raw(leaf, b, "v"), state, 2.0, n)
        return moved, torch.autograd.grad(moved.square().sum(), leaf)[0]

    expected, gradient = both(z, cond, uncond, noise)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (z, cond, uncond, noise)]
    wide = torch.zeros(2, 3, 6, 12)
    wide[..., ::2] = z
    with use_backend(name):
        for state, a, b, n in ((z, last[1], last[2], noise), last, (wide[..., ::2], last[1], uncond, last[3])):
            moved, g = both(state, a, b, n)
            torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(g, gradient, rtol=1e-5, atol=1e-5)
            assert moved.stride() == (last[0] if state is last[0] else z).stride()


def test_the_update_and_the_estimate_come_from_one_call(name: str) -> None:
    """The first of two distillation steps needs both: the estimate must be the clipped one that the step goes from."""
    z, cond, uncond = drawn((2, 3, 5, 5), 3)
    t, s, raw = torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.0]), Raw(cond, uncond, "v")
    with use_backend(name):
        moved, x = guided_update(raw, z, t, s, Cosine(), 1.5, clip=(-1, 1), return_x=True)
    plain = guided_update(raw, z, t, s, Cosine(), 1.5, clip=(-1, 1), return_x=True)
    assert torch.equal(plain[1], guided_update(raw, z, t, None, Cosine(), 1.5, clip=(-1, 1)))
    assert torch.equal(plain[0], guided_update(raw, z, t, s, Cosine(), 1.5, clip=(-1, 1)))
    torch.testing.assert_close((moved, x), plain, rtol=1e-5, atol=1e-6)


def test_blending_is_the_mean_of_two_estimates() -> None:
    z, x, first = drawn((2, 3, 5, 5), 3)
    share = torch.tensor([0.25, 0.0])
    got = two_step_target(Raw(x, None, "x"), z, torch.tensor([0.5, 0.1]), Cosine(), first, share)
    torch.testing.assert_close(got[0], 0.25 * first[0] + 0.75 * x[0])
    assert torch.equal(got[1], x[1])                              # at the data end nothing of the first may be left


def test_not_a_number_is_not_clipped_away(name: str) -> None:
    """A diverged network must be seen, not shown as a black image."""
    z, cond = drawn((1, 2, 3, 3), 2)
    cond[0, 0, 0, 0] = torch.nan
    with use_backend(name):
        got = run("ddim", Raw(cond, None, "v"), z, None, z, clip=(-1, 1))
    assert got.isnan().sum() == 1


def operator_arguments(name: str) -> tuple[object, ...]:
    z, cond, uncond, noise = drawn((2, 3, 4, 4), 4)
    levels = [torch.tensor([a, a / 2]) for a in (0.3, 0.9, 0.8, 0.5)]
    leaves = (cond.bfloat16().requires_grad_(), uncond.bfloat16().requires_grad_(), z.requires_grad_())
    return name, *leaves, noise, torch.tensor([0.5, 2.0]), 0.0, levels, 2, 3, -1.0, 1.0, False


def test_operator_is_a_good_citizen(name: str) -> None:
    """Schema, fake tensors, autograd registration: what torch.compile and checkpointing take on trust."""
    torch.library.opcheck(fused.fused, operator_arguments(name))
    backend_, cond, uncond, z, noise, weight, w, levels, *rest = operator_arguments(name)
    inputs = (backend_, noise, cond.detach(), uncond.detach(), z.detach(), weight, w, levels, *rest)
    torch.library.opcheck(fused.fused_backward, inputs)


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_dynamic_sizes(name: str, engine: str) -> None:
    torch._dynamo.reset()

    def loss(cond: Tensor, uncond: Tensor, z: Tensor, noise: Tensor) -> Tensor:
        return run("renoise", Raw(cond, uncond, "v"), z, 1.5, noise, (-1.0, 1.0)).square().sum()

    with use_backend(name), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=engine)
        for shape in ((2, 3, 4, 4), (2, 3, 6, 5)):
            z, cond, uncond, noise = drawn(shape, 4)
            results = []
            for function in (loss, compiled):
                leaf = cond.bfloat16().requires_grad_()
                value = function(leaf, uncond.bfloat16(), z, noise)
                results.append((value.detach(), *torch.autograd.grad(value, leaf)))
            torch.testing.assert_close(results[0], results[1])


def test_recomputed_by_a_checkpoint_it_is_the_same(name: str) -> None:
    z, cond, uncond, noise = drawn((2, 3, 4, 4), 4)

    def update(cond: Tensor) -> Tensor:
        return run("posterior", Raw(cond, uncond, "eps"), z, 2.0, noise, (-1, 1))

    with use_backend(name):
        gradients = [
            torch.autograd.grad(function(leaf).square().sum(), leaf)[0]
            for function in (update, lambda c: checkpoint(update, c, use_reentrant=False))
            for leaf in [cond.clone().requires_grad_()]
        ]
    assert torch.equal(*gradients)


def tangent_error(name: str) -> float:
    """Error of the tangent against a finite difference in float64."""
    z, cond, uncond, noise = (x.double() for x in drawn((2, 3, 3, 3), 4))

    def update(cond: Tensor, z: Tensor) -> Tensor:
        return run("posterior", Raw(cond, uncond.to(cond.dtype), "v"), z, 2.0, noise.to(cond.dtype))

    with use_backend(name):
        _, tangent = jvp(update, (cond.float(), z.float()), (z.float(), cond.float()))
    difference = (update(cond + 1e-6 * z, z + 1e-6 * cond) - update(cond - 1e-6 * z, z - 1e-6 * cond)) / 2e-6
    return worst(tangent, difference)


def test_forward_mode_keeps_the_tangent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A custom operator would drop it in silence; the last line is this test's own test."""
    assert tangent_error(name) < 1e-5

    def update(cond: Tensor) -> Tensor:
        return run("posterior", Raw(cond, None, "v"), drawn((2, 3, 3, 3), 1)[0], None, cond.detach()).square().sum()

    point, direction = drawn((2, 3, 3, 3), 2)
    with use_backend(name):
        _, product = jvp(grad(update), (point,), (direction,))
    torch.testing.assert_close(product, jvp(grad(update), (point,), (direction,))[1])
    for check in ("forward_mode_is_on", "functional_transform_is_on"):
        monkeypatch.setattr(backend, check, lambda: False)
    assert tangent_error(name) > 0.1


@pytest.mark.parametrize(("change", "reason"), [
    ({"z": torch.zeros(2, 3, dtype=torch.float64)}, "z are torch.float64"),
    ({"t": torch.ones(2, dtype=torch.float64)}, "times are float64"),
    ({"w": torch.ones(2, requires_grad=True)}, "a gradient to w is needed"),
    ({"raw": Raw(torch.zeros(2, 3), torch.zeros(2, 3).half(), "x")}, "differ in dtype"),
])
def test_what_it_cannot_do_is_refused_by_name(name: str, change: dict[str, object], reason: str) -> None:
    """And done by the reference if "auto" was asked, see test_backend.py."""
    z = torch.zeros(2, 3)
    arguments = {"raw": Raw(z, z, "x"), "z": z, "t": torch.ones(2), "s": torch.zeros(2), "schedule": Cosine()} | change
    with use_backend(name), pytest.raises(ValueError, match=f"guided_update: {name} cannot run .*{reason}"):
        guided_update(**arguments)


def test_shapes_of_training_and_sampling_do_not_fall_back(name: str) -> None:
    """bf16 outputs, float32 state, one w per sample: what every experiment asks for."""
    z = torch.zeros(2, 3, 4, 4)
    levels = torch.ones(2)
    for raw in (Raw(z.bfloat16(), z.bfloat16(), "v"), Raw(z.bfloat16().requires_grad_(), None, "v"), Raw(z, z, "eps")):
        for kind in ("ddim", "renoise", "posterior"):
            with use_backend(name):
                args = (raw, z, levels, levels, Cosine(), levels, kind, z, (-1.0, 1.0), levels, False)
                assert backend.explain("guided_update", *args).backend == name


def test_an_empty_batch_stays_empty(name: str) -> None:
    with use_backend(name):
        nothing = torch.zeros(0, 3)
        assert run("ddim", Raw(nothing, None, "v"), nothing, None, nothing).shape == (0, 3)
