"""Use a denoiser under another schedule: match the log-SNR and rescale z between VP, VE and flow."""

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.schedules.denoiser import Cond, Denoiser, Raw, Trained
from fewstep.schedules.prediction import to_x
from fewstep.schedules.schedule import Schedule, expand


def _scale(schedule: Schedule, t: Tensor) -> Tensor:
    """Root of alpha^2 + sigma^2: the deviation of z_t where that of x is 1."""
    alpha, sigma = schedule.alpha_sigma(t)
    return torch.hypot(alpha, sigma)


class Rescheduled(nn.Module):
    """A denoiser that speaks `schedule` outside and its own schedule inside; see `reschedule`."""

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser: Any = denoiser
        self.schedule = schedule

    @property
    def trained(self) -> Trained | None:
        """What the denoiser says it was trained for, if anything."""
        trained: Trained | None = getattr(self.denoiser, "trained", None)
        return trained

    @property
    def null_cond(self) -> Cond:
        """The denoiser's null condition, if it has one."""
        null_cond: Cond = getattr(self.denoiser, "null_cond", None)
        return null_cond

    @property
    def takes_guidance(self) -> bool:
        """Whether w is an input of the denoiser; like any attribute absent if the denoiser does not say."""
        return bool(self.denoiser.takes_guidance)

    def inside(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and t as the inner denoiser knows them.

        At equal log-SNR alpha, sigma and their root sum of squares all scale alike; the last one also keeps z at the
        size that the network knows where the inner schedule ends before the outer one.
        """
        inner: Schedule = self.denoiser.schedule
        u = inner.time(self.schedule.log_snr(t))
        return expand(_scale(inner, u) / _scale(self.schedule, t), z) * z, u

    def forward(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Tensor:
        """Return the estimate of x. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w)."""
        x: Tensor = self.denoiser(*self.inside(z, t), cond, w)
        return x


class RescheduledRaw(Rescheduled):
    """The same for denoisers that offer `raw`; the outputs become x, since v means something else outside."""

    def raw(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Raw:
        """Return the network's outputs as x. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w)."""
        z, t = self.inside(z, t)
        out: Raw = self.denoiser.raw(z, t, cond, w)
        cond_x, uncond_x = (
            None if o is None else to_x(o, z, t, self.denoiser.schedule, out.prediction)
            for o in (out.cond_output, out.uncond_output)
        )
        assert cond_x is not None                                 # a Raw always has its conditional output
        return Raw(cond_x, uncond_x, "x")


def reschedule(denoiser: Denoiser, schedule: Schedule) -> Denoiser:
    """Return the denoiser as seen under another schedule: same x estimate at equal log-SNR, z rescaled.

    The result is an `nn.Module` holding the original (or the original itself if the schedules are equal) and keeps its
    `raw`, `trained`, `takes_guidance` and `null_cond`. Beyond the inner schedule's ends the estimate at the nearer end
    is used.
    """
    if denoiser.schedule == schedule:
        return denoiser
    return RescheduledRaw(denoiser, schedule) if hasattr(denoiser, "raw") else Rescheduled(denoiser, schedule)
