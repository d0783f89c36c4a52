"""Editing and inpainting with a few-step sampler: start from a noised image at a time of the sampler's own grid."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers import checks
from fewstep.samplers.common import Weight
from fewstep.samplers.ddim import ddim
from fewstep.schedules import Cond, Denoiser, Schedule

Sampler = Callable[..., Tensor]


@torch.no_grad()
def edit(
    denoiser: Denoiser,
    x: Tensor,
    noise: Tensor,
    steps: int,
    strength: float,
    cond: Cond = None,
    w: Weight = None,
    *,
    sampler: Sampler = ddim,
    **options: Any,
) -> Tensor:
    """Noise x to the grid time t0 = k / steps, then sample from there in k steps (SDEdit, arXiv 2108.01073).

    Args:
        denoiser: a student of `steps`, or any denoiser.
        x: (B, ...) float32 or float64, images to be edited.
        noise: like x, N(0, I).
        steps: of the whole grid, a student's own number.
        strength: in [0, 1], share of the grid to go back: k = strength steps, rounded down, at least 1. 1 keeps next to
            nothing of x.
        cond: what x is to become; None, a tensor (B, ...) or a dict of them.
        w: None, a number or (B,). w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
        sampler: any of this package with `ddim`'s arguments, the one that the student is for.
        options: of the sampler: clip, seeds, callback.

    Shape: -> like x.

    Raises:
        ValueError: strength outside [0, 1] or less than one step, noise not shaped like x, or what the sampler refuses.
    """
    checks.pair(x, noise)
    left = checks.part(steps, strength)
    times = [(left - i) / steps for i in range(left + 1)]
    z = denoiser.schedule.add_noise(x, torch.full((len(x),), times[0], dtype=x.dtype, device=x.device), noise)
    return sampler(denoiser, None, left, cond, w, times=times, z=z, **options)


class Known:
    """A denoiser that knows x where `mask` is false: its estimate there is x itself.

    A DDIM step keeps the noise of a state whose x is known, so every state then is exactly the noised x there: the
    mask-guided replacement of RePaint (arXiv 2201.09865) at every call of any sampler, without a step of its own.
    """

    def __init__(self, denoiser: Denoiser, x: Tensor, mask: Tensor) -> None:
        self._denoiser, self._x, self._mask = denoiser, x, mask
        self.trained = getattr(denoiser, "trained", None)
        self.takes_guidance = getattr(denoiser, "takes_guidance", False)

    @property
    def schedule(self) -> Schedule:
        """The denoiser's."""
        return self._denoiser.schedule

    def __call__(self, z: Tensor, t: Tensor, cond: Cond = None, w: Weight = None) -> Tensor:
        """The estimate of x. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w)."""
        return paste(self._denoiser(z, t, cond, w), self._x, self._mask)


@torch.no_grad()
def inpaint(
    denoiser: Denoiser,
    x: Tensor,
    noise: Tensor,
    steps: int,
    strength: float = 1.0,
    cond: Cond = None,
    w: Weight = None,
    *,
    mask: Tensor,
    masked_image: Tensor | None = None,
    sampler: Sampler = ddim,
    **options: Any,
) -> Tensor:
    """Paint x anew where `mask` is 1; every other pixel comes back bit for bit (arXiv 2210.03142, section 4.4).

    A denoiser with a true attribute `takes_mask` was trained with the mask and the masked image as inputs: they join
    `cond` (`with_mask`). Any other denoiser is told x where it is known, at every call (`Known`). Both end in `paste`;
    for latents, paste again after decoding.

    Args:
        denoiser, x, noise, steps, cond, w, sampler, options: as in `edit`; w = 0 is no guidance (Stable Diffusion's
            guidance scale is 1 + w).
        strength: as in `edit`; 1 forgets what x holds under the mask.
        mask: binary, (B or 1, C or 1, H, W): 1 where x is painted anew.
        masked_image: like x, see `with_mask`; only a denoiser that takes masks looks at it.

    Shape: -> like x.

    Raises:
        ValueError: mask or masked_image of the wrong size, mask not binary, or what `edit` refuses.
    """
    checks.pair(x, noise)
    chosen = checks.mask(mask, x)
    if getattr(denoiser, "takes_mask", False):
        cond = with_mask(cond, x, chosen, masked_image)
    else:
        denoiser = Known(denoiser, x, chosen)
    return paste(edit(denoiser, x, noise, steps, strength, cond, w, sampler=sampler, **options), x, chosen)


def paste(painted: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """`painted` where the mask is true, x bit for bit elsewhere. Shape: painted, x (B, ...), mask broadcastable."""
    return torch.where(mask, painted, x)


def with_mask(cond: Cond, x: Tensor, mask: Tensor, masked_image: Tensor | None = None) -> dict[str, Tensor]:
    """What a model trained for inpainting is given, in training and after: `cond` with "mask" and "masked_image".

    Args:
        cond: what else it is given; a tensor becomes the key "y".
        x: (B, ...).
        mask: binary, (B or 1, C or 1, ...): 1 where x is painted anew. As the key "mask" it is (B, 1, ...) like x.
        masked_image: like x, what the model sees of it; None: x with 0 where the mask is 1. For latents give the
            encoding of the masked picture: latents beside the mask know what was under it.

    Raises:
        ValueError: mask of the wrong size or not binary, or masked_image not shaped like x.
    """
    chosen = checks.mask(mask, x)
    if masked_image is not None and masked_image.shape != x.shape:
        raise ValueError(f"masked_image has shape {tuple(masked_image.shape)}: must be that of x, {tuple(x.shape)}")
    seen = x.masked_fill(chosen, 0.0) if masked_image is None else masked_image
    given = dict(cond) if isinstance(cond, Mapping) else ({} if cond is None else {"y": cond})
    one = chosen.any(1, keepdim=True).expand(len(x), 1, *x.shape[2:])
    return {**given, "mask": one.to(x.dtype), "masked_image": seen}
