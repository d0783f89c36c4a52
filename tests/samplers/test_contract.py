"""What all samplers promise: calls, start, last step, clipping, callback, raw outputs, guidance weights."""

import pytest
import torch
from oracles import Gaussian, Guided, Mixture, Unconverted, full

from fewstep.samplers import ancestral, ddim, dpmpp_2m, heun, stochastic
from fewstep.schedules import Cosine, Karras, Raw, RectifiedFlow

SAMPLERS = [ddim, stochastic, ancestral, heun, dpmpp_2m]
every = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda f: f.__name__)
NOISE = torch.linspace(-2, 2, 10, dtype=torch.float64).reshape(5, 2)
SEEDS = torch.arange(5)
Y = torch.tensor([0, 1, 2, 3, 1])


class Recorder:
    """Notes each call of a denoiser."""

    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.calls = denoiser, denoiser.schedule, []

    def __call__(self, z, t, cond=None, w=None):
        x = self.denoiser(z, t, cond, w)
        self.calls.append((z, t, cond, w, x))
        return x


@every
def test_number_of_calls_and_the_returned_x(sampler):
    # cost is counted in calls; the last step must return the estimate, not a state with sigma_0 of noise
    for steps in (1, 2, 5):
        recorder = Recorder(Gaussian(Cosine()))
        x = sampler(recorder, NOISE, steps, seeds=SEEDS)
        assert len(recorder.calls) == (2 * steps - 1 if sampler is heun else steps)
        assert torch.equal(x, recorder.calls[-1][-1])


@every
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), Karras(sigma_max=50.0)], ids=lambda s: s.kind)
def test_start(sampler, schedule):
    # sigma_max once and only for VE; `z` is taken as it is
    recorder = Recorder(Gaussian(schedule))
    sampler(recorder, NOISE, 2, seeds=SEEDS)
    z, t = recorder.calls[0][:2]
    assert torch.equal(z, NOISE * (50.0 if schedule.kind == "ve" else 1.0))
    assert t.tolist() == [1.0] * 5
    sampler(recorder, NOISE, 2, z=3 * NOISE, times=[0.5, 0.25, 0.0])
    assert any(torch.equal(z, 3 * NOISE) and t.tolist() == [0.5] * 5 for z, t, *_ in recorder.calls)


@every
def test_default_times_are_the_grid_that_students_are_trained_on(sampler):
    # i / N bit for bit in either dtype: 1 - i / N differs in the last place
    for steps, noise in ((3, NOISE), (7, NOISE.float()), (49, NOISE), (49, NOISE.float())):
        recorder = Recorder(Gaussian(Cosine()))
        sampler(recorder, noise, steps, seeds=SEEDS)
        seen = {t[0].item() for _, t, *_ in recorder.calls}
        assert seen == set((torch.arange(1, steps + 1).to(noise.dtype) / steps).tolist())


@every
def test_callback_reports_each_update(sampler):
    # step, time reached and state there, x last
    seen = []
    x = sampler(Gaussian(Cosine()), NOISE, 3, times=[1.0, 0.6, 0.3, 0.0], seeds=SEEDS,
                callback=lambda *a: seen.append(a))
    assert [(i, t) for i, t, _ in seen] == [(0, 0.6), (1, 0.3), (2, 0.0)]
    assert torch.equal(seen[-1][2], x)


@pytest.mark.parametrize("sampler", [ddim, heun, ancestral], ids=lambda f: f.__name__)
def test_resuming_from_a_state_continues_the_run(sampler):
    # editing starts mid-way: z and times must mean what the run itself meant by them
    seen, times = [], [1.0, 0.8, 0.5, 0.2, 0.0]
    start = NOISE
    whole = sampler(Gaussian(Cosine()), start, 4, times=times, seeds=None if sampler is not ancestral else SEEDS,
                    callback=lambda i, t, z: seen.append(z))
    if sampler is ancestral:  # its noise is numbered by update: only the state is comparable
        assert not torch.equal(seen[1], sampler(Gaussian(Cosine()), None, 2, z=seen[1], times=times[2:], seeds=SEEDS))
    else:
        assert torch.equal(whole, sampler(Gaussian(Cosine()), None, 2, z=seen[1], times=times[2:]))


@every
def test_clip_bounds_x_before_the_step(sampler):
    # eps must be computed again from the clipped x, else the state leaves the path between x and noise
    seen, clip = [], (-0.2, 0.1)
    gaussian = Gaussian(Cosine(), std=2.0)
    x = sampler(gaussian, NOISE, 4, clip=clip, seeds=SEEDS, callback=lambda i, t, z: seen.append(z))
    assert x.min() == -0.2
    assert x.max() == 0.1
    if sampler is ddim:
        t, s = full(1.0, NOISE), full(0.75, NOISE)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (tuple(a[:, None] for a in Cosine().alpha_sigma(u)) for u in (t, s))
        clipped = gaussian(NOISE, t).clamp(*clip)
        expected = alpha_s * clipped + sigma_s * (NOISE - alpha_t * clipped) / sigma_t
        torch.testing.assert_close(seen[0], expected)


@every
@pytest.mark.parametrize("prediction", ["x", "eps", "v", "flow"])
@pytest.mark.parametrize("schedule", [Cosine(log_snr_min=-10.0), RectifiedFlow(), Karras()], ids=lambda s: s.kind)
def test_raw_outputs_give_the_same_images(sampler, prediction, schedule):
    # two ways to the same update: through guided_update on raw outputs, or from x
    mixture = Mixture.random(schedule)
    arguments = {"seeds": SEEDS, "clip": (-1.0, 1.0)} | ({"noise_level": 0.4} if sampler is ancestral else {})
    raw = Unconverted(mixture, prediction)
    plain = sampler(mixture, NOISE, 5, Y, **arguments)
    torch.testing.assert_close(sampler(raw, NOISE, 5, Y, **arguments), plain, rtol=0, atol=1e-7)
    for w in (1.5, torch.linspace(0, 3, 5, dtype=torch.float64)):
        guided = sampler(Guided(mixture), NOISE, 5, Y, w, **arguments)
        torch.testing.assert_close(sampler(raw, NOISE, 5, Y, w, **arguments), guided, rtol=0, atol=1e-7)
        assert (guided - plain).abs().max() > 0.05


@every
def test_cond_and_w_reach_every_call_untouched(sampler):
    # a sampler that drops w or cond on one of its calls gives blurred students: silent, so tested
    recorder = Recorder(Guided(Mixture.random(Cosine())))
    cond, w = {"y": Y}, torch.linspace(0, 2, 5)
    sampler(recorder, NOISE, 3, cond, w, seeds=SEEDS)
    assert all(call[2] is cond and call[3] is w for call in recorder.calls)


@every
def test_no_graph_is_kept(sampler):
    # 512 steps with a graph would exhaust memory
    z = NOISE.clone().requires_grad_()
    assert not sampler(Gaussian(Cosine()), z, 2).requires_grad


@every
def test_schedule_is_evaluated_once_per_run(sampler):
    # five evaluations of a schedule per update cost as much as the update itself; images must not change either
    calls = []

    class Counting(Cosine):
        def log_snr(self, t):
            calls.append(t.shape)
            return super().log_snr(t)

    class Network:
        schedule = Counting()

        def raw(self, z, t, cond=None, w=None):
            return Raw(torch.tanh(z), None, "v")

    def evaluations(steps):
        calls.clear()
        sampler(Network(), NOISE, steps, seeds=SEEDS)
        return len(calls)

    assert evaluations(9) == evaluations(3)
