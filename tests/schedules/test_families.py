"""Each schedule against its printed formula in 50 digits, at both ends, in float32 and float64."""

import copy
import json
import math
import pickle
from collections.abc import Callable

import mpmath
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fewstep.schedules import Cosine, Discrete, Karras, LinearBeta, RectifiedFlow, Schedule, schedule_from_config

mpmath.mp.dps = 50
STABLE = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
).alphas_cumprod

ALL: dict[str, Schedule] = {
    "cosine": Cosine(), "cosine_shifted": Cosine(shift=-2.77), "cosine_narrow": Cosine(-8.0, 12.0, 1.0),
    "linear_beta": LinearBeta(), "linear_beta_long": LinearBeta(beta_max=80.0, log_snr_min=-35.0),
    "discrete": Discrete(STABLE), "karras": Karras(), "flow": RectifiedFlow(),
}
# times that crowd towards both ends, where a careless formula cancels
TIMES = [0.0, 1e-7, 3e-5, 1e-3, 0.02, 0.3, 0.499, 0.5, 0.501, 0.77, 0.98, 0.999, 1 - 3e-5, 1 - 2**-23, 1.0]


def every(names: str = " ".join(ALL)) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("schedule", [pytest.param(ALL[n], id=n) for n in names.split()])


def mp_cosine(schedule: Cosine, t: mpmath.mpf) -> mpmath.mpf:
    """Code of arXiv 2202.00512 with ends moved by the shift, and the shift added (arXiv 2301.11093)."""
    low, high = (mpmath.mpf(v) - mpmath.mpf(schedule.shift) for v in (schedule.log_snr_min, schedule.log_snr_max))
    b = mpmath.atan(mpmath.exp(-high / 2))
    a = mpmath.atan(mpmath.exp(-low / 2)) - b
    return -2 * mpmath.log(mpmath.tan(a * t + b)) + mpmath.mpf(schedule.shift)


def mp_linear_beta(schedule: LinearBeta, t: mpmath.mpf) -> mpmath.mpf:
    """alpha^2 = exp(-integral of beta), from the time at which the log-SNR is log_snr_max."""
    low, rise = mpmath.mpf(schedule.beta_min), mpmath.mpf(schedule.beta_max) - mpmath.mpf(schedule.beta_min)

    def curve(u: mpmath.mpf) -> mpmath.mpf:
        alpha_squared = mpmath.exp(-(low * u + rise * u * u / 2))
        return mpmath.log(alpha_squared / (1 - alpha_squared))

    start = mpmath.findroot(lambda u: curve(u) - schedule.log_snr_max, (1e-8, 3e-8))
    return curve(start + (1 - start) * t)


def mp_karras(schedule: Karras, t: mpmath.mpf) -> mpmath.mpf:
    root = 1 / mpmath.mpf(schedule.rho)
    low, high = (mpmath.mpf(s) ** root for s in (schedule.sigma_min, schedule.sigma_max))
    return -2 * mpmath.log((low + t * (high - low)) ** schedule.rho)


def mp_flow(schedule: RectifiedFlow, t: mpmath.mpf) -> mpmath.mpf:
    first = 1 / (1 + mpmath.exp(mpmath.mpf(schedule.log_snr_max) / 2))
    last = 1 / (1 + mpmath.exp(mpmath.mpf(schedule.log_snr_min) / 2))
    sigma = first + (last - first) * t
    return 2 * mpmath.log((1 - sigma) / sigma)


FORMULAS: dict[type[Schedule], Callable[..., mpmath.mpf]] = {
    Cosine: mp_cosine, LinearBeta: mp_linear_beta, Karras: mp_karras, RectifiedFlow: mp_flow,
}


def exact_alpha_sigma(log_snr: mpmath.mpf, kind: str) -> tuple[float, float]:
    ratio = mpmath.exp(log_snr / 2)                               # alpha / sigma
    if kind == "vp":
        return float(ratio / mpmath.sqrt(1 + ratio**2)), float(1 / mpmath.sqrt(1 + ratio**2))
    if kind == "flow":
        return float(ratio / (1 + ratio)), float(1 / (1 + ratio))
    return 1.0, float(1 / ratio)


@every("cosine cosine_shifted cosine_narrow linear_beta karras flow")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_log_snr_alpha_and_sigma_keep_their_digits_at_both_ends(
    schedule: Schedule, dtype: torch.dtype, tolerance: float
) -> None:
    """A cancelling form (1 - alpha^2, tan near pi / 2, log(1 - t)) loses the last steps of every float32 sampler."""
    t = torch.tensor(TIMES, dtype=dtype)
    exact = [FORMULAS[type(schedule)](schedule, mpmath.mpf(v)) for v in t.tolist()]
    log_snr = torch.tensor([float(v) for v in exact], dtype=torch.float64)
    assert (schedule.log_snr(t).double() - log_snr).abs().max() < tolerance
    alpha, sigma = schedule.alpha_sigma(t)
    for got, place in ((alpha, 0), (sigma, 1)):
        want = torch.tensor([exact_alpha_sigma(v, schedule.kind)[place] for v in exact], dtype=torch.float64)
        assert got.dtype == dtype
        assert (got.double() / want - 1).abs().max() < tolerance


@every()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_snr_stays_within_its_bounds_and_falls_strictly(schedule: Schedule, dtype: torch.dtype) -> None:
    """Equal neighbours would make a step of length zero; a value outside the bounds an alpha or sigma of zero."""
    log_snr = schedule.log_snr(torch.linspace(0, 1, 4001, dtype=dtype))
    assert (log_snr.diff() < 0).all()
    assert log_snr.min() >= schedule.log_snr_min
    assert log_snr.max() <= schedule.log_snr_max
    assert abs(log_snr[0].item() - schedule.log_snr_max) < 1e-5
    outside = schedule.log_snr(torch.tensor([-0.1, 1.1], dtype=dtype))
    assert torch.equal(outside, log_snr[[0, -1]])


@every()
def test_time_is_the_inverse_everywhere(schedule: Schedule) -> None:
    """`reschedule` and transfer between models walk through log-SNR and back."""
    drawn = torch.rand(200, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([*TIMES, *drawn.tolist()], dtype=torch.float64)
    assert (schedule.time(schedule.log_snr(t)) - t).abs().max() < 1e-12
    assert (schedule.time(schedule.log_snr(t.float())) - t.float()).abs().max() < 2.5e-7
    beyond = torch.tensor([schedule.log_snr_max + 5, schedule.log_snr_min - 5], dtype=torch.float64)
    assert schedule.time(beyond).tolist() == [0.0, 1.0]


@every()
def test_times_of_any_shape_give_what_single_times_give(schedule: Schedule) -> None:
    """Per-sample t is the norm in training; broadcasting one sample's value to others would go unseen."""
    t = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    single = torch.tensor([[schedule.log_snr(v.clone()).item() for v in row] for row in t], dtype=torch.float64)
    torch.testing.assert_close(schedule.log_snr(t), single, rtol=0, atol=1e-13)
    torch.testing.assert_close(schedule.time(single), t, rtol=0, atol=1e-12)


@every("cosine cosine_shifted linear_beta discrete karras flow")
def test_derivative_in_t_is_right(schedule: Schedule) -> None:
    """Autograd through t (v targets, ODE slopes, jvp in consistency losses) must not be cut or NaN, ends included."""
    t = torch.tensor([0.0, 0.1003, 0.2501, 0.6007, 0.9001, 1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    assert slope.isfinite().all()
    inner, h = t.detach()[1:-1], 1e-6
    expected = (schedule.log_snr(inner + h) - schedule.log_snr(inner - h)) / (2 * h)
    torch.testing.assert_close(slope[1:-1], expected, rtol=1e-6, atol=0)


def test_cosine_is_the_papers() -> None:
    """alpha_t = cos(pi t / 2) to 1e-4 with alpha_1 = 4.54e-5 (papers.md C.1), and the shift moves log-SNR by itself."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, _ = Cosine().alpha_sigma(t)
    assert (alpha - torch.cos(math.pi / 2 * t)).abs().max() < 1e-4
    assert abs(alpha[-1].item() - math.exp(-10)) < 1e-9
    shift = 2 * math.log(64 / 256)
    inner = t[5:-5]
    moved = Cosine(shift=shift).log_snr(inner) - Cosine(-40, 40).log_snr(inner)
    assert (moved - shift).abs().max() < 5e-3                     # but for the ends, which stay at +-20


def test_linear_beta_is_the_continuous_limit_of_ddpm() -> None:
    """DDPM with T indices has betas near beta(t) / T: a wrong factor in the integral would be far outside 1 %."""
    count = 1000
    ddpm = DDPMScheduler(num_train_timesteps=count, beta_start=0.1 / count, beta_end=20 / count)
    t = (torch.arange(count, dtype=torch.float64) + 1) / count
    alpha, _ = LinearBeta().alpha_sigma(t)
    assert (alpha.square() - ddpm.alphas_cumprod.double()).abs().max() < 1e-2
    late = slice(20, 900)
    discrete = torch.logit(ddpm.alphas_cumprod.double())
    assert (LinearBeta().log_snr(t)[late] - discrete[late]).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_reproduces_diffusers_alphas_at_every_index(dtype: torch.dtype) -> None:
    """Off by one index here and every model trained on indices is evaluated at its neighbour's noise level."""
    t = (torch.arange(1000, dtype=dtype) + 1) / 1000
    alpha, sigma = Discrete(STABLE).alpha_sigma(t)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    assert (alpha.square() / STABLE - 1).abs().max() < tolerance
    assert (sigma.square() / (1 - STABLE.double()) - 1).abs().max() < tolerance


def test_discrete_is_linear_in_log_snr_between_indices() -> None:
    schedule = Discrete(STABLE)
    index = torch.tensor([3.0, 400.0, 998.0], dtype=torch.float64)
    low, middle, high = (schedule.log_snr((index + 1 + f) / 1000) for f in (0.0, 0.25, 1.0))
    torch.testing.assert_close(middle, 0.75 * low + 0.25 * high, rtol=0, atol=1e-12)


def test_discrete_takes_zero_terminal_snr() -> None:
    """Schedules rescaled to zero terminal SNR end with alpha = 0, where eps and log-SNR would be infinite."""
    rescaled = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod
    rescaled = torch.where(torch.arange(1000) == 999, 0.0, rescaled)
    schedule = Discrete(rescaled)
    assert schedule.log_snr(torch.tensor(1.0)).item() == -20.0
    assert schedule.time(torch.tensor(-20.0)).item() == 1.0


def test_discrete_made_in_inference_mode_serves_training() -> None:
    """Its table is cached per dtype; cached as an inference tensor, the first training step would raise."""
    schedule = Discrete(STABLE)
    with torch.inference_mode():
        schedule.log_snr(torch.tensor([0.4]))
    t = torch.tensor([0.4], requires_grad=True)
    schedule.log_snr(t).sum().backward()
    assert t.grad is not None
    assert t.grad.item() < 0


def test_karras_steps_are_edms() -> None:
    """EDM's sigma_i for i = 0 ... N - 1 is the schedule at t = 1 - i / (N - 1); the start is sigma_max times noise."""
    n, schedule = 18, Karras()
    i = torch.arange(n, dtype=torch.float64)
    edm = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    alpha, sigma = schedule.alpha_sigma(1 - i / (n - 1))
    torch.testing.assert_close(sigma, edm, rtol=1e-12, atol=0)
    assert (alpha == 1).all()
    assert schedule.init_noise_scale == 80.0
    assert Cosine().init_noise_scale == RectifiedFlow().init_noise_scale == 1.0


def test_rectified_flow_is_the_straight_line() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = RectifiedFlow().alpha_sigma(t)
    assert (alpha - (1 - t)).abs().max() < 5e-5
    assert (sigma - t).abs().max() < 5e-5
    assert (alpha + sigma - 1).abs().max() < 1e-15


@every()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_times_and_autocast_compute_in_float32(schedule: Schedule, dtype: torch.dtype) -> None:
    """bf16 has 8 bits: a log-SNR of 20 would be off by 0.06 and sigma at t = 0 by 3 %."""
    t = torch.tensor([0.0, 0.3125, 0.5, 0.9375, 1.0])             # exact in both half formats
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = schedule.alpha_sigma(t.to(dtype))
        noisy = schedule.add_noise(torch.ones(5, 2, dtype=dtype), t, torch.ones(5, 2, dtype=dtype))
    for a, b in zip(got, schedule.alpha_sigma(t), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy[:, 0], sum(schedule.alpha_sigma(t)))


@every()
def test_add_noise_keeps_the_image_float32_under_float64_times(schedule: Schedule) -> None:
    """Samplers may keep their grid in float64; a float64 z would crash the network."""
    x, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    z = schedule.add_noise(x, t, noise)
    alpha, sigma = schedule.alpha_sigma(t)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z[1], (alpha[1] * x[1] + sigma[1] * noise[1]).float())


@every()
def test_settings_survive_json_pickle_and_copies(schedule: Schedule) -> None:
    """Weights are saved with their schedule; one that comes back different samples with the wrong noise levels."""
    again = schedule_from_config(json.loads(json.dumps(schedule.to_config())))
    for other in (again, pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert other == schedule
        assert hash(other) == hash(schedule)
    t = torch.linspace(0, 1, 7)
    assert torch.equal(again.log_snr(t), schedule.log_snr(t))


@every("cosine linear_beta discrete karras flow")
def test_compiles_without_graph_breaks(schedule: Schedule) -> None:
    """Denoisers convert inside torch.compile; a break there costs every step, an error every user of fullgraph."""
    torch._dynamo.reset()
    t = torch.rand(5, generator=torch.Generator().manual_seed(2))

    def walk(t: torch.Tensor) -> torch.Tensor:
        return schedule.time(schedule.log_snr(t)) + schedule.alpha_sigma(t)[1]

    assert torch.equal(torch.compile(walk, fullgraph=True, backend="eager")(t), walk(t))


@pytest.mark.parametrize(("config", "message"), [
    ({"type": "Cosinus"}, "type='Cosinus' is unknown; known: Cosine, LinearBeta"),
    ({"shift": 1.0}, "type=None is unknown"),
    ({"type": "Cosine", "shfit": 1.0}, "no setting 'shfit'; known: log_snr_min, log_snr_max, shift"),
    ({"type": "Karras", "log_snr_min": 1.0}, "no setting 'log_snr_min'; known: sigma_min, sigma_max, rho"),
    ({"type": "Cosine", "log_snr_min": 3.0, "log_snr_max": 2.0}, "log_snr_min=3.0 must be"),
    ({"type": "LinearBeta", "beta_min": 0.0}, "beta_min=0.0 must be positive"),
    ({"type": "LinearBeta", "log_snr_min": -60.0, "log_snr_max": -30.0}, "log_snr_max=-30.0 lies below"),
    ({"type": "Karras", "sigma_min": 90.0}, "0 < sigma_min < sigma_max"),
    ({"type": "Discrete", "alphas_cumprod": [0.5, 0.6]}, "decrease strictly"),
    ({"type": "Discrete", "alphas_cumprod": [0.5, 1e-30, 1e-31]}, "decrease strictly"),
    ({"type": "Discrete", "alphas_cumprod": [0.5, -0.1]}, r"values in \[0, 1\]"),
    ({"type": "Discrete", "alphas_cumprod": []}, r"values in \[0, 1\]"),
])
def test_bad_settings_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from_config(config)


@every("cosine discrete")
def test_integer_times_are_refused(schedule: Schedule) -> None:
    """An index passed as a time would be clamped to pure noise without a word."""
    with pytest.raises(ValueError, match=r"index i of T is \(i \+ 1\) / T"):
        schedule.log_snr(torch.tensor([500]))
