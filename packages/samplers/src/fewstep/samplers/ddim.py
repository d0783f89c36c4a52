"""DDIM (arXiv 2202.00512, eq. 7 and 8): the deterministic first-order sampler, and the one that halving distils."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.samplers.common import Callback, Clip, Weight, prepare
from fewstep.schedules import Cond, Denoiser, Schedule, expand


def ddim_weights(t: Tensor, s: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(on_z, on_x) such that z_s = on_z z_t + on_x x (arXiv 2202.00512, eq. 8).

    on_z = sigma_s / sigma_t, on_x = alpha_s (1 - e^((lambda_t - lambda_s) / 2)): no cancellation for close times.
    Shape: t, s (B,) -> (B,) each.
    """
    _, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    return sigma_s / sigma_t, -alpha_s * torch.expm1((schedule.log_snr(t) - schedule.log_snr(s)) / 2)


def ddim_step(x: Tensor, z: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """One DDIM step, z_s = alpha_s x + sigma_s (z_t - alpha_t x) / sigma_t (arXiv 2202.00512, eq. 7); differentiable.

    Shape: x, z (B, ...); t, s (B,) in [0, 1]; result like z. s > t is allowed: the reversed step.
    """
    on_z, on_x = ddim_weights(t, s, schedule)
    return expand(on_z, z) * z + expand(on_x, x) * x


@torch.no_grad()
def ddim(
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
    """DDIM, first order, `steps` calls; the last step returns x itself (arXiv 2202.00512, eq. 7 and 8).

    Arguments, shapes and errors: see the package's README or `help(fewstep.samplers)`; `seeds` is not used.
    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    run = prepare(denoiser, noise, steps, cond, w, times, z, clip, seeds, callback, student="deterministic")
    on = run.grid(ddim_weights)
    z = run.z
    for i in range(steps - 1):
        z = run.report(i, run.update(z, i, "ddim", on[i]))
    return run.report(steps - 1, run.x(z, steps - 1))
