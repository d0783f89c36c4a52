"""What every noise schedule is: a decreasing log-SNR of time, and everything that follows from it.

z_t = alpha_t x + sigma_t eps, lambda_t = log(alpha_t^2 / sigma_t^2), t in [0, 1] with 0 = data and 1 = noise.
"""

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Kind = Literal["vp", "ve", "flow"]


def wide(x: Tensor) -> Tensor:
    """Return x as it is if float32 or wider, else as float32: half precision is for networks, not for formulas."""
    if not x.is_floating_point():
        raise ValueError(f"expected a float tensor, got {x.dtype}; times lie in [0, 1]: index i of T is (i + 1) / T")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(a: Tensor, x: Tensor) -> Tensor:
    """Shape per-sample values so that they broadcast against a batch.

    Shape: a (B,) or (), x (B, ...) -> (B, 1, ..., 1) or (1, ..., 1), in x's dtype or float32, whichever is wider, so
    that float64 times never turn a float32 image into float64.
    """
    return a.to(torch.promote_types(x.dtype, torch.float32)).reshape(a.shape + (1,) * (x.ndim - a.ndim))


def alpha_sigma_of(log_snr: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return (alpha, sigma) of a log-SNR, without the cancellation of 1 - alpha^2 at either end.

    kind "vp": alpha^2 + sigma^2 = 1; "ve": alpha = 1; "flow": alpha + sigma = 1.
    """
    if kind == "vp":
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    if kind == "flow":
        return torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)
    return torch.ones_like(log_snr), torch.exp(-log_snr / 2)


class Schedule(ABC):
    """A noise schedule. Concrete ones are frozen dataclasses: comparable, hashable, and written as JSON.

    Attributes:
        kind: "vp", "ve" or "flow", how alpha and sigma follow from the log-SNR.
        log_snr_min, log_snr_max: bounds that `log_snr` never leaves, so alpha and sigma are never exactly 0.

    Every method computes in the dtype of its times, at least float32, and takes times of any shape. Times outside
    [0, 1] are clamped.
    """

    kind: ClassVar[Kind]
    log_snr_min: float
    log_snr_max: float

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return lambda_t = log(alpha_t^2 / sigma_t^2), strictly decreasing in t. Shape: any -> same."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time in [0, 1] that has this log-SNR (the nearer end if none has). Shape: any -> same."""

    @property
    def init_noise_scale(self) -> float:
        """What N(0, I) is multiplied by to start sampling at t = 1: 1, or sigma_max where variance explodes."""
        return 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t), each shaped like t."""
        return alpha_sigma_of(self.log_snr(t), self.kind)

    def add_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return z_t = alpha_t x + sigma_t noise. Shape: x, noise (B, ...), t (B,) -> (B, ...), float32 or wider."""
        alpha, sigma = (expand(a, x) for a in self.alpha_sigma(t))
        return alpha * x + sigma * noise

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_{t|s}, sigma_{t|s}) of q(z_t | z_s) = N(alpha_{t|s} z_s, sigma_{t|s}^2 I), s <= t.

        Shape: (B,), (B,) -> (B,), (B,). sigma_{t|s}^2 = (1 - e^{lambda_t - lambda_s}) sigma_t^2, by expm1.

        The difference of log-SNRs has the rounding error of their dtype. In float32 little of it is left where t - s
        nears 1e-7: close to t = 1, Karras' sigma_{t|s} then is 0 and LinearBeta's 11 % off. Such steps take float64
        times.
        """
        log_snr_t, log_snr_s = self.log_snr(t), self.log_snr(s)
        (alpha_t, sigma_t), (alpha_s, _) = alpha_sigma_of(log_snr_t, self.kind), alpha_sigma_of(log_snr_s, self.kind)
        return alpha_t / alpha_s, sigma_t * torch.sqrt(-torch.expm1(log_snr_t - log_snr_s))

    def posterior(self, z_t: Tensor, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z_s | z_t, x), s <= t (arXiv 2202.00512, eq. 3).

        Shape: z_t, x (B, ...), t, s (B,) -> mean (B, ...), std (B, 1, ..., 1), float32 or wider.
        Times closer than about 1e-7: see `transition`; float64 times leave float32 images float32.
        """
        log_snr_t, log_snr_s = self.log_snr(t), self.log_snr(s)
        (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma_of(log_snr_t, self.kind), alpha_sigma_of(log_snr_s, self.kind)
        delta = log_snr_t - log_snr_s
        rest = -torch.expm1(delta)                                # 1 - e^{lambda_t - lambda_s}, without cancellation
        mean = expand(torch.exp(delta) * alpha_s / alpha_t, z_t) * z_t + expand(rest * alpha_s, z_t) * x
        return mean, expand(sigma_s * rest.sqrt(), z_t)

    def to_config(self) -> dict[str, Any]:
        """Return the settings as a JSON-able dict that `schedule_from_config` reads back."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]  # dataclasses
        return {"type": type(self).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
