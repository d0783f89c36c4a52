"""What the methods share: draws, one estimate of x, the weighted error, roles, and what training a network takes."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.method import Batch
from fewstep.kernels import guided_update
from fewstep.schedules import Cond, Denoiser, Raw, Schedule, loss_weight, seeded_noise, seeded_uniform

WRange = tuple[float, float]

# Streams of a sample's seed. Numbers of one stream are independent of each other too: see `uniforms`.
UNIFORM_STREAM, NOISE_STREAM, STEP_NOISE_STREAM = 1, 2, 3


def uniforms(seeds: Tensor, count: int = 2) -> tuple[Tensor, ...]:
    """Independent U[0, 1) per sample, by default two: for its time and for its guidance weight (or dropping).

    Shape: seeds (B,) -> `count` times (B,).
    """
    return seeded_uniform(seeds, (count,), stream=UNIFORM_STREAM).unbind(1)


def noise_like(x: Tensor, seeds: Tensor, stream: int = NOISE_STREAM) -> Tensor:
    """N(0, I) shaped like x (B, ...), float32 or wider, each sample from its own seed."""
    return seeded_noise(seeds, x.shape[1:], stream=stream).to(torch.promote_types(x.dtype, torch.float32))


def weights_in(w_range: WRange, u: Tensor) -> Tensor:
    """Guidance weights U[low, high] from u ~ U[0, 1); the ends themselves if they are equal. Shape: (B,) -> (B,)."""
    low, high = w_range
    return (low + (high - low) * u).clamp(low, high)


def checked_range(w_range: WRange) -> WRange:
    """(low, high) as floats. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Raises ValueError unless 0 <= low <= high.
    """
    low, high = (float(w) for w in w_range)
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"w_range = {tuple(w_range)}: must be (low, high) with 0 <= low <= high (scale is 1 + w)")
    return low, high


def raw_of(denoiser: Denoiser, z: Tensor, t: Tensor, cond: Cond, w: Tensor | float | None = None) -> Raw:
    """The denoiser's output before conversion if it offers `raw`, else its x as such."""
    raw = getattr(denoiser, "raw", None)
    if raw is None:
        return Raw(denoiser(z, t, cond, w), None, "x")
    output: Raw = raw(z, t, cond, w)
    return output


def estimate(denoiser: Denoiser, z: Tensor, t: Tensor, cond: Cond, w: Tensor | float | None) -> Tensor:
    """The estimate of x, by `kernels.guided_update` where the denoiser offers `raw`. Shape: -> like z."""
    return guided_update(raw_of(denoiser, z, t, cond, w), z, t, None, denoiser.schedule, w)


class Weighting:
    """The loss of every method here: weight(lambda_t) times the squared error of x.

    Mean over an image's pixels, then over the batch (arXiv 2202.00512, section 4), in float32 or wider whatever
    autocast says. `name` is one of fewstep.schedules' weights; an unknown one raises ValueError. It is taken of the
    log-SNR less `shift`, and stays as it is above `log_snr_max`.
    """

    def __init__(self, name: str, log_snr_max: float = math.inf, shift: float = 0.0) -> None:
        self.name, self.log_snr_max, self.shift, self._weight = name, log_snr_max, shift, loss_weight(name)

    def weight(self, log_snr: Tensor) -> Tensor:
        """The weight of the squared error of x. Shape: any -> same, float32 or wider."""
        return self._weight((log_snr - self.shift).clamp(max=self.log_snr_max))

    def __call__(self, x: Tensor, target: Tensor, log_snr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and logs "loss" and "x_mse" (not weighted). Shape: x, target (B, ...), log_snr (B,) -> ()."""
        with torch.autocast(x.device.type, enabled=False):
            gap = x.to(torch.promote_types(x.dtype, torch.float32)) - target
            error = gap.square().flatten(1).mean(1)
            loss = (self.weight(log_snr).to(error.dtype) * error).mean()
        return loss, {"loss": loss.detach(), "x_mse": error.detach().mean()}


def trainable(network: nn.Module, name: str = "student") -> list[dict[str, Any]]:
    """One optimiser group of what requires a gradient. Raises ValueError, naming it, if nothing does."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{name} has no parameter that requires a gradient: call {name}.requires_grad_(True)")
    return [{"params": parameters}]


def refuse_shared(name: str, network: nn.Module, owner: str, other: nn.Module) -> None:
    """Raise ValueError if two networks that must differ hold a parameter in common."""
    owned = {id(p) for p in other.parameters()}
    if any(id(p) in owned for p in network.parameters()):
        raise ValueError(f"{name} shares weights with its {owner}: distil a copy, copy.deepcopy({owner})")


def assign_roles(teacher: Denoiser, student: nn.Module, name: str = "student") -> None:
    """Check that the student can be compared with the teacher, and freeze the teacher: eval mode, no gradients.

    Raises ValueError, calling the student `name`, if they share weights or know different schedules.
    """
    if isinstance(teacher, nn.Module):
        refuse_shared(name, student, "teacher", teacher)
    if teacher.schedule != student.schedule:
        raise ValueError(
            f"teacher has schedule {teacher.schedule}, {name} {student.schedule}: "
            f"use fewstep.schedules.reschedule(teacher, {name}.schedule)"
        )
    if isinstance(teacher, nn.Module):
        teacher.eval().requires_grad_(False)


class Training:
    """Networks by name, each with an optimiser of that name; one network unless a method says whose turn it is."""

    def __init__(self, **networks: nn.Module) -> None:
        for name, network in networks.items():
            trainable(network, name)
        self.networks: dict[str, nn.Module] = networks

    def param_groups(self) -> dict[str, list[dict[str, Any]]]:
        """One group for each network's optimiser: what of it requires a gradient."""
        return {name: trainable(network, name) for name, network in self.networks.items()}

    def active(self, step: int) -> str:
        """The only optimiser."""
        (name,) = self.networks
        return name


class Regression(Training, ABC):
    """A method that regresses the x of one network on targets; `draw` and `targets` are its own."""

    def __init__(self, schedule: Schedule, weight: str, **network: nn.Module) -> None:
        self.schedule, self.weighting = schedule, Weighting(weight)
        super().__init__(**network)

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """What the network should answer, without gradient. Shape: -> like batch.z."""

    def loss(self, batch: Batch, step: int, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted squared error of the network's x; the targets are computed unless given."""
        target = self.targets(batch) if targets is None else targets
        x = self.networks[self.active(step)](batch.z, batch.t, batch.cond, batch.w)
        return self.weighting(x, target, self.schedule.log_snr(batch.t))
