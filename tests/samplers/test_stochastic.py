"""The stochastic sampler: marginals of a closed-form Gaussian at every step, and an independent loop."""

import math

import pytest
import torch
from oracles import Gaussian, Mixture, full

from fewstep.samplers import ddim, stochastic
from fewstep.schedules import Cosine, Karras, RectifiedFlow, seeded_noise

SCHEDULES = pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), Karras()], ids=lambda s: type(s).__name__)
COUNT = 40_000
Y = torch.tensor([0, 1, 2, 3, 1])


class PerfectStudent(Gaussian):
    """Its estimate is the x with which one DDIM step of 2 / N (or to 0) lands on the exact ODE."""

    steps = 4

    def __call__(self, z, t, cond=None, w=None):
        k = (t - 2 / self.steps).clamp(min=0)
        (alpha_t, sigma_t), (alpha_k, sigma_k) = self._alpha_sigma(z, t), self._alpha_sigma(z, k)
        return (self.flow(z, t, k) - sigma_k / sigma_t * z) / (alpha_k - sigma_k / sigma_t * alpha_t)


@SCHEDULES
def test_marginals_are_kept_at_every_step(schedule):
    # each jump is exact, so what is left is the noise: sigma_{k|s} in place of sigma_{s|k}, alphas swapped, or a jump
    # to the wrong time changes the mean or the variance of some state
    student = PerfectStudent(schedule, mean=0.7, std=0.5)
    seeds, seen = torch.arange(COUNT), []
    start = seeded_noise(seeds, (1,), stream=1).double()
    mean, std = student.marginal(start, full(1.0, start))
    x = stochastic(
        student, None, 4, z=mean + std * start, seeds=seeds, callback=lambda i, t, z: seen.append((t, z))
    )
    assert [t for t, _ in seen] == [0.75, 0.5, 0.25, 0.0]
    for t, z in seen:
        mean, std = (m.mean().item() for m in student.marginal(z, full(t, z)))
        assert z.mean().item() == pytest.approx(mean, abs=5 * std / COUNT**0.5)
        assert z.std().item() == pytest.approx(std, rel=5 / (2 * COUNT) ** 0.5)
    assert abs(torch.corrcoef(torch.cat([start, x], dim=1).T)[0, 1]) < 0.9  # and noise did enter


def loop(denoiser, z, steps, cond, seeds):
    """arXiv 2210.03142, section 3.3, as papers state it, in scalars; noise as the sampler numbers it."""
    for i in range(steps, 0, -1):
        t, s, k = i / steps, (i - 1) / steps, (i - 2) / steps
        x = denoiser(z, full(t, z), cond)
        if i == 1:
            return x
        (alpha_t, sigma_t), (alpha_s, sigma_s), (alpha_k, sigma_k) = (
            tuple(float(a) for a in denoiser.schedule.alpha_sigma(torch.tensor(u, dtype=torch.float64)))
            for u in (t, s, k)
        )
        z_k = alpha_k * x + sigma_k * (z - alpha_t * x) / sigma_t
        kept = alpha_s / alpha_k
        added = math.sqrt(sigma_s**2 - (kept * sigma_k) ** 2)  # what the variance of z_s given x lacks
        z = kept * z_k + added * seeded_noise(seeds, z.shape[1:], stream=(1 << 16) + steps - i).to(z.dtype)
    raise AssertionError


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_against_an_independent_loop(schedule, steps):
    mixture, seeds = Mixture.random(schedule), torch.tensor([3, 1, 4, 5, 1])
    noise = seeded_noise(seeds, (2,), stream=2).double()
    x = stochastic(mixture, noise, steps, Y, seeds=seeds)
    torch.testing.assert_close(
        x, loop(mixture, noise * schedule.init_noise_scale, steps, Y, seeds), rtol=0, atol=1e-7
    )
    assert torch.equal(x[1], x[4])  # one seed, one class, one image


def test_one_step_is_the_deterministic_sampler_and_two_steps_go_through_data():
    mixture, noise = Mixture.random(Cosine()), torch.linspace(-2, 2, 10, dtype=torch.float64).reshape(5, 2)
    assert torch.equal(stochastic(mixture, noise, 1, Y), ddim(mixture, noise, 1, Y))
    seen = []
    stochastic(mixture, noise, 2, Y, seeds=torch.arange(5), callback=lambda i, t, z: seen.append(z))
    x = mixture(noise, full(1.0, noise), Y)
    fresh = seeded_noise(torch.arange(5), (2,), stream=1 << 16)
    torch.testing.assert_close(seen[0], Cosine().add_noise(x, full(0.5, x), fresh), rtol=0, atol=1e-3)  # sigma_0


def test_many_steps_reach_the_data_of_an_undistilled_denoiser():
    # the guided teacher's own stochastic baseline: jumps shrink, so its ODE is followed ever closer
    gaussian, seeds = Gaussian(Cosine(), mean=0.3, std=0.6), torch.arange(4000)
    x = stochastic(gaussian, seeded_noise(seeds, (1,)).double(), 256, seeds=seeds)
    assert x.mean().item() == pytest.approx(0.3, abs=0.05)
    assert x.std().item() == pytest.approx(0.6, abs=0.05)
