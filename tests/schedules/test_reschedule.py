"""A denoiser under another schedule, on data whose best denoiser is known in closed form."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep.schedules import (
    Cond,
    Cosine,
    Discrete,
    Karras,
    LinearBeta,
    Raw,
    RectifiedFlow,
    Schedule,
    Trained,
    expand,
    from_x,
    reschedule,
)

MEAN, SPREAD = 0.3, 0.7
SCHEDULES = [Cosine(), Cosine(shift=-2.0), LinearBeta(), Discrete(torch.linspace(0.999, 0.005, 200)), Karras(),
             RectifiedFlow()]


@dataclass
class Gaussian:
    """E[x | z_t] for x ~ N(MEAN, SPREAD^2), written for any alpha and sigma."""

    schedule: Schedule
    trained: Trained | None = None
    last: tuple[Cond, object] = (None, None)

    def __call__(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Tensor:
        self.last = (cond, w)
        alpha, sigma = (expand(a, z) for a in self.schedule.alpha_sigma(t))
        return (sigma**2 * MEAN + alpha * SPREAD**2 * z) / (sigma**2 + alpha**2 * SPREAD**2)


class RawGaussian(Gaussian):
    def raw(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Raw:
        x = self(z, t, cond, w)
        return Raw(from_x(x, z, t, self.schedule, "v"), from_x(2 * x, z, t, self.schedule, "v"), "v")


def noised(schedule: Schedule, low: float, high: float) -> tuple[Tensor, Tensor]:
    """z_t (5, 2, 3, 3) float64 and times whose log-SNR lies within [low, high]."""
    generator = torch.Generator().manual_seed(6)
    x, eps = (torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t = schedule.time(torch.linspace(low, high, 5, dtype=torch.float64))
    return schedule.add_noise(MEAN + SPREAD * x, t, eps), t


@pytest.mark.parametrize("inner", SCHEDULES, ids=str)
@pytest.mark.parametrize("outer", SCHEDULES, ids=str)
def test_the_estimate_is_the_best_one_under_the_other_schedule(inner: Schedule, outer: Schedule) -> None:
    """Wrong scale of z or unmatched log-SNR between VP, VE and flow makes any foreign model look broken."""
    z, t = noised(outer, -5.0, 6.0)
    got = reschedule(RawGaussian(inner), outer)(z, t)
    torch.testing.assert_close(got, Gaussian(outer)(z, t), rtol=0, atol=1e-10)


def test_raw_outputs_mean_the_same_x() -> None:
    """v of the inner schedule read with the outer alpha and sigma would be another image."""
    z, t = noised(Karras(), -5.0, 6.0)
    wrapped = reschedule(RawGaussian(Cosine()), Karras())
    raw = wrapped.raw(z, t)  # type: ignore[attr-defined]  # optional in the protocol
    assert raw.prediction == "x"
    torch.testing.assert_close(raw.cond_output, Gaussian(Karras())(z, t), rtol=0, atol=1e-8)
    torch.testing.assert_close(raw.uncond_output, 2 * Gaussian(Karras())(z, t), rtol=0, atol=1e-8)
    assert not hasattr(reschedule(Gaussian(Cosine()), Karras()), "raw")


def test_beyond_the_inner_ends_the_network_sees_inputs_of_its_own_size() -> None:
    """Scaling by alpha alone would hand an EDM network inputs of deviation 22,000 where it knows 80."""
    seen: list[float] = []

    class Recording(Gaussian):
        def __call__(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Tensor:
            seen.append(z.std().item())
            return super().__call__(z, t, cond, w)

    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reschedule(Recording(Karras()), Cosine())(noise, torch.ones(4))
    assert abs(seen[0] / 80 - 1) < 0.05


def test_module_behaviour_and_attributes_pass_through() -> None:
    """Training, moving and saving go through the wrapper; condition and w must reach the denoiser."""
    trained = Trained("guided", w_range=(0.0, 4.0))

    class Network(torch.nn.Linear):
        schedule = Cosine()
        null_cond = torch.tensor(10)
        takes_guidance = True

    network = Network(2, 2)
    wrapped = reschedule(network, Karras())  # type: ignore[arg-type]  # only its parameters are asked for
    assert isinstance(wrapped, torch.nn.Module)
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in network.parameters()}
    assert wrapped.null_cond is network.null_cond
    assert wrapped.takes_guidance is True
    assert not hasattr(reschedule(Gaussian(Cosine()), Karras()), "takes_guidance")  # it does not say: neither do we
    gaussian = Gaussian(Cosine(), trained)
    outer = reschedule(gaussian, Karras())
    z, t = noised(Karras(), -5.0, 6.0)
    cond, w = torch.arange(5), torch.ones(5)
    outer(z, t, cond, w)
    assert gaussian.last == (cond, w)
    assert outer.trained is trained  # type: ignore[attr-defined]  # optional in the protocol
    assert reschedule(gaussian, Cosine()) is gaussian


def test_trained_refuses_unknown_kinds_and_reads_json() -> None:
    with pytest.raises(ValueError, match="kind='student' is unknown; known: teacher, guided"):
        Trained("student")  # type: ignore[arg-type]  # the point of the test
    assert Trained("guided", w_range=[0, 4]) == Trained("guided", w_range=(0.0, 4.0))  # type: ignore[arg-type]  # JSON
