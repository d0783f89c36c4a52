"""Tensors of images as PNGs: enlarged pixel by pixel, never blurred."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]
SMALLEST = 48  # pixels: smaller images are enlarged by a whole factor to at least this


def to_levels(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1], clamped to that, as uint8; C is 1 or 3, and 3 in the result."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


def to_bytes(images: Tensor) -> Pixels:
    """`to_levels` with the colours last: (N, C, H, W) in [-1, 1] as (N, H, W, 3) bytes."""
    pixels: Pixels = to_levels(images).permute(0, 2, 3, 1).numpy()
    return pixels


def enlarged(pixels: Pixels, factor: int | None = None) -> Pixels:
    """(N, H, W, C) with every pixel repeated `factor` times each way; None: until images are SMALLEST wide."""
    factor = factor or -(-SMALLEST // pixels.shape[2])
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def tile(pixels: Pixels, columns: int, gap: int = 4) -> Pixels:
    """(N, H, W, C) as one picture, row by row, on white."""
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def write_png(path: Path, pixels: Pixels) -> None:
    """Write one picture (H, W, C)."""
    Image.fromarray(pixels).save(path, format="PNG")
