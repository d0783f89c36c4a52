"""Scenes as antialiased pictures: every object flat, on black."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.lab.shapes.scene import COLOURS, HALF_WIDTH, SIDE, Scene

BATCH = 2048  # scenes at once


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """The share in [0, 1] of every pixel that such an object covers.

    Shape: centre of the bounding box x, y and radius (N,), in pixels -> (N, SIDE, SIDE).
    """
    pixels = torch.arange(SIDE, dtype=x.dtype) + 0.5
    across, down = (pixels - x[:, None])[:, None, :], (pixels - y[:, None])[:, :, None]
    r = radius[:, None, None]
    if shape == "circle":
        return (r + 0.5 - torch.hypot(across, down)).clamp(0, 1)
    if shape == "square":
        return (r + 0.5 - across.abs()).clamp(0, 1) * (r + 0.5 - down.abs()).clamp(0, 1)
    slope = HALF_WIDTH["triangle"] / 2  # half-width gained per pixel down from the apex
    side = (slope * (down + r) - across.abs()) / math.hypot(1, slope)
    return (side + 0.5).clamp(0, 1) * (r - down + 0.5).clamp(0, 1)


def render(scenes: Sequence[Scene]) -> Tensor:
    """Pictures (N, 3, SIDE, SIDE) float32 in [-1, 1]."""
    parts = [_render(scenes[start : start + BATCH]) for start in range(0, len(scenes), BATCH)]
    return torch.cat(parts) if parts else torch.empty(0, 3, SIDE, SIDE)


def _render(scenes: Sequence[Scene]) -> Tensor:
    images = torch.zeros(len(scenes), 3, SIDE, SIDE)
    things = [(i, thing) for i, scene in enumerate(scenes) for thing in scene]
    for shape in sorted({thing.shape for _, thing in things}):
        those = [(i, thing) for i, thing in things if thing.shape == shape]
        place = torch.tensor([[thing.x, thing.y, thing.radius] for _, thing in those])
        colour = torch.tensor([COLOURS[thing.colour] for _, thing in those]) / 255
        painted = coverage(shape, *place.unbind(1))[:, None] * colour[:, :, None, None]
        images.index_add_(0, torch.tensor([i for i, _ in those]), painted)  # objects do not overlap
    return images.mul_(2).sub_(1)
