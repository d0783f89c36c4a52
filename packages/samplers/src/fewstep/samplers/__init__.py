"""One function per diffusion sampler, for any denoiser (z, t, cond, w) -> x that carries a `.schedule`.

`ddim`, `stochastic`, `ancestral`, `heun` and `dpmpp_2m` take
`(denoiser, noise, steps, cond=None, w=None, *, times=None, z=None, clip=None, seeds=None, callback=None)` and return x,
shaped and typed like the start:

- denoiser: see `fewstep.schedules.Denoiser`. If it has `raw`, its outputs go unopened to `kernels.guided_update`.
- noise: (B, ...) float32 or float64, N(0, I). The run starts from it (VP, flow) or from sigma_max times it (Karras).
- steps: intervals of the time grid, >= 1. Calls of the denoiser: `steps`; heun: 2 steps - 1.
- cond: None, a tensor (B, ...) or a dict of them. w: None, a number or (B,); w >= 0.
  w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
- times: steps + 1 decreasing values in [0, 1]; default uniform from 1 to 0. The last step returns x itself, so the
  last value only closes the grid.
- z: (B, ...), the state at times[0] instead of noise (which may then be None).
- clip: None or (low, high), to which x is clamped before eps is computed from it.
- seeds: (B,) int64. The noise of a stochastic sampler is then a function of each sample's seed alone, bitwise the same
  in any batch; else it comes from torch's global generator.
- callback(i, t, z): called after update i with the time reached (a float) and the state there.

ValueError, before compute: shapes, dtypes or ranges that cannot work. UserWarning: steps, sampler or w that differ from
what `denoiser.trained` says. No gradient flows through a sampler; one `ddim_step` is differentiable.

From images instead of noise: `encode` (back to the noise), `transfer`, `edit`, `inpaint`.
"""

from fewstep.samplers.ancestral import ancestral
from fewstep.samplers.ddim import ddim, ddim_step
from fewstep.samplers.dpmpp_2m import dpmpp_2m
from fewstep.samplers.edit import edit, inpaint, paste, with_mask
from fewstep.samplers.encode import encode
from fewstep.samplers.heun import heun
from fewstep.samplers.stochastic import stochastic
from fewstep.samplers.transfer import transfer

__all__ = [
    "ancestral",
    "ddim",
    "ddim_step",
    "dpmpp_2m",
    "edit",
    "encode",
    "heun",
    "inpaint",
    "paste",
    "stochastic",
    "transfer",
    "with_mask",
]
