"""Ancestral sampling: exact marginals where theory makes it exact, and the tunable noise between its two ends."""

import pytest
import torch
from oracles import Gaussian, PosteriorSample, full

from fewstep.samplers import ancestral
from fewstep.schedules import Cosine, Karras, RectifiedFlow, seeded_noise

SCHEDULES = pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), Karras()], ids=lambda s: type(s).__name__)
COUNT = 40_000


def trajectory(denoiser, steps, **kwargs):
    """[(time, state)] of a run from the marginal at t = 1, the last state being x."""
    seen = []
    seeds = torch.arange(COUNT)
    start = seeded_noise(seeds, (1,), stream=1).double()
    mean, std = denoiser.marginal(start, full(1.0, start))
    ancestral(
        denoiser, None, steps, z=mean + std * start, seeds=seeds, callback=lambda i, t, z: seen.append((t, z)), **kwargs
    )
    return seen


def assert_marginals(denoiser, seen):
    """Mean and deviation within 5 standard errors at each step; the last state is the data's."""
    for t, z in seen:
        mean, std = (m.mean().item() for m in denoiser.marginal(z, full(t, z)))
        mean, std = (denoiser.mean, denoiser.std) if t == 0 else (mean, std)
        assert z.mean().item() == pytest.approx(mean, abs=5 * std / COUNT**0.5 + 1e-9)
        assert z.std().item() == pytest.approx(std, rel=5 / (2 * COUNT) ** 0.5, abs=1e-9)


@SCHEDULES
def test_marginals_are_exact_when_the_denoiser_knows_x(schedule):
    # a point as data: q(z_s | z_t, x) with the true x keeps q(z_s | x), its mean and its variance, at each step
    point = Gaussian(schedule, mean=0.7, std=0.0)
    assert_marginals(point, trajectory(point, 5))


@SCHEDULES
def test_marginals_are_exact_when_x_is_sampled(schedule):
    # moment matching's premise: with x ~ q(x | z_t) sampling is exact in any number of steps
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampled = PosteriorSample(schedule, mean=-0.4, std=0.5)
        assert_marginals(sampled, trajectory(sampled, 3))


def test_upper_noise_is_exact_for_white_data():
    # data N(0, I) and x the posterior mean: reversing the chain takes sigma_{t|s}, that is noise_level = 1 ...
    white = Gaussian(Cosine(), mean=0.0, std=1.0)
    assert_marginals(white, trajectory(white, 5, noise_level=1.0)[:-1])
    # ... and the smaller noise loses variance
    (_, first), *_ = trajectory(white, 5, noise_level=0.0)
    assert first.std() < 0.97


@SCHEDULES
def test_noise_level_interpolates_the_deviation_geometrically(schedule):
    # variance exponents swapped or applied to deviations would miss both ends or the middle
    gaussian, seeds = Gaussian(schedule), torch.arange(3)
    z = torch.linspace(-1, 1, 3, dtype=torch.float64)[:, None]
    t, s = full(0.8, z), full(0.4, z)

    def step(noise_level):
        seen = []
        ancestral(gaussian, None, 2, z=z, times=[0.8, 0.4, 0.0], seeds=seeds, noise_level=noise_level,
                  callback=lambda i, t, z: seen.append(z))
        return seen[0]

    mean, lower = schedule.posterior(z, gaussian(z, t), t, s)
    noise = (step(0.0) - mean) / lower
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    upper = (sigma_t.square() - (alpha_t / alpha_s * sigma_s).square()).sqrt()[:, None]
    assert noise.abs().max() > 0.1
    for v in (0.3, 1.0):
        torch.testing.assert_close(step(v) - mean, lower ** (1 - v) * upper**v * noise)


def test_noise_of_a_sample_is_its_seeds_alone():
    # a batch cut otherwise, or another order, must not change a bit
    class Shrink:
        schedule = Cosine()

        def __call__(self, z, t, cond=None, w=None):
            return 0.5 * z

    seeds = torch.tensor([5, 2**40, 7, 5, 0])
    noise = seeded_noise(seeds, (3, 5))
    whole = ancestral(Shrink(), noise, 4, seeds=seeds)
    parts = torch.cat([ancestral(Shrink(), noise[i:j], 4, seeds=seeds[i:j]) for i, j in ((0, 1), (1, 3), (3, 5))])
    assert torch.equal(whole, parts)
    assert torch.equal(whole[0], whole[3])
    assert not torch.equal(whole[0], ancestral(Shrink(), noise[:1], 4, seeds=seeds[1:2])[0])


def test_noise_is_fresh_in_every_update_and_unlike_the_start():
    # one stream used twice would correlate the steps with each other or with the start
    class Known:
        schedule = Cosine()

        def __call__(self, z, t, cond=None, w=None):
            return torch.zeros_like(z)

    seeds, seen = torch.arange(COUNT), []
    start = seeded_noise(seeds, (1,)).double()
    ancestral(Known(), start, 3, seeds=seeds, callback=lambda i, t, z: seen.append(z))
    t = torch.tensor([1.0, 2 / 3, 1 / 3]).double()
    states, noises = [start, *seen[:2]], [start]
    for i in range(2):
        mean, std = Known.schedule.posterior(states[i], torch.zeros_like(start), t[i : i + 1], t[i + 1 : i + 2])
        noises.append((states[i + 1] - mean) / std)
    correlation = torch.corrcoef(torch.cat(noises, dim=1).T)
    assert (correlation - torch.eye(3)).abs().max() < 5 / COUNT**0.5


def test_without_seeds_the_global_generator_draws():
    # a run without seeds follows torch.manual_seed, as any PyTorch user expects
    gaussian, noise = Gaussian(Cosine()), torch.zeros(4, 3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = ancestral(gaussian, noise, 4)
        second = ancestral(gaussian, noise, 4)
        torch.manual_seed(3)
        again = ancestral(gaussian, noise, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("level", [-0.1, 1.5, float("nan")])
def test_noise_level_outside_its_range(level):
    # C's exponent v interpolates between two variances; beyond them there is no such sampler
    with pytest.raises(ValueError, match="noise_level"):
        ancestral(Gaussian(Cosine()), torch.zeros(1, 1), 2, noise_level=level)
