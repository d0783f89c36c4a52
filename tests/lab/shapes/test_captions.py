"""Captions say what is there, in many ways, and mean what they say."""

import itertools

import pytest
import torch

from fewstep.lab.shapes import Meaning, Mention, Thing, World, caption, parse, sample_scenes
from fewstep.lab.shapes.captions import DRAWS, TEMPLATES
from fewstep.schedules import seeded_uniform

CIRCLE, SQUARE = Thing("circle", "red", "large", 8, 15, 5.5), Thing("square", "blue", "small", 24, 18, 3)


def test_what_is_said_is_what_is_meant() -> None:
    """A phrasing that is read back as another relation would turn right pictures into wrong ones."""
    scenes = sample_scenes(World(), 0, 0, torch.arange(1500))
    draws = seeded_uniform(torch.arange(1500), (DRAWS,)).tolist()
    made = [caption(scene, u) for scene, u in zip(scenes, draws, strict=True)]
    assert all(parse(text) == meaning for text, meaning in made)
    assert len({text for text, _ in made}) > 1000
    for scene, (_, meaning) in zip(scenes, made, strict=True):
        assert {(m.colour, m.shape) for m in meaning.objects} == {(t.colour, t.shape) for t in scene}


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("a large red circle left of a small blue square",
         Meaning((Mention("red", "circle", "large"), Mention("blue", "square", "small")), "left")),
        ("A little blue square with a red circle above it.",
         Meaning((Mention("red", "circle"), Mention("blue", "square", "small")), "above")),
        ("a big green triangle in the bottom left", Meaning((Mention("green", "triangle", "large"),), None,
                                                            "bottom left")),
        ("a red circle, and a blue square under a green square",
         Meaning((Mention("blue", "square"), Mention("green", "square"), Mention("red", "circle")), "below")),
    ],
)  # fmt: skip
def test_meanings_written_by_hand(text: str, meaning: Meaning) -> None:
    """The parser against sentences that it did not make itself."""
    assert parse(text) == meaning


def test_relations_are_true_of_the_scene() -> None:
    """Captions with left and right exchanged would teach, and measure, the opposite."""
    found = set()
    for u in itertools.product((0.1, 0.9), *[[0.05, 0.3, 0.5, 0.95]] * 2, *[[0.1]] * 5, (0.1, 0.9)):
        _, meaning = caption((CIRCLE, SQUARE), u)
        if meaning.relation:
            found.add((meaning.objects[0].shape, meaning.relation))
    assert found == {("circle", "left"), ("square", "right")}


@pytest.mark.parametrize("text", ["", "a red dog", "a red circle left a blue square", "two red circles"])
def test_other_words_are_refused(text: str) -> None:
    """What is not understood must not count as understood."""
    with pytest.raises(ValueError, match="is none that captioned shapes"):
        parse(text)


def test_every_phrasing_is_used() -> None:
    """A template that cannot be drawn, or placed last by mistake, is never trained on."""
    for count, templates in TEMPLATES.items():
        scene = (Thing("circle", "red", "large", 8, 8, 5.5), SQUARE, Thing("triangle", "green", "small", 8, 26, 3))
        draws = [[0.1, (i + 0.5) / len(templates), *[0.1] * 7] for i in range(len(templates))]
        texts = {caption(scene[:count], u)[0] for u in draws}
        assert len(texts) == len(templates)
