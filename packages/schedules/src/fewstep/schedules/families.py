"""The continuous noise schedules: cosine, VP with linear beta, Karras (EDM) and rectified flow.

Where a curve runs to infinite log-SNR, time runs linearly between the points at which the curve meets the bounds, so
that `log_snr` stays strictly monotone and `time` is its inverse everywhere. Constants are Python floats (float64).
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.schedules.schedule import Kind, Schedule, wide


def unit(t: Tensor) -> Tensor:
    """Return times as float32 or wider within [0, 1]."""
    return wide(t).clamp(0.0, 1.0)


def check_bounds(log_snr_min: float, log_snr_max: float) -> None:
    """Raise ValueError unless log_snr_min < log_snr_max, both finite."""
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise ValueError(f"log_snr_min={log_snr_min} must be finite and below log_snr_max={log_snr_max}")


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha_t = cos(pi t / 2) within bounded log-SNR, shifted with resolution.

    lambda_t = shift - 2 log tan(a t + b) (arXiv 2202.00512, code). The shift, added to the log-SNR, is 2 log(64 / side)
    for images with that side in pixels (arXiv 2301.11093, section 2.1). a and b put the ends, shift included, at
    log_snr_max and log_snr_min.
    """

    log_snr_min: float = -20.0
    log_snr_max: float = 20.0
    shift: float = 0.0
    kind: ClassVar[Kind] = "vp"

    def __post_init__(self) -> None:
        check_bounds(self.log_snr_min, self.log_snr_max)

    def _angles(self) -> tuple[float, float, float]:
        """Angle at t = 0, angle that is left to pi / 2 at t = 1, and the range between."""
        first = math.atan(math.exp((self.shift - self.log_snr_max) / 2))
        last = math.atan(math.exp((self.log_snr_min - self.shift) / 2))
        return first, last, math.pi / 2 - first - last

    def log_snr(self, t: Tensor) -> Tensor:
        """Return lambda_t. Shape: any -> same."""
        t, (first, last, span) = unit(t), self._angles()
        early = t <= 0.5
        # tan(pi / 2 - y) = 1 / tan(y): near t = 1 the angle left to pi / 2 keeps the digits that pi / 2 - y has lost
        angle = torch.where(early, first + span * t, last + span * (1 - t))
        log_tan = torch.log(torch.tan(angle))
        return (self.shift + torch.where(early, -2 * log_tan, 2 * log_tan)).clamp(self.log_snr_min, self.log_snr_max)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time with this log-SNR. Shape: any -> same."""
        first, last, span = self._angles()
        half = (wide(log_snr) - self.shift) / 2
        angle = torch.atan(torch.exp(-half.abs()))
        return torch.where(half >= 0, (angle - first) / span, 1 - (angle - last) / span).clamp(0.0, 1.0)


@dataclass(frozen=True)
class LinearBeta(Schedule):
    """Variance preserving with a linear rate: -2 log alpha_u = beta_min u + (beta_max - beta_min) u^2 / 2.

    arXiv 2011.13456, eq. 33; the continuous limit of DDPM's linear betas. Its last log-SNR is about -10 by nature.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    log_snr_min: float = -20.0
    log_snr_max: float = 20.0
    kind: ClassVar[Kind] = "vp"

    def __post_init__(self) -> None:
        check_bounds(self.log_snr_min, self.log_snr_max)
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"beta_min={self.beta_min} must be positive and at most beta_max={self.beta_max}")
        if self._ends[0] >= 1:
            raise ValueError(f"log_snr_max={self.log_snr_max} lies below this curve's end; raise it")

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """The curve's own times at t = 0 and t = 1."""
        bounds = torch.tensor([self.log_snr_max, self.log_snr_min], dtype=torch.float64)
        first, last = self._curve_time(bounds).tolist()
        return first, min(1.0, last)

    def _curve_time(self, log_snr: Tensor) -> Tensor:
        """Solve the quadratic for u; -2 log alpha = softplus(-lambda)."""
        decay = F.softplus(-log_snr, threshold=50)
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * decay)
        return 2 * decay / (self.beta_min + root)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return lambda_t. Shape: any -> same."""
        first, last = self._ends
        u = first + (last - first) * unit(t)
        decay = u * (self.beta_min + u * (self.beta_max - self.beta_min) / 2)
        return -(decay + torch.log(-torch.expm1(-decay))).clamp(-self.log_snr_max, -self.log_snr_min)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time with this log-SNR. Shape: any -> same."""
        first, last = self._ends
        return ((self._curve_time(wide(log_snr)) - first) / (last - first)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Karras(Schedule):
    """EDM's noise levels: alpha = 1, sigma_t = (sigma_min^{1/rho} (1 - t) + sigma_max^{1/rho} t)^rho.

    arXiv 2206.00364, eq. 5, continuous in t. Its log-SNR ends are -2 log sigma_max and -2 log sigma_min.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    log_snr_min: float = field(init=False, repr=False, compare=False)
    log_snr_max: float = field(init=False, repr=False, compare=False)
    kind: ClassVar[Kind] = "ve"

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max < math.inf and self.rho > 0):
            raise ValueError(
                f"need 0 < sigma_min < sigma_max and rho > 0, got {self.sigma_min}, {self.sigma_max}, {self.rho}"
            )
        object.__setattr__(self, "log_snr_min", -2 * math.log(self.sigma_max))
        object.__setattr__(self, "log_snr_max", -2 * math.log(self.sigma_min))

    @property
    def init_noise_scale(self) -> float:
        """sigma_max."""
        return self.sigma_max

    def _roots(self) -> tuple[float, float]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return low, high - low

    def log_snr(self, t: Tensor) -> Tensor:
        """Return lambda_t. Shape: any -> same."""
        low, span = self._roots()
        return (-2 * self.rho * torch.log(low + span * unit(t))).clamp(self.log_snr_min, self.log_snr_max)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time with this log-SNR. Shape: any -> same."""
        low, span = self._roots()
        return ((torch.exp(-wide(log_snr) / (2 * self.rho)) - low) / span).clamp(0.0, 1.0)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """alpha_t = 1 - t, sigma_t = t (arXiv 2209.03003) within bounded log-SNR (5e-5 from the line with the default)."""

    log_snr_min: float = -20.0
    log_snr_max: float = 20.0
    kind: ClassVar[Kind] = "flow"

    def __post_init__(self) -> None:
        check_bounds(self.log_snr_min, self.log_snr_max)

    def _ends(self) -> tuple[float, float]:
        """Sigma at t = 0 and alpha at t = 1."""
        return 1 / (1 + math.exp(self.log_snr_max / 2)), 1 / (1 + math.exp(-self.log_snr_min / 2))

    def log_snr(self, t: Tensor) -> Tensor:
        """Return lambda_t. Shape: any -> same."""
        t, (first, last) = unit(t), self._ends()
        span = 1 - first - last
        alpha, sigma = last + span * (1 - t), first + span * t    # each from its own end: neither cancels
        return (2 * (alpha.log() - sigma.log())).clamp(self.log_snr_min, self.log_snr_max)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time with this log-SNR. Shape: any -> same."""
        first, last = self._ends()
        half = wide(log_snr) / 2
        span = 1 - first - last
        return torch.where(
            half >= 0, (torch.sigmoid(-half) - first) / span, 1 - (torch.sigmoid(half) - last) / span
        ).clamp(0.0, 1.0)
