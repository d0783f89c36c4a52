"""Classifier-free guidance: x_w = (1 + w) x_cond - w x_uncond (arXiv 2207.12598; w as in arXiv 2210.03142)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fewstep.schedules.denoiser import Cond
from fewstep.schedules.schedule import expand, wide

Evaluate = Callable[[Tensor, Tensor, Cond], Tensor]


def guide(cond_output: Tensor, uncond_output: Tensor, w: Tensor | float) -> Tensor:
    """Return cond + w (cond - uncond). w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Linear, so it may be applied to x, eps, v or flow alike at equal z and t.

    Shape: outputs (B, ...), w float or (B,) -> (B, ...), float32 or wider.
    """
    cond_output, uncond_output = wide(cond_output), wide(uncond_output)
    weight = expand(w, cond_output) if isinstance(w, Tensor) else w
    return cond_output + weight * (cond_output - uncond_output)


def _null_leaf(null: Tensor, cond: Tensor | None, batch: int) -> Tensor:
    if cond is None:
        return null.expand(batch, *null.shape)
    return null.to(cond.device, cond.dtype).expand_as(cond)


def with_null(cond: Cond, null_cond: Cond, batch: int) -> Cond:
    """Return what the unconditional branch receives: null_cond over the batch, other keys of a dict kept from cond.

    Shape: cond leaves (B, ...), null_cond leaves (...) or (1, ...) -> (batch, ...). Expanded, not copied.

    Raises:
        ValueError: if one is a dict and the other a tensor, or null_cond is None.
    """
    if null_cond is None:
        raise ValueError("null_cond is None: guidance and dropping need what stands for no condition")
    if isinstance(null_cond, Tensor):
        if isinstance(cond, Mapping):
            raise ValueError(f"cond is a dict with keys {sorted(cond)} and null_cond a tensor; both must be the same")
        return _null_leaf(null_cond, cond, batch)
    if isinstance(cond, Tensor):
        raise ValueError(f"cond is a tensor and null_cond a dict with keys {sorted(null_cond)}; both must be the same")
    kept = dict(cond or {})
    return kept | {k: _null_leaf(v, kept.get(k), batch) for k, v in null_cond.items()}


def _join(a: Cond, b: Cond) -> Cond:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.cat([a, b])
    assert isinstance(a, Mapping)                                 # with_null made b from a
    assert isinstance(b, Mapping)
    return {k: torch.cat([a[k], b[k]]) for k in a}


def guided_outputs(evaluate: Evaluate, z: Tensor, t: Tensor, cond: Cond, null_cond: Cond) -> tuple[Tensor, Tensor]:
    """Return (conditional, unconditional) outputs by ONE call of `evaluate(z, t, cond)` on the doubled batch.

    Shape: z (B, ...), t (B,) -> (B, ...), (B, ...).

    Raises:
        ValueError: if cond or null_cond is missing or they do not fit each other.
    """
    if cond is None:
        raise ValueError("cond is None: guidance needs a condition; pass w=None for an unconditional evaluation")
    null = with_null(cond, null_cond, len(z))
    cond_output, uncond_output = evaluate(torch.cat([z, z]), torch.cat([t, t]), _join(cond, null)).chunk(2)
    return cond_output, uncond_output
