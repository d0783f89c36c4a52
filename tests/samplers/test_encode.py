"""Reverse DDIM and transfer against the exact ODE of a Gaussian, and their numerics at t = 0."""

from dataclasses import dataclass

import pytest
import torch
from oracles import Gaussian, Narrow, Unconverted, full

from fewstep.samplers import ddim, encode, transfer
from fewstep.schedules import Cosine, Karras, RectifiedFlow, expand

SCHEDULES = pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), Karras()], ids=lambda s: type(s).__name__)
X = torch.linspace(-1, 1.5, 12, dtype=torch.float64).reshape(4, 3)


@SCHEDULES
def test_encoding_converges_to_the_exact_latent(schedule):
    # first order, towards the same quantile of the marginal at t = 1: steps of the wrong sign or length never get there
    gaussian = Gaussian(schedule)
    truth = gaussian.flow(X, full(0.0, X), full(1.0, X))
    errors = [(encode(gaussian, X, steps) - truth).abs().max().item() / schedule.init_noise_scale
              for steps in (64, 256)]
    assert errors[1] < 0.03
    assert 3 < errors[0] / errors[1] < 6


@SCHEDULES
def test_times_given_and_the_round_trip(schedule):
    # the state at times[-1] is what a sampler goes on from; there and back with many steps is the identity
    gaussian, times = Gaussian(schedule), torch.linspace(0, 0.6, 257).double()
    state = encode(gaussian, X, 256, times=times)
    std = gaussian.marginal(X, full(0.6, X))[1]
    torch.testing.assert_close(state / std, gaussian.flow(X, full(0.0, X), full(0.6, X)) / std, rtol=0, atol=0.02)
    back = ddim(gaussian, None, 256, z=state, times=times.flip(0))
    torch.testing.assert_close(back, X, rtol=0, atol=0.02)


@pytest.mark.parametrize("prediction", ["v", "eps", "flow"])
def test_float32_images_keep_their_latent(prediction):
    # at t = 0 a step divides by sigma = 4.5e-5: in float32 the rounding of x alone would shift the latent by 3e-3
    exact = Unconverted(Gaussian(Cosine()), prediction)
    for steps in (1, 8):
        wide = encode(exact, X, steps)
        narrow = encode(Narrow(exact), X.float(), steps)
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=2e-6)


@dataclass
class Classes:
    """Class y is N(y, 0.5^2); w makes it N((1 + w) y, 0.5^2). Notes what it was called with."""

    schedule: Cosine

    def __post_init__(self):
        self.calls = []

    def __call__(self, z, t, cond=None, w=None):
        self.calls.append((t[0].item(), cond, w))
        alpha, sigma = (expand(a, z) for a in self.schedule.alpha_sigma(t))
        mean = (1 + w) * cond[:, None].to(z.dtype)
        return mean + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (z - alpha * mean)


def test_transfer_shifts_an_image_from_one_class_to_the_other():
    # DDIB between two Gaussians of one width is a shift by the difference of their (guided) means
    encoder, decoder = Classes(Cosine()), Classes(Cosine())
    source, target = torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 2, 1])
    made = transfer(encoder, decoder, X, 512, source, target, 0.5)
    torch.testing.assert_close(made, X + 1.5 * (target - source)[:, None], rtol=0, atol=0.02)
    assert [t for t, *_ in encoder.calls] == [i / 512 for i in range(512)]
    assert [t for t, *_ in decoder.calls] == [i / 512 for i in range(512, 0, -1)]
    assert all(cond is source and w == 0.5 for _, cond, w in encoder.calls)
    assert all(cond is target and w == 0.5 for _, cond, w in decoder.calls)
