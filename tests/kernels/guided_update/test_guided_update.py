"""guided_update against the papers' formulas in float64, diffusers' DDIM, and what each step must preserve."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.func import jvp

from fewstep.kernels import guided_update
from fewstep.schedules import Cosine, Discrete, Karras, LinearBeta, Raw, RectifiedFlow, Schedule, from_x, guide, to_x
from fewstep.schedules.prediction import PREDICTIONS, Prediction

SCHEDULES = [
    pytest.param(s, id=type(s).__name__)
    for s in (Cosine(), LinearBeta(), Discrete(torch.linspace(0.999, 0.005, 200)), Karras(), RectifiedFlow())
]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


T, S = double(1.0, 0.8, 0.5, 0.3), double(0.9, 0.4, 0.25, 0.0)


def drawn(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(count)
    return tuple(torch.randn(4, 2, 3, 3, generator=g, dtype=torch.float64).to(dtype) for _ in range(count))


def columns(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in schedule.alpha_sigma(t))
    return alpha, sigma


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_estimate_is_guidance_then_conversion(schedule: Schedule, prediction: Prediction) -> None:
    """Raw and x paths must agree: samplers use whichever a denoiser offers."""
    z, cond, uncond = drawn(3)
    w = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    raw = Raw(cond, uncond, prediction)
    expected = guide(to_x(cond, z, T, schedule, prediction), to_x(uncond, z, T, schedule, prediction), w)
    size = expected.abs().amax((1, 2, 3), keepdim=True)           # eps at t = 1 is divided by alpha_1 = 5e-5
    assert ((guided_update(raw, z, T, None, schedule, w) - expected) / size).abs().max() < 1e-11
    for step in ({"kind": "ddim"}, {"kind": "posterior", "noise": cond}, {"kind": "renoise", "noise": cond}):
        through_x = guided_update(Raw(expected, None, "x"), z, T, S, schedule, **step)
        assert ((guided_update(raw, z, T, S, schedule, w, **step) - through_x) / size).abs().max() < 1e-11


def test_conventions_of_w() -> None:
    """w = 0 and None are the conditional output; where w is already inside (no unconditional output) it is not used."""
    z, cond, uncond = drawn(3)
    schedule, raw = Cosine(), Raw(cond, uncond, "v")
    plain = guided_update(Raw(cond, None, "v"), z, T, S, schedule)
    for w in (None, 0.0, torch.zeros(4)):
        torch.testing.assert_close(guided_update(raw, z, T, S, schedule, w), plain)
    assert torch.equal(guided_update(Raw(cond, None, "v"), z, T, S, schedule, 3.0), plain)
    two = guided_update(raw, z, T, None, schedule, 2.0)
    torch.testing.assert_close(two, guided_update(raw, z, T, None, schedule, torch.full((4,), 2.0)))
    expected = 3 * to_x(cond, z, T, schedule, "v") - 2 * to_x(uncond, z, T, schedule, "v")
    torch.testing.assert_close(two, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("times", [(T, S), (S, T)], ids=["sampling", "encoding"])
def test_ddim_moves_along_the_line_of_x_and_eps(schedule: Schedule, times: tuple[Tensor, Tensor]) -> None:
    """With the true x, DDIM must land on alpha_s x + sigma_s eps exactly, forwards and (encoding) backwards."""
    x, eps = drawn(2)
    t, s = times
    z = schedule.add_noise(x, t, eps)
    got = guided_update(Raw(x, None, "x"), z, t, s, schedule)
    torch.testing.assert_close(got, schedule.add_noise(x, s, eps), rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_equals_its_other_printed_form(schedule: Schedule) -> None:
    """arXiv 2202.00512 eq. 7, z_s = alpha_s x + sigma_s (z_t - alpha_t x) / sigma_t, for an x that fits no noise."""
    z, x = drawn(2)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = columns(schedule, T), columns(schedule, S)
    expected = alpha_s * x + sigma_s * (z - alpha_t * x) / sigma_t
    torch.testing.assert_close(guided_update(Raw(x, None, "x"), z, T, S, schedule), expected, rtol=1e-11, atol=1e-11)


def test_ddim_with_v_is_a_rotation() -> None:
    """z_s = cos(d) z_t - sin(d) v with d the difference of angles atan2(sigma, alpha) (papers.md, angle form)."""
    z, v = drawn(2)
    schedule = Cosine()
    angle_t, angle_s = (torch.atan2(*reversed(columns(schedule, u))) for u in (T, S))
    expected = torch.cos(angle_t - angle_s) * z - torch.sin(angle_t - angle_s) * v
    torch.testing.assert_close(guided_update(Raw(v, None, "v"), z, T, S, schedule), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_ddim_agrees_with_diffusers(prediction: Prediction, name: str) -> None:
    ddim = DDIMScheduler(prediction_type=name, clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(10)
    schedule = Discrete(ddim.alphas_cumprod)
    z, output = drawn(2, torch.float32)
    for index in ddim.timesteps[:-1].tolist():
        t, s = (torch.full((4,), (i + 1) / 1000) for i in (index, index - 100))
        theirs = ddim.step(output, index, z).prev_sample
        ours = guided_update(Raw(output, None, prediction), z, t, s, schedule)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_the_schedules(schedule: Schedule) -> None:
    z, x, noise = drawn(3)
    mean, std = schedule.posterior(z, x, T, S)
    got = guided_update(Raw(x, None, "x"), z, T, S, schedule, kind="posterior", noise=noise)
    torch.testing.assert_close(got, mean + std * noise, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_renoise_is_a_jump_and_a_transition(schedule: Schedule) -> None:
    """arXiv 2210.03142, stochastic sampler: twice the step by DDIM, then noise back; also to a time given as `jump`."""
    z, x, noise = drawn(3)
    t, s = double(1.0, 0.8, 0.5, 0.25), double(0.75, 0.5, 0.25, 0.0)
    for jump in (None, double(0.5, 0.1, 0.2, 0.0)):
        k = double(0.5, 0.2, 0.0, 0.0) if jump is None else jump
        at_k = guided_update(Raw(x, None, "x"), z, t, k, schedule)
        alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in schedule.transition(s, k))
        got = guided_update(Raw(x, None, "x"), z, t, s, schedule, kind="renoise", noise=noise, jump=jump)
        torch.testing.assert_close(got, alpha * at_k + sigma * noise, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["renoise", "posterior"])
def test_noise_keeps_the_marginal(schedule: Schedule, kind: str) -> None:
    """With the true x, z_s must have mean alpha_s x and variance sigma_s^2: eps and noise must add up to it."""
    x, eps, noise = drawn(3)
    one = torch.ones_like(x)

    def run(eps: Tensor, noise: Tensor) -> Tensor:
        step = schedule.add_noise(x, T, eps)
        return guided_update(Raw(x, None, "x"), step, T, S, schedule, kind=kind, noise=noise)

    alpha, sigma = columns(schedule, S)
    centre = run(0 * eps, 0 * noise)
    torch.testing.assert_close(centre, alpha * x, rtol=1e-10, atol=1e-10)
    from_eps, from_noise = run(one, 0 * noise) - centre, run(0 * eps, one) - centre
    torch.testing.assert_close(from_eps**2 + from_noise**2, (sigma**2).expand_as(x), rtol=1e-6, atol=1e-10)


def test_clipping_limits_x_and_the_step_follows_from_the_clipped_x() -> None:
    z, x = drawn(2)
    schedule, raw = Cosine(), Raw(3 * x, None, "x")
    limits = (-0.5, 1.0)
    clipped = guided_update(raw, z, T, None, schedule, clip=limits)
    assert torch.equal(clipped, (3 * x).clamp(-0.5, 1.0))
    expected = guided_update(Raw(clipped, None, "x"), z, T, S, schedule)
    assert torch.equal(guided_update(raw, z, T, S, schedule, clip=limits), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["x", "v", "flow"])
def test_float32_keeps_its_digits_at_both_ends(schedule: Schedule, prediction: Prediction) -> None:
    """First and last steps and steps of 1 / 1024, where sigma_s / sigma_t - 1 and 1 - e^x cancel if written plainly."""
    x, eps, noise = drawn(3)
    t = torch.tensor([1.0, 1 / 1024, 1 - 1 / 1024, 0.5])
    s = torch.tensor([1 - 1 / 1024, 0.0, 1 - 2 / 1024, 0.5 - 1 / 1024])
    z = schedule.add_noise(x, t.double(), eps).float()
    output = from_x(x, z.double(), t.double(), schedule, prediction).float()
    for kind in ("ddim", "posterior", "renoise"):
        def step(dtype: torch.dtype, kind: str = kind) -> Tensor:
            arguments = (z.to(dtype), t.to(dtype), s.to(dtype), schedule)
            return guided_update(  # type: ignore[call-overload,no-any-return]  # kind is a plain string here
                Raw(output.to(dtype), None, prediction), *arguments, kind=kind, noise=noise.to(dtype)
            )

        exact = step(torch.float64)
        assert step(torch.float32).dtype == torch.float32
        scale = exact.abs().amax((1, 2, 3)).clamp(min=1.0)
        error = (step(torch.float32).double() - exact).abs().amax((1, 2, 3)) / scale
        assert error.max() < 3e-5, kind


def test_half_precision_outputs_are_used_in_float32() -> None:
    """Networks answer in bf16 under autocast; the state z must not be rounded to bf16 at every step."""
    z, cond, uncond, noise = drawn(4, torch.float32)
    raw = Raw(cond.bfloat16(), uncond.bfloat16(), "v")
    wide = Raw(raw.cond_output.float(), raw.uncond_output.float(), "v")
    t, s = T.float(), S.float()
    for kind in ("ddim", "renoise", "posterior"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = guided_update(raw, z, t, s, Cosine(), 2.0, kind=kind, noise=noise)
        assert got.dtype == torch.float32
        assert torch.equal(got, guided_update(wide, z, t, s, Cosine(), 2.0, kind=kind, noise=noise))
    half = guided_update(raw, z.bfloat16(), t, s, Cosine())       # a bf16 state: its coefficients must not be bf16 too
    assert torch.equal(half, guided_update(raw, z.bfloat16().float(), t, s, Cosine()))


def test_gradients_and_tangents() -> None:
    """Targets and losses differentiate through it: both modes, every tensor input."""
    z, cond, uncond, noise = (v[:2, :1, :1].clone().requires_grad_() for v in drawn(4))
    w = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    t, s = T[1:3], S[1:3]

    def update(cond: Tensor, uncond: Tensor, z: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        raw = Raw(cond, uncond, "v")
        return guided_update(raw, z, t, s, Cosine(), w, kind="posterior", noise=noise) + guided_update(
            raw, z, t, s, Cosine(), w, kind="renoise", noise=noise)

    assert torch.autograd.gradcheck(update, (cond, uncond, z, w, noise), check_forward_ad=True)
    args = tuple(v.detach() for v in (cond, uncond, z, w, noise))
    _, tangent = jvp(update, args, args)
    ahead, behind = (update(*(a * (1 + h) for a in args)) for h in (1e-6, -1e-6))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=1e-7, atol=1e-7)


def test_one_time_for_all_samples() -> None:
    z, cond = drawn(2, torch.float32)
    t, s = torch.tensor(0.8), torch.tensor(0.3)
    once = guided_update(Raw(cond, None, "v"), z, t, s, Cosine())
    assert torch.equal(once, guided_update(Raw(cond, None, "v"), z, t.expand(4), s.expand(4), Cosine()))


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    z, cond, uncond, noise = drawn(4, torch.float32)

    def update(z: Tensor) -> Tensor:
        raw = Raw(cond, uncond, "v")
        return guided_update(raw, z, T.float(), S.float(), Cosine(), 1.5, kind="renoise", noise=noise, clip=(-1, 1))

    torch.testing.assert_close(torch.compile(update, fullgraph=True, backend="aot_eager")(z), update(z))


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "euler"}, "kind='euler' is unknown; known: ddim, renoise, posterior"),
    ({"kind": "posterior"}, r"kind='posterior' needs noise, a tensor shaped like z \(4, 2, 3, 3\)"),
    ({"raw": Raw(torch.zeros(4, 2, 3, 3), None, "score")}, "prediction='score' is unknown"),
    ({"raw": Raw(torch.zeros(8, 2, 3, 3), None, "x")}, r"outputs \(8, 2, 3, 3\) must be shaped like z"),
    *(({name: torch.full((2,), 0.5)}, rf"{name} \(2,\) must be \(\) or \(4,\), one per sample of z \(4, 2, 3, 3\)")
      for name in ("t", "s", "w", "jump")),
    ({"w": torch.ones(4, 1)}, r"w \(4, 1\) must be \(\) or \(4,\)"),
    ({"clip": (1, -1)}, r"clip=\(1, -1\) must be None or \(low, high\) with low < high"),
])
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    z = torch.zeros(4, 2, 3, 3)
    arguments = {"raw": Raw(z, None, "x"), "z": z, "t": T, "s": S, "schedule": Cosine()} | change
    with pytest.raises(ValueError, match=message):
        guided_update(**arguments)  # type: ignore[arg-type]  # the point of the test


def test_ddim_needs_no_noise_and_angles_cover_a_half_turn() -> None:
    """From pure noise to data in one step the state turns by pi / 2 less the clipped ends."""
    z, v = drawn(2)
    got = guided_update(Raw(v, None, "v"), z, torch.ones(4).double(), torch.zeros(4).double(), Cosine())
    turn = math.pi / 2 - 2 * math.atan(math.exp(-10))
    torch.testing.assert_close(got, math.cos(turn) * z - math.sin(turn) * v, rtol=0, atol=1e-9)
