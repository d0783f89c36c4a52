"""From a picture to a square of bytes: the ways in which papers bring ImageNet to 64 x 64.

Nothing here or in `reader` imports torch: worker processes are small and start at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")  # of files that are images
MODES = {1: "L", 3: "RGB"}  # channels -> of Pillow

Pixels = NDArray[np.uint8]


def square(picture: Image.Image, size: int, channels: int, method: str) -> Pixels:
    """The picture's bytes (channels, size, size): on white where it is transparent, resized where it is not that size.

    method: a key of `METHODS`.
    """
    flat = on_white(picture).convert(MODES[channels])
    if flat.size != (size, size):
        flat = Image.fromarray(METHODS[method](flat, size))
    return np.asarray(flat).reshape(size, size, channels).transpose(2, 0, 1)


def on_white(picture: Image.Image) -> Image.Image:
    """The picture without transparency."""
    if not picture.has_transparency_data:
        return picture
    clear = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear)


def area(picture: Image.Image, size: int) -> Pixels:
    """The middle square; each new pixel is the mean of the area that it covers, pixels cut at its border in proportion.

    As the code of progressive distillation has it (arXiv 2202.00512: central square, `tf.image.resize(..., "area")`).
    """
    side = min(picture.size)
    left, top = picture.width // 2 - side // 2, picture.height // 2 - side // 2
    pixels = np.asarray(picture.crop((left, top, left + side, top + side)), np.float32).reshape(side, side, -1)
    weights = _overlaps(side, size)
    rows = (weights @ pixels.reshape(side, -1)).reshape(size, side, -1)
    made = weights @ rows  # over the second dimension, for each row
    return _bytes(made if made.shape[-1] > 1 else made[..., 0])


@lru_cache(maxsize=32)
def _overlaps(side: int, size: int) -> NDArray[np.float32]:
    """Share (size, side) of each new pixel that lies on each old one; rows sum to 1."""
    borders = np.arange(size + 1) * (side / size)
    olds = np.arange(side)
    shared = np.minimum(borders[1:, None], olds + 1) - np.maximum(borders[:-1, None], olds)
    return (shared.clip(0) * (size / side)).astype(np.float32)


def _bytes(values: NDArray[np.float32]) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)


def adm(picture: Image.Image, size: int) -> Pixels:
    """Halved by Pillow's BOX while twice too large, then BICUBIC to the size, then the middle square.

    As guided-diffusion (ADM, arXiv 2105.05233) and DiT prepare ImageNet.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def box(picture: Image.Image, size: int) -> Pixels:
    """The whole picture, squeezed to a square by Pillow's BOX, as downsampled ImageNet (arXiv 1707.08819) was made."""
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


METHODS: dict[str, Callable[[Image.Image, int], Pixels]] = {"area": area, "adm": adm, "box": box}
