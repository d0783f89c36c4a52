"""Denoisers in closed form: data that are Gaussian, or a mixture of Gaussians per class, under any schedule."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.schedules import Raw, Schedule, expand, from_x


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2 I); the deterministic sampler's ODE has the exact solution `flow`."""

    schedule: Schedule
    mean: float = 0.3
    std: float = 0.6

    def __call__(self, z, t, cond=None, w=None):
        return self.mean + self._gain(z, t) * (z - self._alpha_sigma(z, t)[0] * self.mean)

    def _alpha_sigma(self, z, t):
        return tuple(expand(a, z) for a in self.schedule.alpha_sigma(t))

    def _gain(self, z, t):
        alpha, sigma = self._alpha_sigma(z, t)
        return alpha * self.std**2 / (alpha.square() * self.std**2 + sigma.square())

    def marginal(self, z, t):
        """Mean and standard deviation of z_t."""
        alpha, sigma = self._alpha_sigma(z, t)
        return alpha * self.mean, (alpha.square() * self.std**2 + sigma.square()).sqrt()

    def flow(self, z, t, s):
        """z_s of the ODE that passes through z at t: the same quantile of the marginal at s."""
        (mean_t, std_t), (mean_s, std_s) = self.marginal(z, t), self.marginal(z, s)
        return mean_s + std_s / std_t * (z - mean_t)


@dataclass(frozen=True)
class PosteriorSample(Gaussian):
    """Returns a sample of q(x | z_t) instead of its mean: ancestral sampling is then exact in any number of steps."""

    def __call__(self, z, t, cond=None, w=None):
        _, sigma = self._alpha_sigma(z, t)
        std = self.std * sigma / self.marginal(z, t)[1]
        return super().__call__(z, t) + std * torch.randn_like(z)


@dataclass(frozen=True)
class Mixture:
    """Data: class y is an equal mixture of N(means[y, m], std^2 I). y = K (the null class) or None: all classes."""

    schedule: Schedule
    means: Tensor  # (K, M, *shape)
    std: float = 0.4

    @classmethod
    def random(cls, schedule, classes=3, modes=2, shape=(2,), dtype=torch.float64):
        generator = torch.Generator().manual_seed(7)
        return cls(schedule, torch.randn(classes, modes, *shape, generator=generator, dtype=dtype))

    @property
    def null_cond(self) -> Tensor:
        return torch.tensor(len(self.means))

    def __call__(self, z, t, cond=None, w=None):
        if w is not None:
            raise ValueError("this denoiser takes no w")
        y = cond["y"] if isinstance(cond, Mapping) else cond
        alpha, sigma = (a.to(z.dtype) for a in self.schedule.alpha_sigma(t))
        means = self.means.to(z.dtype).flatten(2)  # (K, M, D)
        flat = z.flatten(1)
        variance = (alpha * self.std).square() + sigma.square()
        gap = flat[:, None, None] - alpha[:, None, None, None] * means  # (B, K, M, D)
        logit = -gap.square().sum(-1) / (2 * variance[:, None, None])
        if y is not None:
            other = (torch.arange(len(means)) != y[:, None]) & (y[:, None] < len(means))
            logit = logit.masked_fill(other[..., None], -torch.inf)
        share = logit.flatten(1).softmax(1).view_as(logit)
        gain = (alpha * self.std**2 / variance)[:, None, None, None]
        return (share[..., None] * (means + gain * gap)).sum((1, 2)).view_as(z)


@dataclass(frozen=True)
class Guided:
    """A class-conditional denoiser with w applied: what a perfect guided student computes."""

    denoiser: Mixture
    trained: object = None

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, z, t, cond=None, w=None):
        if w is None:
            raise ValueError("this denoiser needs w")
        given, free = self.denoiser(z, t, cond), self.denoiser(z, t)
        weight = expand(w, z) if isinstance(w, Tensor) else w
        return (1 + weight) * given - weight * free


@dataclass(frozen=True)
class Unconverted:
    """The same denoiser as a network with another prediction, which offers `raw` and is not to be called itself."""

    denoiser: Mixture
    prediction: str

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, z, t, cond=None, w=None):
        raise AssertionError("raw is there: use it")

    def raw(self, z, t, cond=None, w=None):
        def output(c):
            return from_x(self.denoiser(z, t, c), z, t, self.schedule, self.prediction)

        return Raw(output(cond), None if w is None else output(None), self.prediction)


@dataclass(frozen=True)
class Narrow:
    """A network of float32: whatever it computes with, it is given float32 and gives float32."""

    denoiser: Unconverted

    @property
    def schedule(self):
        return self.denoiser.schedule

    def __call__(self, z, t, cond=None, w=None):
        raise AssertionError("raw is there: use it")

    def raw(self, z, t, cond=None, w=None):
        assert z.dtype == t.dtype == torch.float32
        output = self.denoiser.raw(z.double(), t.double(), cond, w)
        return output._replace(cond_output=output.cond_output.float())


def states(schedule, t, dtype=torch.float64):
    """z_t of points and noise that differ for each time."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, len(t), 2, generator=generator, dtype=torch.float64)
    return schedule.add_noise(x, t.double(), noise).to(dtype)


def full(value, like):
    """`value` as a time for each sample of `like`."""
    return torch.full((len(like),), value, dtype=like.dtype)
