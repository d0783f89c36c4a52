"""DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): two-step, data prediction, in log-SNR."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.samplers.common import Callback, Clip, Weight, prepare
from fewstep.samplers.ddim import ddim_weights
from fewstep.schedules import Cond, Denoiser, Schedule


def multistep_weights(t: Tensor, s: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """(on_z, on_d, h): those of DDIM, and by how much log(alpha / sigma) grows. Shape: t, s (B,) -> (B,) each."""
    return *ddim_weights(t, s, schedule), (schedule.log_snr(s) - schedule.log_snr(t)) / 2


@torch.no_grad()
def dpmpp_2m(
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
    """DPM-Solver++(2M), second order, `steps` calls (arXiv 2211.01095, algorithm 2); first and last step are DDIM's.

    Each update is a DDIM step with D = x + (x - x_before) h / (2 h_before); the last step returns x itself.
    Arguments, shapes and errors: see the package's README or `help(fewstep.samplers)`; `seeds` is not used.
    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    run = prepare(denoiser, noise, steps, cond, w, times, z, clip, seeds, callback, student=None)
    on = run.grid(multistep_weights)
    z, before = run.z, None
    for i in range(steps - 1):
        on_z, on_d, h = on[i]
        x = run.x(z, i)
        d = x if before is None else torch.add(x, x - before, alpha=h / (2 * on[i - 1][2]))
        z, before = run.report(i, torch.add(on_z * z, d, alpha=on_d)), x
    return run.report(steps - 1, run.x(z, steps - 1))
