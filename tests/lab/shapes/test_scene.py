"""Scenes and pictures of captioned shapes: functions of (seed, index), apart, antialiased, without what is held out."""

import itertools
import math

import torch

from fewstep.lab.shapes import Thing, World, render, sample_scenes
from fewstep.lab.shapes.scene import COMPOSITION, GAP, HELDOUT, SIDE, TRAIN

WORLD = World(held_out=(("red", "triangle"), ("blue", "circle")))
INDICES = torch.arange(600)


def test_a_scene_depends_on_its_index_alone() -> None:
    """Scenes that depend on the batch would change with the number of processes, and a resumed run's data with it."""
    everything = sample_scenes(WORLD, 3, TRAIN, INDICES)
    assert sample_scenes(WORLD, 3, TRAIN, torch.tensor([411, 7])) == [everything[411], everything[7]]
    for seed, part in ((4, TRAIN), (3, HELDOUT)):
        assert sum(a == b for a, b in zip(everything, sample_scenes(WORLD, seed, part, INDICES), strict=True)) == 0


def test_objects_keep_apart_inside_the_picture_and_differ() -> None:
    """Objects that touch are one to the checker, and two alike are one to a caption."""
    scenes = sample_scenes(WORLD, 0, TRAIN, INDICES)
    counts = [sum(len(scene) == n for scene in scenes) for n in (1, 2, 3)]
    assert min(counts) > 100
    for scene in scenes:
        assert len({(thing.colour, thing.shape) for thing in scene}) == len(scene)
        for thing in scene:
            assert thing.half_width + 1 <= thing.x + 1e-3
            assert thing.x <= SIDE - thing.half_width - 1 + 1e-3
            assert thing.radius + 1 <= thing.y + 1e-3
            assert thing.y <= SIDE - thing.radius - 1 + 1e-3
        for a, b in itertools.combinations(scene, 2):
            across, down = abs(a.x - b.x) - a.half_width - b.half_width, abs(a.y - b.y) - a.radius - b.radius
            assert max(across, down) >= GAP - 1e-3


def test_scenes_have_the_fewest_objects_asked_for() -> None:
    """A data set of pairs for the sake of relations, half of which are single objects, would teach half as much."""
    counts = [len(scene) for scene in sample_scenes(World(sizes=("small",), fewest_objects=2), 0, TRAIN, INDICES)]
    assert set(counts) == {2, 3}
    assert 250 < counts.count(2) < 350


def test_held_out_combinations_are_met_in_composition_alone() -> None:
    """One red triangle in training, and composition is no longer tested."""
    for part in (TRAIN, HELDOUT):
        found = {(t.colour, t.shape) for scene in sample_scenes(WORLD, 0, part, INDICES) for t in scene}
        assert found == set(WORLD.kinds) - set(WORLD.held_out)
    scenes = sample_scenes(WORLD, 0, COMPOSITION, INDICES)
    assert {(s[0].colour, s[0].shape) for s in scenes} == set(WORLD.held_out)
    assert {(t.colour, t.shape) for s in scenes for t in s} == set(WORLD.kinds)


def test_pictures_have_the_areas_and_centres_of_their_objects() -> None:
    """Antialiasing that is off by half a pixel, or a shape of another size, would show in the moments."""
    exact = {"circle": math.pi, "square": 4.0, "triangle": 2.3}
    for shape, area in exact.items():
        for x, y, radius in ((13.0, 17.0, 5.5), (12.37, 16.81, 5.13), (20.5, 9.25, 3.4)):
            image = render([(Thing(shape, "yellow", "large", x, y, radius),)]).add(1).div(2)
            share = image[0, 0] / image[0, 0].max()
            pixels = torch.arange(SIDE) + 0.5
            low = 1 / 3 * radius if shape == "triangle" else 0.0
            assert abs(share.sum() / (area * radius**2) - 1) < 0.03
            assert abs((share.sum(0) @ pixels) / share.sum() - x) < 0.02
            assert abs((share.sum(1) @ pixels) / share.sum() - y - low) < 0.06
    assert render([]).shape == (0, 3, SIDE, SIDE)
