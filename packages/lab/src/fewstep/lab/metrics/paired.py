"""Distances between images that were made from the same noise: paired error, guidance response."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PairedError(NamedTuple):
    """Root mean square pixel error of paired images, its standard error, and the number of pairs."""

    rmse: float
    stderr: float
    pairs: int


def squared_errors(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared pixel difference of each pair, both clamped to [-1, 1]: (B, C, H, W) twice -> (B,) float64.

    Raises ValueError when the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired images must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return (a.clamp(-1, 1).double() - b.clamp(-1, 1).double()).square().flatten(1).mean(1)


def paired_error(squared: Tensor) -> PairedError:
    """The paired error, sqrt of the mean over pairs and pixels, from `squared_errors` (B,).

    Pixels span [-1, 1], so 2 is the largest error there is. The standard error is that of the mean square, carried
    through the square root (delta method).
    """
    rmse = float(squared.mean().sqrt())
    spread = float(squared.std()) if len(squared) > 1 else 0.0
    return PairedError(rmse, spread / (2 * rmse * len(squared) ** 0.5) if rmse > 0 else 0.0, len(squared))


def guidance_response(guided: Tensor, unguided: Tensor) -> float:
    """How far guidance moves samples: mean over images of the RMSE between w > 0 and w = 0 from the same noise.

    Both (B, C, H, W), clamped to [-1, 1] first. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    return float(squared_errors(guided, unguided).sqrt().mean())


def class_accuracy(logits: Tensor, classes: Tensor) -> float:
    """Share in [0, 1] of images that the judge, with logits (N, K), takes for their class (N,)."""
    return float((logits.argmax(1) == classes.to(logits.device)).to(torch.float64).mean())
