"""Heun's second-order sampler (EDM, arXiv 2206.00364, algorithm 1), deterministic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.samplers.common import Callback, Clip, Weight, prepare
from fewstep.samplers.ddim import ddim_weights
from fewstep.schedules import Cond, Denoiser, Schedule


def heun_weights(t: Tensor, s: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """(on_z, on_x, on_change): z_s = on_z z_t + on_x x_t + on_change (x_s - x_t).

    The ODE is dz = x dalpha + eps dsigma in any schedule. Its trapezoid is the DDIM step plus
    (alpha_s - alpha_t)(x_s - x_t) / 2 + (sigma_s - sigma_t)(eps_s - eps_t) / 2, and on the DDIM step's result
    eps_s - eps_t = -(alpha_s / sigma_s)(x_s - x_t). For alpha = 1 this is EDM's dz/dsigma, for a flow its dz/dt; the
    schedule's own scale keeps it bounded at t = 1, where z / alpha and sigma / alpha (2e4 for Cosine) are not.
    Shape: t, s (B,) -> (B,) each.
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    return *ddim_weights(t, s, schedule), (alpha_s * sigma_t / sigma_s - alpha_t) / 2


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    noise: Tensor | None,
    steps: int,
    cond: Cond = None,
    w: Weight = None,
    *,
    times: Sequence[float] | Tensor | None = None,
    z: Tensor | None = None,
    clip: Clip = None,
    seeds: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's sampler, second order, 2 steps - 1 calls (arXiv 2206.00364, algorithm 1); the last step returns x itself.

    Arguments, shapes and errors: see the package's README or `help(fewstep.samplers)`; `seeds` is not used.
    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    run = prepare(denoiser, noise, steps, cond, w, times, z, clip, seeds, callback, student=None)
    on = run.grid(heun_weights)
    z = run.z
    for i in range(steps - 1):
        on_z, on_x, on_change = on[i]
        x = run.x(z, i)
        euler = torch.add(on_z * z, x, alpha=on_x)
        z = run.report(i, torch.add(euler, run.x(euler, i + 1) - x, alpha=on_change))
    return run.report(steps - 1, run.x(z, steps - 1))
