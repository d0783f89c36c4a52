"""Data sets of images and captions, as splits like any other."""

from __future__ import annotations

from functools import lru_cache

import torch

from fewstep.lab.checks import one_of, require
from fewstep.lab.config import ConfigError, DataConfig, ShapesConfig
from fewstep.lab.data import Data, Split
from fewstep.lab.image_folder import check_folder, load_folder
from fewstep.lab.shapes import World, caption, render, sample_scenes
from fewstep.lab.shapes.captions import DRAWS
from fewstep.lab.shapes.scene import COLOURS, COMPOSITION, HELDOUT, RADII, SHAPES, SIDE, TRAIN
from fewstep.schedules import sample_seeds, seeded_uniform

CAPTION_STREAM = 1  # of a sample's seed; its scene is drawn from stream 0


def check_captioned(config: DataConfig) -> None:
    """Refuse, before any compute, what captioned data cannot be.

    Raises:
        ConfigError: names key, value and what would be right.
    """
    if config.name == "image_folder_with_captions":
        return check_folder(config)
    shapes = _shapes(config)
    for key, value in (("image_size", SIDE), ("channels", 3)):
        require(getattr(config, key) == value, f"data.{key}", getattr(config, key), f"{value} for {config.name}")
    for name, known in (("shapes", SHAPES), ("colours", tuple(COLOURS)), ("sizes", tuple(RADII))):
        found = getattr(shapes, name)
        for value in found:
            one_of(f"data.shapes.{name}", value, known)
        distinct = bool(found) and len(set(found)) == len(found)
        require(distinct, f"data.shapes.{name}", found, f"different ones of {', '.join(known)}")
    world = world_of(shapes)
    count = len(world.kinds)
    require(config.num_classes == count, "data.num_classes", config.num_classes, f"{count}, colours times shapes")
    for held in world.held_out:
        one_of("data.shapes.held_out", " ".join(held), [" ".join(kind) for kind in world.kinds])
    free = count - len(set(world.held_out))
    least = f"1 to 3, and at most the {free} combinations that are not held out"
    require(1 <= shapes.most_objects <= min(3, free), "data.shapes.most_objects", shapes.most_objects, least)
    fewest, right = shapes.fewest_objects, f"1 to {shapes.most_objects}, most_objects"
    require(1 <= fewest <= shapes.most_objects, "data.shapes.fewest_objects", fewest, right)
    require(shapes.count >= 1, "data.shapes.count", shapes.count, "1 or more")
    require(config.heldout >= count, "data.heldout", config.heldout, f"{count} or more")
    needs = "0, or 1 or more with combinations in held_out"
    fits = shapes.composition == 0 or (shapes.composition > 0 and bool(world.held_out))
    require(fits, "data.shapes.composition", shapes.composition, needs)


def load_captioned(config: DataConfig) -> Data:
    """The splits of a captioned data set that `check_captioned` has passed; the last one made is kept."""
    if config.name == "image_folder_with_captions":
        return load_folder(config)
    shapes = _shapes(config)
    return _captioned_shapes(world_of(shapes), shapes.seed, shapes.count, config.heldout, shapes.composition)


def world_of(shapes: ShapesConfig) -> World:
    """What its scenes are made of."""
    held = tuple((colour, shape) for colour, _, shape in (text.partition(" ") for text in shapes.held_out))
    kinds = tuple(shapes.shapes), tuple(shapes.colours), tuple(shapes.sizes)
    return World(*kinds, shapes.most_objects, held, shapes.fewest_objects)


def _shapes(config: DataConfig) -> ShapesConfig:
    if config.shapes is None:
        raise ConfigError(f"data.shapes=null: {config.name} needs it; use data={config.name}")
    return config.shapes


@lru_cache(maxsize=1)
def _captioned_shapes(world: World, seed: int, count: int, heldout: int, composition: int) -> Data:
    train, held = shapes_split(world, seed, TRAIN, count), shapes_split(world, seed, HELDOUT, heldout)
    return Data(train, held, shapes_split(world, seed, COMPOSITION, composition) if composition else None)


def shapes_split(world: World, seed: int, part: int, count: int) -> Split:
    """Images, captions and classes of samples 0, ..., count - 1 of a part, each a function of its index alone."""
    indices = torch.arange(count)
    scenes = sample_scenes(world, seed, part, indices)
    draws = seeded_uniform(sample_seeds(seed, part, indices), (DRAWS,), stream=CAPTION_STREAM).tolist()
    captions = tuple(caption(scene, u)[0] for scene, u in zip(scenes, draws, strict=True))
    return Split(render(scenes), torch.tensor([world.class_of(scene) for scene in scenes]), captions)
