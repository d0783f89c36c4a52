"""What the methods share: draws, one estimate of x, the weighted error, and the roles of teacher and student."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.kernels import guided_update
from fewstep.schedules import Cond, Denoiser, Raw, loss_weight, seeded_noise, seeded_uniform

WRange = tuple[float, float]

# Streams of a sample's seed. Numbers of one stream are independent of each other too: see `uniforms`.
UNIFORM_STREAM, NOISE_STREAM = 1, 2


def uniforms(seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent U[0, 1) per sample, for its time and for its guidance weight (or dropping).

    Shape: seeds (B,) -> (B,), (B,).
    """
    first, second = seeded_uniform(seeds, (2,), stream=UNIFORM_STREAM).unbind(1)
    return first, second


def noise_like(x: Tensor, seeds: Tensor) -> Tensor:
    """N(0, I) shaped like x (B, ...), float32 or wider, each sample from its own seed."""
    return seeded_noise(seeds, x.shape[1:], stream=NOISE_STREAM).to(torch.promote_types(x.dtype, torch.float32))


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
    autocast says. `name` is one of fewstep.schedules' weights; an unknown one raises ValueError.
    """

    def __init__(self, name: str) -> None:
        self.name, self._weight = name, loss_weight(name)

    def __call__(self, x: Tensor, target: Tensor, log_snr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and logs "loss" and "x_mse" (not weighted). Shape: x, target (B, ...), log_snr (B,) -> ()."""
        with torch.autocast(x.device.type, enabled=False):
            gap = x.to(torch.promote_types(x.dtype, torch.float32)) - target
            error = gap.square().flatten(1).mean(1)
            loss = (self._weight(log_snr).to(error.dtype) * error).mean()
        return loss, {"loss": loss.detach(), "x_mse": error.detach().mean()}


def trainable(network: nn.Module) -> list[dict[str, Any]]:
    """One optimiser group of what requires a gradient. Raises ValueError if nothing does."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("student has no parameter that requires a gradient: call student.requires_grad_(True)")
    return [{"params": parameters}]


def assign_roles(teacher: Denoiser, student: nn.Module) -> None:
    """Check that the student can be compared with the teacher, and freeze the teacher: eval mode, no gradients.

    Raises ValueError if they share weights, know different schedules, or nothing of the student can be trained.
    """
    if isinstance(teacher, nn.Module):
        owned = {id(p) for p in teacher.parameters()}
        if any(id(p) in owned for p in student.parameters()):
            raise ValueError("student shares weights with its teacher: distil a copy, copy.deepcopy(teacher)")
    if teacher.schedule != student.schedule:
        raise ValueError(
            f"teacher has schedule {teacher.schedule}, student {student.schedule}: "
            "use fewstep.schedules.reschedule(teacher, student.schedule)"
        )
    trainable(student)
    if isinstance(teacher, nn.Module):
        teacher.eval().requires_grad_(False)
