"""Editing and inpainting: where they start, what they keep, what a model trained for masks is given."""

import pytest
import torch
from oracles import Gaussian, Guided, Mixture, Unconverted, full

from fewstep.samplers import ancestral, ddim, dpmpp_2m, edit, heun, inpaint, stochastic
from fewstep.schedules import Cosine, RectifiedFlow, seeded_noise

SEEDS = torch.arange(4)
X = seeded_noise(SEEDS, (2, 3, 3), stream=3).double()
NOISE = seeded_noise(SEEDS, (2, 3, 3), stream=4).double()
MASK = torch.zeros(4, 1, 3, 3)
MASK[0, 0, 1], MASK[1:, 0, :, 2] = 1, 1


class Recorder:
    """Notes each call; `extra` are its own attributes."""

    def __init__(self, denoiser, **extra):
        self.denoiser, self.schedule, self.calls = denoiser, denoiser.schedule, []
        self.__dict__.update(extra)

    def __call__(self, z, t, cond=None, w=None):
        self.calls.append((z, t, cond, w))
        return self.denoiser(z, t, cond, w)


@pytest.mark.parametrize(("strength", "left"), [(1.0, 4), (0.99, 3), (0.5, 2), (0.25, 1), (0.3, 1)])
@pytest.mark.parametrize("sampler", [ddim, stochastic], ids=lambda f: f.__name__)
def test_an_edit_starts_on_the_students_grid(strength, left, sampler):
    # a student of 4 steps knows 1/4, ..., 1 alone: noised to any other time, or run on another grid, it guesses
    recorder = Recorder(Gaussian(Cosine()))
    edit(recorder, X, NOISE, 4, strength, sampler=sampler, seeds=SEEDS)
    assert [t[0].item() for _, t, *_ in recorder.calls] == [(left - i) / 4 for i in range(left)]
    torch.testing.assert_close(recorder.calls[0][0], Cosine().add_noise(X, full(left / 4, X), NOISE))


def test_strengths_that_are_whole_steps_but_for_rounding():
    # 0.29 x 100 is 28.999999999999996 in floating point: a step less than asked
    for steps, strength, left in ((100, 0.29, 29), (10, 0.3, 3), (3, 1 / 3, 1)):
        recorder = Recorder(Gaussian(Cosine()))
        edit(recorder, X, NOISE, steps, strength)
        assert len(recorder.calls) == left


def test_an_edit_is_the_rest_of_a_run():
    # from the noised image on, an edit is the sampler itself: cond, w and options included
    mixture = Mixture.random(Cosine(), shape=(2, 3, 3))
    y, w, seen = torch.tensor([0, 1, 2, 0]), torch.tensor([0.0, 1.0, 2.0, 0.5]).double(), []
    made = edit(Guided(mixture), X, NOISE, 4, 0.5, y, w, clip=(-1, 1), callback=lambda i, t, z: seen.append(t))
    z = Cosine().add_noise(X, full(0.5, X), NOISE)
    expected = ddim(Guided(mixture), None, 2, y, w, z=z, times=[0.5, 0.25, 0.0], clip=(-1, 1))
    assert torch.equal(made, expected)
    assert seen == [0.25, 0.0]


EVERY = [ddim, stochastic, ancestral, heun, dpmpp_2m]


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("sampler", EVERY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_pixels_come_back_bit_for_bit(sampler, strength, dtype):
    # "unchanged to 1e-6" shows as a seam after the next edit; and what is masked must change
    mixture = Mixture.random(Cosine(), shape=(2, 3, 3))
    chosen = MASK.bool().expand_as(X)
    x = X.to(dtype)
    made = inpaint(mixture, x, NOISE.to(dtype), 4, strength, mask=MASK, sampler=sampler, seeds=SEEDS)
    assert made.dtype == dtype
    assert torch.equal(made[~chosen], x[~chosen])
    assert (made[chosen] - x[chosen]).abs().min() > 1e-4


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m], ids=lambda f: f.__name__)
def test_every_call_sees_the_noised_image_where_it_is_known(schedule, sampler):
    # replacement done after the step, or with other noise, leaves a state that no image of the data has
    recorder = Recorder(Gaussian(schedule))
    inpaint(recorder, X, NOISE, 5, mask=MASK, sampler=sampler)
    known = ~MASK.bool().expand_as(X)
    for z, t, *_ in recorder.calls:
        torch.testing.assert_close(z[known], schedule.add_noise(X, t, NOISE)[known], rtol=0, atol=1e-9)


def test_noise_is_right_for_known_pixels_of_the_stochastic_sampler():
    # its states there must be q(z_s | x): mean alpha x and deviation sigma, step by step
    count, recorder = 20_000, Recorder(Gaussian(Cosine()))
    x, seeds = torch.full((count, 1, 1, 1), 0.8, dtype=torch.float64), torch.arange(count)
    noise = seeded_noise(seeds, (1, 1, 1)).double()
    inpaint(recorder, x, noise, 4, mask=torch.zeros(1, 1, 1, 1), sampler=stochastic, seeds=seeds)
    assert len(recorder.calls) == 4
    for z, t, *_ in recorder.calls:
        alpha, sigma = (a[0].item() for a in Cosine().alpha_sigma(t))
        assert z.mean().item() == pytest.approx(0.8 * alpha, abs=5 * sigma / count**0.5)
        assert z.std().item() == pytest.approx(sigma, rel=5 / (2 * count) ** 0.5)


def test_what_is_known_decides_what_is_painted():
    # two modes, 1.5 apart in every pixel: painting must join the mode that the kept pixels show (replacement is not
    # exact, so not in every sample); from noise alone it is a coin's toss
    means = torch.tensor([0.75, -0.75]).double()[None, :, None, None, None].expand(1, 2, 1, 2, 2)
    mixture, seeds = Mixture(Cosine(), means, std=0.05), torch.arange(200)
    x = means[0, seeds % 2]
    noise = seeded_noise(seeds, (1, 2, 2)).double()
    mask = torch.tensor([[0, 0], [0, 1]])[None, None]

    def joined(images):
        return ((images - x)[..., 1, 1].abs() < 0.4).double().mean().item()

    assert joined(inpaint(mixture, x, noise, 16, mask=mask)) > 0.9
    assert joined(ddim(mixture, noise, 16)) < 0.7


@pytest.mark.parametrize("cond", [None, torch.arange(4), {"y": torch.arange(4), "text": torch.ones(4, 2)}])
def test_a_model_trained_with_masks_is_given_them(cond):
    # under the keys of the contract, the image without what is to be painted; and it is not also told x
    recorder = Recorder(Gaussian(Cosine()), takes_mask=True)
    made = inpaint(recorder, X, NOISE, 2, cond=cond, mask=MASK)
    for *_, given, _ in recorder.calls:
        assert torch.equal(given["mask"], MASK.double())
        assert torch.equal(given["masked_image"], X * (1 - MASK.double()))
        kept = {key: value for key, value in given.items() if key not in ("mask", "masked_image")}
        assert kept.keys() == ({"y", "text"} if isinstance(cond, dict) else set() if cond is None else {"y"})
        assert all(torch.equal(value, cond[key] if isinstance(cond, dict) else cond) for key, value in kept.items())
    chosen = MASK.bool().expand_as(X)
    assert torch.equal(made[~chosen], X[~chosen])
    assert torch.equal(made[chosen], edit(recorder.denoiser, X, NOISE, 2, 1.0)[chosen])


def test_what_a_model_sees_of_the_image_can_be_said():
    # of latents it is the encoding of the masked picture: the latents themselves know what the mask hides
    recorder = Recorder(Gaussian(Cosine()), takes_mask=True)
    seen = torch.linspace(-1, 1, X.numel(), dtype=X.dtype).reshape(X.shape)
    made = inpaint(recorder, X, NOISE, 2, mask=MASK, masked_image=seen)
    assert all(torch.equal(given["masked_image"], seen) for *_, given, _ in recorder.calls)
    kept = ~MASK.bool().expand_as(X)
    assert torch.equal(made[kept], X[kept])
    with pytest.raises(ValueError, match=r"masked_image has shape .*: must be that of x"):
        inpaint(recorder, X, NOISE, 2, mask=MASK, masked_image=seen[:1])


def test_raw_outputs_and_guidance_reach_inpainting():
    # the way through raw must give the same painting as the way through x
    mixture = Mixture.random(Cosine(log_snr_min=-10.0), shape=(2, 3, 3))
    y, w = torch.tensor([0, 1, 2, 0]), 1.5

    class Network(Unconverted):
        def __call__(self, z, t, cond=None, w=None):
            return Guided(mixture)(z, t, cond, w)

    plain = inpaint(Guided(mixture), X, NOISE, 4, 1.0, y, w, mask=MASK)
    torch.testing.assert_close(inpaint(Network(mixture, "v"), X, NOISE, 4, 1.0, y, w, mask=MASK), plain)
