"""Deterministic samplers against the exact solution of the Gaussian's ODE: their order, accuracy and range."""

import math

import pytest
import torch
from oracles import Gaussian, full

from fewstep.samplers import ddim, ddim_step, dpmpp_2m, heun
from fewstep.schedules import Cosine, Discrete, Karras, LinearBeta, RectifiedFlow

SCHEDULES = [Cosine(), Cosine(shift=-2.0), LinearBeta(), RectifiedFlow(), Karras()]
NOISE = torch.linspace(-2.5, 2.5, 12, dtype=torch.float64).reshape(4, 3)
named = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


def exact(gaussian, noise):
    """Where the ODE ends: the same quantile of the data."""
    start = noise * gaussian.schedule.init_noise_scale
    mean, std = gaussian.marginal(start, full(1.0, start))
    return gaussian.mean + gaussian.std * (start - mean) / std


def error(sampler, gaussian, steps, noise=NOISE):
    return (sampler(gaussian, noise, steps) - exact(gaussian, noise)).abs().max().item()


def state_error(sampler, gaussian, steps):
    """Error of the last state before x, on a grid that is even in log-SNR: no end effects, no log factors."""
    times = gaussian.schedule.time(torch.linspace(-5, 5, steps + 1, dtype=torch.float64))
    seen = []
    sampler(gaussian, None, steps, z=NOISE, times=times, callback=lambda i, t, z: seen.append(z))
    truth = gaussian.flow(NOISE, times[0].expand(len(NOISE)), times[-2].expand(len(NOISE)))
    return (seen[-2] - truth).abs().max().item()


@named
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence(schedule, sampler, order):
    # a wrong coefficient or a swapped t and s stalls; a correction that is of first order shows as a lower slope
    gaussian = Gaussian(schedule)
    slope = math.log(state_error(sampler, gaussian, 64) / state_error(sampler, gaussian, 256), 4)
    assert slope == pytest.approx(order, abs=0.15)


@named
@pytest.mark.parametrize(("sampler", "bound"), [(ddim, 2e-2), (heun, 3e-3), (dpmpp_2m, 3e-3)])
def test_many_default_steps_reach_the_data(schedule, sampler, bound):
    # the whole way from noise to x on the default grid, both ends included
    assert error(sampler, Gaussian(schedule), 256) < bound


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("sampler", [heun, dpmpp_2m])
def test_second_order_pays_at_few_calls(schedule, sampler):
    # at t = 1 sigma / alpha is 2e4: Heun's trapezoid in that variable is wrong by 45 here, and second order in theory
    gaussian = Gaussian(schedule)
    steps = 8 if sampler is heun else 15
    assert error(sampler, gaussian, steps) < 0.5 * error(ddim, gaussian, 15)


@named
@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m])
def test_float32_stays_with_float64(schedule, sampler):
    # cancellation at either end (alpha or sigma near 5e-5) would show here
    gaussian = Gaussian(schedule)
    for steps in (2, 16, 128):
        wide = sampler(gaussian, NOISE, steps)
        assert sampler(gaussian, NOISE.float(), steps).dtype == torch.float32
        torch.testing.assert_close(sampler(gaussian, NOISE.float(), steps).double(), wide, rtol=0, atol=1e-4)


@pytest.mark.parametrize("schedule", [*SCHEDULES, Discrete(torch.linspace(0.999, 0.01, 50))], ids=repr)
def test_ddim_step_moves_along_known_x(schedule):
    # with the true x a step keeps eps: from any t to any s, forwards and reversed
    x, eps = NOISE, NOISE.flip(0).cos()
    t, s = torch.tensor([1.0, 0.7, 0.3, 0.0]).double(), torch.tensor([0.9, 0.0, 0.8, 0.5]).double()
    z = ddim_step(x, schedule.add_noise(x, t, eps), t, s, schedule)
    torch.testing.assert_close(z, schedule.add_noise(x, s, eps), rtol=1e-9, atol=1e-9)


def test_ddim_step_is_differentiable():
    # distillation by unrolled steps needs the gradient of one: dz_s / dx = alpha_s - sigma_s alpha_t / sigma_t
    schedule, t, s = Cosine(), torch.tensor([0.6]).double(), torch.tensor([0.2]).double()
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ddim_step(x, torch.ones_like(x), t, s, schedule).sum(), x)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    torch.testing.assert_close(gradient[0], alpha_s - sigma_s * alpha_t / sigma_t)
