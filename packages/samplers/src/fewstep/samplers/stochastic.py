"""The stochastic N-step sampler of guided distillation (arXiv 2210.03142, section 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.samplers.common import Callback, Clip, Weight, prepare
from fewstep.samplers.ddim import ddim_weights
from fewstep.schedules import Cond, Denoiser, Schedule


def renoise_weights(t: Tensor, s: Tensor, k: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """(on_z, on_x, std) of a DDIM jump from t to k and then noise from k back to s, k < s < t.

    z_s = (alpha_s / alpha_k) z_k + sigma_{s|k} eps: the variance of z_s given x is sigma_s^2 again.
    Shape: t, s, k (B,) -> (B,) each.
    """
    on_z, on_x = ddim_weights(t, k, schedule)
    kept, std = schedule.transition(s, k)
    return kept * on_z, kept * on_x, std


@torch.no_grad()
def stochastic(
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
    """Jumps of two intervals, each followed by noise one interval back; `steps` calls (arXiv 2210.03142, sec. 3.3).

    From t = times[i] the DDIM step goes to k = times[i + 2], and noise from there to s = times[i + 1]. At the last but
    one time the jump reaches the end of the grid; from the last one x itself is returned. With 1 step it is `ddim`.

    It is for students that were distilled to such jumps (`distill.stochastic_target`) and, at many steps, for
    undistilled denoisers. On a student of deterministic halving its jumps are twice as long as the student's own.
    Arguments, shapes and errors: see the package's README or `help(fewstep.samplers)`; `seeds` make the noise each
    sample's own. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    run = prepare(denoiser, noise, steps, cond, w, times, z, clip, seeds, callback, student="stochastic")
    on = run.grid(renoise_weights, reach=2)
    z = run.z
    for i in range(steps - 1):
        z = run.report(i, run.update(z, i, "renoise", on[i], run.noise(i)))
    return run.report(steps - 1, run.x(z, steps - 1))
