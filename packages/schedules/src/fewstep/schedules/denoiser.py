"""What samplers and distillation ask of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

from torch import Tensor

from fewstep.schedules.prediction import Prediction
from fewstep.schedules.schedule import Schedule

Cond = Tensor | Mapping[str, Tensor] | None
TrainedKind = Literal["teacher", "guided", "deterministic", "stochastic", "encoder", "moments"]


class Denoiser(Protocol):
    """Anything that maps a noisy z_t to an estimate of the clean x.

    It may also offer `raw(z, t, cond, w) -> Raw` and carry `trained: Trained`.
    """

    @property
    def schedule(self) -> Schedule:
        """The schedule that z and t refer to."""

    def __call__(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Tensor:
        """Return the estimate of x. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

        Shape: z (B, ...), t (B,), cond a tensor or dict of tensors with leading B, w None, float or (B,) -> like z,
        float32 or wider.
        """


class Raw(NamedTuple):
    """A network's outputs before conversion; hand it, unopened, to `fewstep.kernels.guided_update`.

    Attributes:
        cond_output: (B, ...), given the condition.
        uncond_output: (B, ...), given the null condition, or None where w is already inside or not wanted.
        prediction: what the outputs are: "x", "eps", "v" or "flow".
    """

    cond_output: Tensor
    uncond_output: Tensor | None
    prediction: Prediction


@dataclass(frozen=True)
class Trained:
    """What a denoiser was trained for; saved with it, checked by samplers.

    Attributes:
        kind: "teacher", "guided" (stage one), "deterministic", "stochastic", "encoder" or "moments".
        steps: the number of sampling steps that it was distilled to; None for any.
        w_range: (low, high) guidance weights seen in training; None if it takes no w. w = 0 is no guidance.
    """

    kind: TrainedKind
    steps: int | None = None
    w_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(TrainedKind):
            raise ValueError(f"trained kind={self.kind!r} is unknown; known: {', '.join(get_args(TrainedKind))}")
        if self.w_range is not None:                              # JSON gives lists
            object.__setattr__(self, "w_range", (float(self.w_range[0]), float(self.w_range[1])))
