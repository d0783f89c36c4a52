"""Schedules given at discrete indices: DDPM's and Stable Diffusion's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.schedules.families import check_bounds, unit
from fewstep.schedules.schedule import Kind, Schedule, wide


@dataclass(frozen=True, init=False, repr=False)
class Discrete(Schedule):
    """A schedule trained on T indices (DDPM, Stable Diffusion): index i is t = (i + 1) / T, log-SNR linear between.

    t = 0 is log_snr_max, the clean image. Networks trained on indices receive t T - 1.

    Args:
        alphas_cumprod: alpha^2 of index 0 ... T - 1 in [0, 1], strictly decreasing; a tensor or a sequence.
        log_snr_min, log_snr_max: bounds; a last alpha of 0 (zero terminal SNR) becomes log_snr_min.

    Raises:
        ValueError: if alphas_cumprod is not such a row, or does not decrease strictly within the bounds.
    """

    alphas_cumprod: tuple[float, ...]
    log_snr_min: float = -20.0
    log_snr_max: float = 20.0
    _nodes: Tensor = field(init=False, compare=False)
    _cache: dict[tuple[torch.device, torch.dtype], Tensor] = field(init=False, compare=False)
    kind: ClassVar[Kind] = "vp"

    def __init__(
        self, alphas_cumprod: Tensor | Sequence[float], log_snr_min: float = -20.0, log_snr_max: float = 20.0
    ) -> None:
        check_bounds(log_snr_min, log_snr_max)
        alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        if alphas.ndim != 1 or not len(alphas) or not ((alphas >= 0) & (alphas <= 1)).all():
            raise ValueError(f"alphas_cumprod must be a row of values in [0, 1], got shape {tuple(alphas.shape)}")
        log_snr = (alphas.log() - torch.log1p(-alphas)).clamp(log_snr_min, log_snr_max)
        nodes = F.pad(log_snr, (1, 0), value=log_snr_max)         # log-SNR at t = 0, 1 / T, ..., 1
        if not (nodes.diff() < 0).all():
            raise ValueError(f"alphas_cumprod must decrease strictly within log-SNR ({log_snr_min}, {log_snr_max})")
        values = {"alphas_cumprod": tuple(alphas.tolist()), "log_snr_min": log_snr_min, "log_snr_max": log_snr_max}
        for name, value in (values | {"_nodes": nodes, "_cache": {}}).items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[0], self.alphas_cumprod[-1]
        return f"Discrete({len(self.alphas_cumprod)} indices, alphas_cumprod {first:.6g} ... {last:.6g})"

    def _nodes_like(self, x: Tensor) -> Tensor:
        """The nodes with x's device and dtype, kept since copying to a GPU at every step would wait for it."""
        key = (x.device, x.dtype)
        if key not in self._cache:
            self._cache[key] = self._nodes.to(x.device, x.dtype)
        return self._cache[key]

    def log_snr(self, t: Tensor) -> Tensor:
        """Return lambda_t. Shape: any -> same."""
        t, count = unit(t), len(self.alphas_cumprod)
        nodes, position = self._nodes_like(t), t * count
        low = position.detach().floor().long().clamp(max=count - 1)
        return torch.lerp(nodes[low], nodes[low + 1], position - low)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time with this log-SNR. Shape: any -> same."""
        log_snr, count = wide(log_snr), len(self.alphas_cumprod)
        nodes = self._nodes_like(log_snr)
        low = (torch.searchsorted(-nodes, -log_snr.detach()) - 1).clamp(0, count - 1)
        position = low + (nodes[low] - log_snr) / (nodes[low] - nodes[low + 1])
        return (position / count).clamp(0.0, 1.0)
