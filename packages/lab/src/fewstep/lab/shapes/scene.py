"""What a scene holds: one to three objects, a function of (seed, part, index) alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.schedules import sample_seeds, seeded_uniform

SIDE = 32  # pixels
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (235, 45, 45), "green": (45, 185, 65), "blue": (50, 90, 240), "yellow": (240, 215, 45),
    "purple": (205, 60, 225), "cyan": (60, 215, 230),
}  # fmt: skip
RADII = {"small": (3.2, 3.7), "large": (5.3, 6.0)}  # pixels, half of an object's height
HALF_WIDTH = {"circle": 1.0, "square": 1.0, "triangle": 1.15}  # in radii
GAP = 2.0  # pixels between two objects' bounding boxes, on at least one axis; the same to the border is 1
TRIES = 48  # layouts drawn per scene; where all overlap, the last object is left out

# Parts of the data, each with draws of its own: what is trained on, what is held out, and unseen combinations.
TRAIN, HELDOUT, COMPOSITION = 0, 1, 2


@dataclass(frozen=True)
class Thing:
    """One object: centre (x, y) of its bounding box and radius, in pixels from the upper left corner."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def half_width(self) -> float:
        """Half the width of the bounding box; half its height is the radius."""
        return HALF_WIDTH[self.shape] * self.radius


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class World:
    """What scenes are made of. held_out: (colour, shape) of objects that only the part COMPOSITION contains.

    fewest_objects: as many as there is room for, if that is less. Objects of one scene differ in colour or shape, so
    that a caption can tell them apart.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow")
    sizes: tuple[str, ...] = ("small", "large")
    most_objects: int = 3
    held_out: tuple[tuple[str, str], ...] = ()
    fewest_objects: int = 1

    @cached_property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """Every (colour, shape); an object's class is its place here."""
        return tuple(itertools.product(self.colours, self.shapes))

    def kinds_beside(self, kind: tuple[str, str]) -> list[tuple[str, str]]:
        """The (colour, shape) that differ from `kind` in just one of both, without held-out combinations."""
        beside = [each for each in self.kinds if (each[0] == kind[0]) != (each[1] == kind[1])]
        return [each for each in beside if each not in self.held_out]

    def class_of(self, scene: Scene) -> int:
        """The class of the leftmost object: what the judge learns to see."""
        first = min(scene, key=lambda thing: thing.x)
        return self.kinds.index((first.colour, first.shape))


def sample_scenes(world: World, seed: int, part: int, indices: Tensor) -> list[Scene]:
    """The scenes of these indices (N,); each depends on world, seed, part and its own index alone.

    TRAIN and HELDOUT hold no held-out combination, the first object of every scene of COMPOSITION is one.
    """
    kinds, fewest, most = len(world.kinds), world.fewest_objects, world.most_objects
    u = seeded_uniform(sample_seeds(seed, part, indices), (kinds + 1 + most * (2 + 2 * TRIES),))
    order, rest = u[:, :kinds], u[:, kinds:]
    kind = _ranking(world, part, order)[:, :most]
    count = fewest + (rest[:, 0] * (most - fewest + 1)).long().clamp(max=most - fewest)
    size = (rest[:, 1 : 1 + most] * len(world.sizes)).long().clamp(max=len(world.sizes) - 1)
    ends = torch.tensor([RADII[name] for name in world.sizes])[size]
    radius = ends[..., 0] + rest[:, 1 + most : 1 + 2 * most] * (ends[..., 1] - ends[..., 0])
    wide = torch.tensor([HALF_WIDTH[shape] for _, shape in world.kinds])[kind] * radius
    half = torch.stack([wide, radius], dim=-1)  # (N, M, 2)
    layouts = rest[:, 1 + 2 * most :].reshape(-1, TRIES, most, 2)
    centres = (half + 1)[:, None] + layouts * (SIDE - 2 * half - 2)[:, None]  # (N, TRIES, M, 2)
    chosen, count = _first_without_overlap(centres, half, count)
    found = zip(kind.tolist(), size.tolist(), radius.tolist(), chosen.tolist(), count.tolist(), strict=True)
    return [
        tuple(
            Thing(world.kinds[k[i]][1], world.kinds[k[i]][0], world.sizes[s[i]], xy[i][0], xy[i][1], r[i])
            for i in range(n)
        )
        for k, s, r, xy, n in found
    ]


def _ranking(world: World, part: int, keys: Tensor) -> Tensor:
    """Kinds (N, K) in random order, without those that the part must not hold, or beginning with one that it must."""
    held = torch.tensor([kind in world.held_out for kind in world.kinds])
    if part != COMPOSITION:
        return (keys + held).argsort(dim=1)[:, : int((~held).sum())]
    first = (keys + ~held).argmin(dim=1, keepdim=True)
    return keys.scatter(1, first, -1.0).argsort(dim=1)


def _first_without_overlap(centres: Tensor, half: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The first layout (N, M, 2) whose objects keep apart, and how many objects it holds (N,)."""
    most = half.shape[1]
    fits = torch.ones(*centres.shape[:2], most, dtype=torch.bool)  # [..., n - 1]: the first n objects keep apart
    for j in range(1, most):
        fits[..., j] = fits[..., j - 1]
        for i in range(j):
            room = (half[:, i] + half[:, j])[:, None] + GAP
            fits[..., j] &= ((centres[:, :, i] - centres[:, :, j]).abs() >= room).any(-1)
    possible = torch.where(fits.any(1), torch.arange(1, most + 1), 1).amax(1)
    count = torch.minimum(count, possible)
    rows = torch.arange(len(count))
    first = fits[rows, :, count - 1].float().argmax(1)
    return centres[rows, first], count
