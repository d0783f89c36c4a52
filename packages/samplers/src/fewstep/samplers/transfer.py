"""Style transfer: image to noise under one condition, noise to image under another (DDIB, arXiv 2203.08382)."""

import torch
from torch import Tensor

from fewstep.samplers import checks
from fewstep.samplers.common import Clip, Weight
from fewstep.samplers.ddim import ddim
from fewstep.samplers.encode import encode
from fewstep.schedules import Cond, Denoiser


@torch.no_grad()
def transfer(
    encoder: Denoiser | None,
    decoder: Denoiser,
    x: Tensor,
    steps: int,
    cond_from: Cond,
    cond_to: Cond,
    w: Weight = None,
    *,
    clip: Clip = None,
) -> Tensor:
    """Encode x under `cond_from`, decode under `cond_to`: 2 `steps` calls (arXiv 2210.03142, section 3.5; DDIB).

    Args:
        encoder: a distilled encoder (`distill.EncoderDistillation`), or any denoiser at many steps.
        decoder: its counterpart for `ddim`, with the encoder's schedule; undistilled, the same denoiser.
        x: (B, ...) float32 or float64.
        steps: of each of the two.
        cond_from, cond_to: what x is an image of, and what it is to become; (B, ...).
        w: of both. None, a number or (B,). w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
        clip: None or (low, high), as in `ddim`.

    Shape: -> like x.

    Raises:
        ValueError: no encoder, two schedules, or what `encode` and `ddim` refuse.
    """
    if encoder is None:
        raise ValueError("encoder is None: style transfer needs one, a distilled encoder or (many steps) the teacher")
    checks.schedules("encoder", encoder.schedule, "decoder", decoder.schedule)
    checks.leading("cond_from", cond_from, len(x))
    checks.leading("cond_to", cond_to, len(x))
    latent = encode(encoder, x, steps, cond_from, w)
    return ddim(decoder, None, steps, cond_to, w, z=latent, clip=clip)
