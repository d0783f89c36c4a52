"""What a training loop needs to know of a distillation method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.schedules import Cond


@dataclass(frozen=True)
class Batch:
    """Inputs of a loss, drawn for B samples.

    Attributes:
        z: (B, ...), noisy images at times t.
        t: (B,) in [0, 1].
        cond: what the networks are given, leaves (B, ...).
        w: (B,) guidance weights, or None. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
        x, noise: (B, ...), what z was made of.
        seeds: (B,) int64, what was drawn from.
        s: (B,) in [0, 1], s <= t: the time that the student's step leads to, where a method looks at that.
        step_noise: (B, ...), N(0, I) for that step.
    """

    z: Tensor
    t: Tensor
    cond: Cond = None
    w: Tensor | None = None
    x: Tensor | None = None
    noise: Tensor | None = None
    seeds: Tensor | None = None
    s: Tensor | None = None
    step_noise: Tensor | None = None

    def __len__(self) -> int:
        return len(self.z)

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to each of its tensors."""
        return replace(self, **{f.name: _apply(function, getattr(self, f.name)) for f in fields(self)})

    def __getitem__(self, index: slice | Tensor) -> "Batch":
        return self.apply(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=True))

    def chunk(self, parts: int) -> list["Batch"]:
        """At most `parts` batches of consecutive samples, as torch.chunk cuts them: for gradient accumulation."""
        size = -(-len(self) // parts)
        return [self[i : i + size] for i in range(0, len(self), size)]


def _apply(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: function(tensor) for key, tensor in value.items()}
    return function(value) if isinstance(value, Tensor) else value


class Method(Protocol):
    """A loss with what it draws, the networks that it trains and their optimisers' parameter groups.

    A loss calls the networks through `networks`, so a loop may put a wrapped or compiled module there.
    """

    networks: dict[str, nn.Module]

    def param_groups(self) -> dict[str, list[dict[str, Any]]]:
        """Optimiser name -> parameter groups."""

    def active(self, step: int) -> str:
        """Name of the optimiser that update `step` belongs to."""

    def draw(self, x: Tensor, cond: Cond, seeds: Tensor, step: int) -> Batch:
        """Times, weights and noise for x: each a function of that sample's seed alone.

        Shape: x (B, ...), cond leaves (B, ...), seeds (B,) int64.
        """

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss of update `step` and what to log of it."""


class TargetMethod(Method, Protocol):
    """A method whose targets do not depend on the student: they can be computed beforehand and stored."""

    def targets(self, batch: Batch) -> Tensor:
        """What the student should answer, without gradient. Shape: -> like batch.z."""

    def loss(self, batch: Batch, step: int, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss and what to log of it; computes the targets unless given."""
