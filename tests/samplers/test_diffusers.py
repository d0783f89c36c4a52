"""Samplers against diffusers' schedulers, an implementation that shares no code with this one."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from oracles import Mixture, full

from fewstep.samplers import ddim, dpmpp_2m, heun
from fewstep.schedules import Discrete, Karras, RectifiedFlow

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers under numpy 2

STABLE_DIFFUSION = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000
}
TRAILING = dict(prediction_type="sample", timestep_spacing="trailing", **STABLE_DIFFUSION)
NOISE = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))


def discrete(scheduler):
    return Mixture.random(Discrete(scheduler.alphas_cumprod), dtype=torch.float32)


def index_time(index):
    return (index + 1) / 1000


def diffusers_sample(scheduler, denoiser, noise):
    z = noise
    for index in scheduler.timesteps:
        x = denoiser(z, full(float(index_time(index)), z))
        z = scheduler.step(x, index, z, return_dict=False)[0]
    return z


@pytest.mark.parametrize("steps", [1, 4, 20, 100])
def test_ddim_on_a_uniform_grid_is_diffusers_trailing(steps):
    # an offset of one in (i + 1) / T, or a last step that is not alpha = 1, moves images by more than this
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **TRAILING)
    scheduler.set_timesteps(steps)
    denoiser = discrete(scheduler)
    expected = diffusers_sample(scheduler, denoiser, NOISE)
    torch.testing.assert_close(ddim(denoiser, NOISE, steps), expected, rtol=0, atol=1e-4)


class NextTimestep(DDIMScheduler):
    """diffusers' DDIM step, from each timestep to the next one of its own grid.

    Its step() goes to t - T // steps, which is the next timestep only if steps divides T.
    """

    def step(self, output, timestep, sample, **kwargs):
        later = self.timesteps.tolist()
        i = later.index(int(timestep))
        gap = int(timestep) - later[i + 1] if i + 1 < len(later) else int(timestep) + 1
        self.register_to_config(num_train_timesteps=gap * self.num_inference_steps)
        return super().step(output, timestep, sample, **kwargs)


@pytest.mark.parametrize("steps", [3, 7, 30])
def test_ddim_is_diffusers_where_steps_do_not_divide_the_indices(steps):
    # diffusers rounds its trailing grid to indices; on those times both must agree, the last step included
    scheduler = NextTimestep(clip_sample=False, set_alpha_to_one=True, **TRAILING)
    scheduler.set_timesteps(steps)
    denoiser = discrete(scheduler)
    times = [*index_time(scheduler.timesteps.double()).tolist(), 0.0]
    images = ddim(denoiser, NOISE, steps, times=times)
    torch.testing.assert_close(images, diffusers_sample(scheduler, denoiser, NOISE), rtol=0, atol=1e-4)
    first_order = DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero", **TRAILING)
    first_order.set_timesteps(steps)
    torch.testing.assert_close(images, diffusers_sample(first_order, denoiser, NOISE), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_dpmpp_2m_is_diffusers_multistep(steps):
    # the extrapolation's ratio of log-SNR steps, the order of the first and of the last step
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero", **TRAILING
    )
    scheduler.set_timesteps(steps)
    denoiser = discrete(scheduler)
    times = [*index_time(scheduler.timesteps.double()).tolist(), 0.0]
    expected = diffusers_sample(scheduler, denoiser, NOISE)
    torch.testing.assert_close(dpmpp_2m(denoiser, NOISE, steps, times=times), expected, rtol=0, atol=1e-4)


def test_heun_on_ve_is_edms():
    # dz / dsigma on EDM's own variable: diffusers' Heun keeps z = x + sigma eps whatever it was trained on
    scheduler = HeunDiscreteScheduler(timestep_spacing="trailing", **STABLE_DIFFUSION)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()
    levels = torch.cat([sigmas[:1], sigmas[1:-1:2]])
    schedule = Karras(sigma_min=1e-3, sigma_max=float(levels[0]))
    denoiser = Mixture.random(schedule)
    times = [*schedule.time(-2 * levels.log()).tolist(), 0.0]

    z = NOISE.double() * levels[0]
    for index, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        t = schedule.time(-2 * sigma.log()).expand(len(z))
        z = scheduler.step((z - denoiser(z, t)) / sigma, index, z, return_dict=False)[0]
    torch.testing.assert_close(heun(denoiser, NOISE.double(), 10, times=times), z, rtol=0, atol=1e-5)


def test_heun_on_a_flow_is_flow_matchings():
    # dz / dt = eps - x, averaged over both ends of a step
    scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()
    schedule = RectifiedFlow(log_snr_min=-40.0, log_snr_max=40.0)
    denoiser = Mixture.random(schedule)

    z = NOISE.double()
    for index, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        velocity = (z - denoiser(z, sigma.expand(len(z)))) / sigma
        z = scheduler.step(velocity, index, z, return_dict=False)[0].double()
    times = [*torch.cat([sigmas[:1], sigmas[1:-1:2]]).tolist(), 0.0]
    torch.testing.assert_close(heun(denoiser, NOISE.double(), 10, times=times), z, rtol=0, atol=1e-4)
