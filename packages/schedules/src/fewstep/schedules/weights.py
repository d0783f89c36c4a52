"""Loss weights on the squared error of x, as functions of the log-SNR (arXiv 2202.00512, section 4).

Shape: any -> same, float32 or wider.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.schedules.schedule import wide


def snr(log_snr: Tensor) -> Tensor:
    """Weight e^lambda: the squared error of eps."""
    return wide(log_snr).exp()


def truncated_snr(log_snr: Tensor) -> Tensor:
    """Weight max(e^lambda, 1): never blind at high noise; the papers' choice for distillation."""
    return wide(log_snr).exp().clamp(min=1.0)


def snr_plus_one(log_snr: Tensor) -> Tensor:
    """Weight e^lambda + 1: the squared error of v."""
    return wide(log_snr).exp() + 1


def edm_weight(log_snr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = e^lambda + sigma_data^-2 (arXiv 2206.00364, tab. 1)."""
    return wide(log_snr).exp() + sigma_data**-2


def flat(log_snr: Tensor) -> Tensor:
    """Weight 1."""
    return torch.ones_like(wide(log_snr))


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (snr, truncated_snr, snr_plus_one, edm_weight, flat)
}


def loss_weight(name: str) -> Callable[[Tensor], Tensor]:
    """Look up a weight by its name.

    Raises:
        ValueError: for an unknown name, naming those known.
    """
    if name not in WEIGHTS:
        raise ValueError(f"weight={name!r} is unknown; known: {', '.join(WEIGHTS)}")
    return WEIGHTS[name]
