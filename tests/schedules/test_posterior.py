"""Transitions and posteriors against both printed forms and against conditioning a Gaussian by hand."""

import mpmath
import pytest
import torch
from torch import Tensor

from fewstep.schedules import Cosine, Discrete, Karras, LinearBeta, RectifiedFlow, Schedule

mpmath.mp.dps = 50
SCHEDULES = [
    pytest.param(s, id=type(s).__name__)
    for s in (Cosine(), LinearBeta(), Discrete(torch.linspace(0.999, 0.005, 200)), Karras(), RectifiedFlow())
]
T = [1.0, 1.0, 0.9, 0.5, 0.3, 0.01, 0.7]
S = [0.9, 0.0, 0.899, 0.25, 0.0, 0.005, 0.7]


def pairs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_t, x (7, 2, 2, 2) and times t, s."""
    generator = torch.Generator().manual_seed(0)
    z, x = (torch.randn(7, 2, 2, 2, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return z, x, torch.tensor(T, dtype=dtype), torch.tensor(S, dtype=dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_the_conditional_of_the_joint_gaussian(schedule: Schedule) -> None:
    """(z_s, z_t) given x is a 2-D Gaussian; conditioning its 2 x 2 covariance uses none of the printed formulas."""
    z, x, t, s = pairs()
    mean, std = schedule.posterior(z, x, t, s)
    for i in range(len(t)):
        (alpha_t, alpha_s), (sigma_t, sigma_s) = (
            [mpmath.mpf(v.item()) for v in pair]
            for pair in zip(*(schedule.alpha_sigma(u[i]) for u in (t, s)), strict=True)
        )
        covariance = alpha_t / alpha_s * sigma_s**2
        variance = sigma_s**2 - covariance**2 / sigma_t**2
        assert abs(std[i].item() ** 2 - variance) < 1e-12 * (1 + variance)
        expected = float(alpha_s) * x[i] + float(covariance / sigma_t**2) * (z[i] - float(alpha_t) * x[i])
        torch.testing.assert_close(mean[i], expected.to(mean), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_equals_both_printed_forms(schedule: Schedule) -> None:
    """arXiv 2202.00512 eq. 3 (through log-SNR) and arXiv 2406.04103 eq. 2 (through precisions) are one Gaussian."""
    z, x, t, s = (v[:-1] for v in pairs())                        # t = s has no precision form
    mean, std = schedule.posterior(z, x, t, s)
    shape = (-1, 1, 1, 1)
    (at, st), (a, b) = ([v.reshape(shape) for v in schedule.alpha_sigma(u)] for u in (t, s))
    r = torch.exp(schedule.log_snr(t) - schedule.log_snr(s)).reshape(shape)
    torch.testing.assert_close(mean, r * a / at * z + (1 - r) * a * x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(std**2, (1 - r) * b**2, rtol=1e-10, atol=0)
    step, noise = at / a, (1 - r) * st**2
    variance = 1 / (1 / b**2 + step**2 / noise)
    torch.testing.assert_close(std**2, variance, rtol=1e-7, atol=0)
    torch.testing.assert_close(mean, variance * (step / noise * z + a / b**2 * x), rtol=1e-7, atol=1e-9)


def test_posterior_in_the_exploding_form() -> None:
    """EDM's own form, mu = (1 - s^2 / t^2) x + (s^2 / t^2) z, var = s^2 (t^2 - s^2) / t^2."""
    z, x, t, s = pairs()
    schedule = Karras()
    mean, std = schedule.posterior(z, x, t, s)
    high, low = (schedule.alpha_sigma(u)[1].reshape(-1, 1, 1, 1) for u in (t, s))
    torch.testing.assert_close(mean, (1 - low**2 / high**2) * x + low**2 / high**2 * z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std**2, low**2 * (high**2 - low**2) / high**2, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float32_posterior_keeps_its_digits(schedule: Schedule) -> None:
    """Short steps and both ends in float32: 1 - e^x in place of expm1 loses half the digits of the noise there."""
    z, x, t, s = pairs(torch.float32)
    mean, std = schedule.posterior(z, x, t, s)
    exact_mean, exact_std = schedule.posterior(z.double(), x.double(), t.double(), s.double())
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(std.double(), exact_std, rtol=3e-4, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_step_changes_nothing(schedule: Schedule) -> None:
    z, x, t, _ = pairs(torch.float32)
    mean, std = schedule.posterior(z, x, t, t)
    torch.testing.assert_close(mean, z)
    assert (std == 0).all()
    alpha, sigma = schedule.transition(t, t)
    assert (alpha == 1).all()
    assert (sigma == 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_transitions_keep_the_marginals_and_compose(schedule: Schedule) -> None:
    """Re-noising from s to t must leave exactly alpha_t x + sigma_t eps, in one jump or in two."""
    s, m, t = (torch.tensor(v, dtype=torch.float64) for v in ([0.0, 0.1, 0.5], [0.2, 0.4, 0.51], [1.0, 0.9, 0.52]))
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.alpha_sigma(s), schedule.alpha_sigma(t)
    alpha, sigma = schedule.transition(t, s)
    torch.testing.assert_close(alpha * alpha_s, alpha_t, rtol=1e-13, atol=0)
    torch.testing.assert_close((alpha * sigma_s) ** 2 + sigma**2, sigma_t**2, rtol=1e-12, atol=0)
    (first, first_noise), (second, second_noise) = schedule.transition(m, s), schedule.transition(t, m)
    torch.testing.assert_close(first * second, alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close((second * first_noise) ** 2 + second_noise**2, sigma**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float64_times_keep_the_noise_of_the_shortest_steps(schedule: Schedule) -> None:
    """What `transition` advises for steps that float32 cannot resolve must hold, and leave float32 images float32."""
    t = torch.tensor([1.0, 0.5], dtype=torch.float64)
    s = t - 1e-7
    # The curve is straight over so short a step: lambda_t - lambda_s = (dlambda / dt) (t - s), nothing cancels.
    slope = torch.autograd.functional.jvp(schedule.log_snr, t - 0.5e-7, torch.ones_like(t))[1]
    fresh = torch.sqrt(-torch.expm1(slope * (t - s)))
    (_, sigma_t), (_, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    torch.testing.assert_close(schedule.transition(t, s)[1], sigma_t * fresh, rtol=1e-5, atol=0)
    mean, std = schedule.posterior(torch.ones(2, 3), torch.zeros(2, 3), t, s)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(std.squeeze(1), (sigma_s * fresh).float(), rtol=1e-5, atol=0)
