"""Guidance, conversion to x and one sampler update, in plain PyTorch.

Every update is linear, z_s = a z_t + b x + c noise, with per-sample a, b and c.
"""

from typing import Protocol

import torch
from torch import Tensor

from fewstep.kernels.backend import register


class RawLike(Protocol):
    """A network's outputs before conversion, `fewstep.schedules.Raw`."""

    @property
    def cond_output(self) -> Tensor:
        """(B, ...), given the condition."""

    @property
    def uncond_output(self) -> Tensor | None:
        """(B, ...), given the null condition, or None."""

    @property
    def prediction(self) -> str:
        """One of "x", "eps", "v" and "flow"."""


class ScheduleLike(Protocol):
    """What is needed of a `fewstep.schedules.Schedule`."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> (B,), (B,)."""



def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expand(a: Tensor, x: Tensor) -> Tensor:
    return a.to(x.dtype).reshape(a.shape + (1,) * (x.ndim - a.ndim))


def _guided(raw: RawLike, w: Tensor | float | None) -> Tensor:
    output = _wide(raw.cond_output)
    if raw.uncond_output is None or w is None:
        return output
    weight = _expand(w, output) if isinstance(w, Tensor) else w
    return output + weight * (output - _wide(raw.uncond_output))


def estimate(raw: RawLike, z: Tensor, t: Tensor, schedule: ScheduleLike, w: Tensor | float | None) -> Tensor:
    """Return the guided estimate of x; v = alpha eps - sigma x, flow = eps - x."""
    output = _guided(raw, w)
    if raw.prediction == "x":
        return output
    alpha, sigma = (_expand(a, z) for a in schedule.alpha_sigma(t))
    if raw.prediction == "eps":
        return (z - sigma * output) / alpha
    if raw.prediction == "v":
        return (alpha * z - sigma * output) / (alpha.square() + sigma.square())
    return (z - sigma * output) / (alpha + sigma)


def _snr_ratio(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> tuple[Tensor, Tensor]:
    """Return e^{lambda_t - lambda_s} and 1 - e^{lambda_t - lambda_s}, s <= t.

    alpha and sigma carry more digits of this ratio than float32 log-SNRs of size 20 and their difference.
    """
    root = (alpha_t * sigma_s) / (sigma_t * alpha_s)
    return root.square(), ((1 - root) * (1 + root)).clamp(min=0.0)


def ddim(t: Tensor, s: Tensor, schedule: ScheduleLike) -> tuple[Tensor, Tensor]:
    """Coefficients of the deterministic step (arXiv 2202.00512, eq. 7)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    ratio = sigma_s / sigma_t
    return ratio, alpha_s - ratio * alpha_t


def renoise(t: Tensor, s: Tensor, schedule: ScheduleLike, jump: Tensor | None
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of a deterministic jump beyond s, then noise back to s (arXiv 2210.03142, section 3.3)."""
    k = (2 * s - t).clamp(min=0.0) if jump is None else jump
    from_z, from_x = ddim(t, k, schedule)
    (alpha_k, sigma_k), (alpha_s, sigma_s) = schedule.alpha_sigma(k), schedule.alpha_sigma(s)
    _, added = _snr_ratio(alpha_s, sigma_s, alpha_k, sigma_k)
    ratio = alpha_s / alpha_k
    return ratio * from_z, ratio * from_x, sigma_s * added.sqrt()


def posterior(t: Tensor, s: Tensor, schedule: ScheduleLike) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of a draw from q(z_s | z_t, x) (arXiv 2202.00512, eq. 3)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    ratio, rest = _snr_ratio(alpha_t, sigma_t, alpha_s, sigma_s)
    return ratio * alpha_s / alpha_t, rest * alpha_s, sigma_s * rest.sqrt()


@register("guided_update", "reference")
def guided_update(
    raw: RawLike, z: Tensor, t: Tensor, s: Tensor | None, schedule: ScheduleLike, w: Tensor | float | None,
    kind: str, noise: Tensor | None, clip: tuple[float, float] | None, jump: Tensor | None, with_x: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `fewstep.kernels.guided_update`, arguments checked; kind "blend" is `two_step_target`."""
    z = _wide(z)
    x = estimate(raw, z, t, schedule, w)
    if clip is not None:
        x = x.clamp(*clip)
    moved = _moved(z, x, t, s, schedule, kind, noise, jump)
    return (moved, x) if with_x else moved


def _moved(
    z: Tensor, x: Tensor, t: Tensor, s: Tensor | None, schedule: ScheduleLike, kind: str, noise: Tensor | None,
    jump: Tensor | None,
) -> Tensor:
    """Return where z goes from the estimate x."""
    if kind == "blend":
        assert noise is not None
        assert jump is not None
        return x + _expand(jump, z) * (noise - x)
    if s is None:
        return x
    if kind == "ddim":
        from_z, from_x = ddim(t, s, schedule)
        return _expand(from_z, z) * z + _expand(from_x, z) * x
    assert noise is not None                                      # checked by the op
    from_z, from_x, std = renoise(t, s, schedule, jump) if kind == "renoise" else posterior(t, s, schedule)
    return _expand(from_z, z) * z + _expand(from_x, z) * x + _expand(std, z) * noise
