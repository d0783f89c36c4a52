"""Ancestral sampling with tunable noise (arXiv 2202.00512, eq. 3 and 4; arXiv 2406.04103, algorithm 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.samplers.common import Callback, Clip, Weight, prepare
from fewstep.schedules import Cond, Denoiser, Schedule


def posterior_weights(t: Tensor, s: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(on_z, on_x, std) of q(z_s | z_t, x), and sigma_t / sigma_s = sigma_{t|s} / std (arXiv 2202.00512, eq. 3).

    Shape: t, s (B,) -> (B,) each."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    gap = schedule.log_snr(t) - schedule.log_snr(s)
    fresh = -torch.expm1(gap)
    return torch.exp(gap) * alpha_s / alpha_t, fresh * alpha_s, fresh.sqrt() * sigma_s, sigma_t / sigma_s


@torch.no_grad()
def ancestral(
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
    noise_level: float = 0.0,
) -> Tensor:
    """Ancestral sampling with noise of tunable size, `steps` calls (arXiv 2202.00512, eq. 4; 2406.04103, algorithm 1).

    z_s = mu + sqrt(var^(1-v) (sigma_{t|s}^2)^v) eps with v = `noise_level` in [0, 1], where mu and var are those of
    q(z_s | z_t, x). v = 0 is exact for a known x, v = 1 for N(0, I) data. The last step returns x itself.
    Arguments, shapes and errors: see the package's README or `help(fewstep.samplers)`; `seeds` make the noise each
    sample's own. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    if not 0.0 <= noise_level <= 1.0:
        raise ValueError(f"noise_level = {noise_level}: must lie in [0, 1]")
    run = prepare(denoiser, noise, steps, cond, w, times, z, clip, seeds, callback, student="moments")
    on = run.grid(posterior_weights)
    z = run.z
    for i in range(steps - 1):
        louder = run.noise(i) * on[i][3] ** noise_level
        z = run.report(i, run.update(z, i, "posterior", on[i], louder))
    return run.report(steps - 1, run.x(z, steps - 1))
