"""Reads shapes, colours, sizes and places back from a picture: colour segmentation and moments, nothing learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from fewstep.lab.shapes.captions import Meaning, place_of
from fewstep.lab.shapes.render import coverage
from fewstep.lab.shapes.scene import COLOURS, RADII, SHAPES, SIDE, Thing

DARK = 0.3  # brightest channel in [0, 1] below which a pixel is background
SMALLEST = 9.0  # square pixels: what is smaller is a speck, no object (a small triangle has 19)
LIKENESS = 0.75  # least overlap (intersection over union) with the shape that an object is taken for
BLUR = 0.5  # pixels, what a picture is smoothed by first: single pixels of noise are no objects
AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.3}  # square radii
CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}  # radii below the centre of the bounding box
LARGE = sum(RADII["small"][1:] + RADII["large"][:1]) / 2  # pixels
SLACK = 1.0  # pixels by which bounding boxes may overlap on the axis of a relation

Found = Thing
"""An object as it was read; shape "unknown" if it is like none."""

BATCH = 512  # pictures at once
WITHIN_PICTURE = np.zeros((3, 3, 3), dtype=bool)  # pixels that touch, corners included
WITHIN_PICTURE[1] = True
CROSS = np.zeros((3, 3, 3), dtype=bool)
CROSS[1, 1] = CROSS[1, :, 1] = True
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32) / 255
DIRECTIONS = PALETTE / np.linalg.norm(PALETTE, axis=1, keepdims=True)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """What of a caption is true of a picture. `relation`, `place`: None where the caption says nothing of it.

    objects: just as many objects as are described, each of the right colour and shape. sizes: and of the right size
    where one is said. relation, place: right for those objects; False if the objects are not there.
    """

    objects: bool
    sizes: bool
    relation: bool | None
    place: bool | None

    @property
    def all(self) -> bool:
        """Whether everything that is said is true."""
        return self.objects and self.sizes and self.relation is not False and self.place is not False


def _blur(sigma: float) -> Tensor:
    """A Gaussian blur along one axis as a matrix (SIDE, SIDE)."""
    return torch.from_numpy(ndimage.gaussian_filter(np.eye(SIDE, dtype=np.float32), (sigma, 0), mode="constant"))


# A picture that is a little soft (decoded, or by few steps) has soft edges, not other shapes.
SOFTNESS = tuple(_blur(float(np.hypot(BLUR, more))) for more in (0.0, 0.6, 1.0))


def read(images: Tensor) -> list[tuple[Found, ...]]:
    """The objects in each picture, from left to right. Shape: images (N, 3, SIDE, SIDE) in about [-1, 1].

    Raises:
        ValueError: pictures of another shape.
    """
    if images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"images {tuple(images.shape)}: the checker reads (N, 3, {SIDE}, {SIDE})")
    pixels = images.detach().float().cpu().clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1).numpy()
    found: list[list[Found]] = [[] for _ in pixels]
    for start in range(0, len(pixels), BATCH):
        for i, thing in _find(pixels[start : start + BATCH]):
            found[start + i].append(thing)
    return [tuple(sorted(things, key=lambda thing: thing.x)) for things in found]


def score(meaning: Meaning, found: Sequence[Found]) -> Score:
    """How much of a caption holds: the best of all ways to tell which object is meant by which words."""
    said = meaning.relation, meaning.place
    wrong = Score(False, False, *(None if part is None else False for part in said))
    if len(found) != len(meaning.objects):
        return wrong
    ways = [_score(meaning, way) for way in itertools.permutations(found)]
    return max((way for way in ways if way.objects), key=lambda way: (way.all, way.sizes), default=wrong)


def _score(meaning: Meaning, things: Sequence[Found]) -> Score:
    pairs = list(zip(meaning.objects, things, strict=True))
    objects = all((said.colour, said.shape) == (thing.colour, thing.shape) for said, thing in pairs)
    sizes = all(said.size in (None, thing.size) for said, thing in pairs)
    relation = None if meaning.relation is None else objects and _is(meaning.relation, things[0], things[1])
    place = None if meaning.place is None else objects and _is_at(meaning.place, things[0])
    return Score(objects, objects and sizes, relation, place)


def _is(relation: str, a: Thing, b: Thing) -> bool:
    """Whether a's bounding box ends before b's begins."""
    if relation in ("left", "right"):
        ahead = b.x - a.x if relation == "left" else a.x - b.x
        return ahead > a.half_width + b.half_width - SLACK
    ahead = b.y - a.y if relation == "above" else a.y - b.y
    return ahead > a.radius + b.radius - SLACK


def _is_at(place: str, thing: Thing) -> bool:
    across, down = thing.x - SIDE / 2, thing.y - SIDE / 2
    if place == "middle":
        return max(abs(across), abs(down)) <= SIDE / 8
    return (down < 0) == place.startswith("top") and (across < 0) == place.endswith("left") and place_of(thing) != (
        "middle"
    )


def _find(pixels: Array) -> Iterator[tuple[int, Found]]:
    """(picture, object) for every connected region of one colour. Shape: pixels (N, H, W, 3) in [0, 1]."""
    smooth = ndimage.gaussian_filter(pixels, (0, BLUR, BLUR, 0))
    bright = np.maximum(np.maximum(smooth[..., 0], smooth[..., 1]), smooth[..., 2]) > DARK
    nearest = np.where(bright, (smooth @ DIRECTIONS.T).argmax(-1), -1)
    for colour, name in enumerate(COLOURS):
        of_colour = nearest == colour
        labels, count = ndimage.label(of_colour, structure=WITHIN_PICTURE)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        places = ndimage.find_objects(labels)
        kept = [i for i in range(count) if sizes[i] >= SMALLEST]
        if kept:
            pictures = np.array([places[i][0].start for i in kept])
            masks = labels[pictures] == np.array(kept)[:, None, None] + 1
            near = ndimage.binary_dilation(masks, structure=CROSS, iterations=2) & (masks | ~of_colour[pictures])
            share = np.clip(smooth[pictures] @ PALETTE[colour] / (PALETTE[colour] @ PALETTE[colour]), 0, 1)
            yield from zip(pictures.tolist(), _recognised(torch.from_numpy(share * near), name), strict=True)


def _recognised(share: Tensor, colour: str) -> list[Found]:
    """The shapes most like objects of one colour, given the share (K, H, W) of each pixel that each covers."""
    area = share.sum((1, 2))
    pixels = torch.arange(SIDE, dtype=share.dtype) + 0.5
    x, y = (share.sum(1) @ pixels) / area, (share.sum(2) @ pixels) / area
    radii = torch.stack([(area / AREA[shape]).sqrt() for shape in SHAPES])
    middles = torch.stack([y - CENTROID[shape] * radius for shape, radius in zip(SHAPES, radii, strict=True)])
    fits = torch.stack([
        _likeness(share, coverage(shape, x, middle, radius))
        for shape, middle, radius in zip(SHAPES, middles, radii, strict=True)
    ])  # fmt: skip
    likeness, best = fits.max(0)
    rows = torch.arange(len(share))
    found = (likeness.tolist(), best.tolist(), x.tolist(), middles[best, rows].tolist(), radii[best, rows].tolist())
    return [
        Thing(SHAPES[i] if like >= LIKENESS else "unknown", colour, "large" if r > LARGE else "small", x, y, r)
        for like, i, x, y, r in zip(*found, strict=True)
    ]


def _likeness(share: Tensor, template: Tensor) -> Tensor:
    """Overlap (K,), intersection over union, with a template as sharp or soft as suits best; both (K, H, W)."""
    overlaps = []
    for blur in SOFTNESS:
        soft = blur @ template @ blur.T
        overlaps.append(torch.minimum(share, soft).sum((1, 2)) / torch.maximum(share, soft).sum((1, 2)))
    return torch.stack(overlaps).amax(0)
