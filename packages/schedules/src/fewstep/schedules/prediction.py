"""What networks predict, to and from the clean image x, for any alpha and sigma."""

from typing import Literal, get_args

from torch import Tensor

from fewstep.schedules.schedule import Schedule, expand, wide

Prediction = Literal["x", "eps", "v", "flow"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def _check(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction={prediction!r} is unknown; known: {', '.join(PREDICTIONS)}")


def to_x(output: Tensor, z: Tensor, t: Tensor, schedule: Schedule, prediction: Prediction) -> Tensor:
    """Convert a network's output to the estimate of x.

    With z = alpha x + sigma eps: v = alpha eps - sigma x (arXiv 2202.00512, app. D), flow = eps - x (arXiv 2209.03003,
    the velocity from data to noise). Solved without alpha^2 + sigma^2 = 1, so VE and flow schedules convert too.

    Shape: output, z (B, ...), t (B,) -> (B, ...), float32 or wider.

    Raises:
        ValueError: for an unknown prediction.
    """
    _check(prediction)
    output, z = wide(output), wide(z)
    if prediction == "x":
        return output
    alpha, sigma = (expand(a, z) for a in schedule.alpha_sigma(t))
    if prediction == "eps":
        return (z - sigma * output) / alpha
    if prediction == "v":
        return (alpha * z - sigma * output) / (alpha.square() + sigma.square())
    return (z - sigma * output) / (alpha + sigma)


def from_x(x: Tensor, z: Tensor, t: Tensor, schedule: Schedule, prediction: Prediction) -> Tensor:
    """Convert an estimate of x to what a network with this prediction would have put out; the inverse of `to_x`.

    Shape: x, z (B, ...), t (B,) -> (B, ...), float32 or wider.

    Raises:
        ValueError: for an unknown prediction.
    """
    _check(prediction)
    x, z = wide(x), wide(z)
    if prediction == "x":
        return x
    alpha, sigma = (expand(a, z) for a in schedule.alpha_sigma(t))
    eps = (z - alpha * x) / sigma
    if prediction == "eps":
        return eps
    return alpha * eps - sigma * x if prediction == "v" else eps - x
