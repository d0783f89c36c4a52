"""From images to the noise that they come from: reverse DDIM (arXiv 2210.03142, algorithm 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.kernels import guided_update
from fewstep.samplers import checks
from fewstep.samplers.common import Table, Weight, rows_like
from fewstep.schedules import Cond, Denoiser, Raw


@torch.no_grad()
def encode(
    denoiser: Denoiser,
    x: Tensor,
    steps: int,
    cond: Cond = None,
    w: Weight = None,
    *,
    times: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """DDIM run backwards from x, `steps` calls: the state at times[-1] (arXiv 2210.03142, algorithm 4).

    The state is float64 between calls. At t = 0, where sigma is 5e-5, a step to s multiplies the rounding of z and of a
    float32 x by sigma_s / sigma_t, 2e4; a network's own output (v, eps, flow) keeps its digits.

    Args:
        denoiser: a distilled encoder, or any denoiser at many steps.
        x: (B, ...) float32 or float64, images; taken for the state at times[0].
        steps: intervals of the grid, >= 1.
        cond: None, a tensor (B, ...) or a dict of them: what x is an image of.
        w: None, a number or (B,). w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
        times: steps + 1 increasing values in [0, 1]; default uniform from 0 to 1.

    Shape: -> like x. A sampler takes it as `z` (from t = 1 of VP and flow also as `noise`).

    Raises:
        ValueError: shapes, dtypes or ranges that cannot work. UserWarning: not what the denoiser was trained for.
    """
    grid = checks.time_grid(steps, times, rising=True)
    checks.start("x", x)
    checks.leading("cond", cond, len(x))
    checks.guidance(w, len(x), needed=bool(getattr(denoiser, "takes_guidance", False)))
    checks.trained(denoiser, grid, w, "encoder")
    z = x.double()
    seen, exact = rows_like(grid, x), rows_like(grid, z)
    table = Table(denoiser.schedule, grid, exact)
    raw = getattr(denoiser, "raw", None)
    for i in range(steps):
        given = (z.to(x.dtype), seen[i], cond, w)
        output = Raw(denoiser(*given), None, "x") if raw is None else raw(*given)
        z = guided_update(output, z, exact[i], exact[i + 1], table, w)
    return z.to(x.dtype)
