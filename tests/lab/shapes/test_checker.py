"""The checker: right on true pictures, also soft and noisy ones; wrong captions are wrong, unknown things unknown."""

import pytest
import torch
from scipy import ndimage

from fewstep.lab.captioned import shapes_split
from fewstep.lab.data import Split
from fewstep.lab.metrics import wilson
from fewstep.lab.shapes import Meaning, Mention, Score, Thing, World, parse, read, render, score
from fewstep.lab.shapes.captions import RELATION_WORDS
from fewstep.lab.shapes.scene import COLOURS

WORLD = World(colours=tuple(COLOURS))
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@pytest.fixture(scope="module")
def split() -> Split:
    return shapes_split(WORLD, seed=5, part=0, count=700)


def accuracy(images: torch.Tensor, captions: tuple[str, ...]) -> float:
    found = read(images)
    return sum(score(parse(text), things).all for text, things in zip(captions, found, strict=True)) / len(found)


def test_true_pictures_are_right(split: Split) -> None:
    """The figure that every alignment rests on: 99.5 % is asked for."""
    assert accuracy(split.images, split.captions) >= 0.995


def test_soft_and_noisy_pictures_are_right(split: Split) -> None:
    """Decoded or sampled pictures are never exact: a checker that minds would measure sharpness."""
    images, captions = split.images[:250], split.captions[:250]
    soft = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, 0.8, 0.8)))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert accuracy(soft, captions) >= 0.98
    assert accuracy(images + 0.15 * noise, captions) >= 0.98
    assert accuracy((0.9 * soft + 0.1 * noise), captions) >= 0.97


def test_wrong_captions_are_wrong(split: Split) -> None:
    """One planted error in each caption: colour, shape, size, relation, an object too many or too few."""
    planted = dict.fromkeys(["colour", "shape", "size", "relation", "more", "fewer"], 0)
    for text, found in zip(split.captions, read(split.images), strict=True):
        meaning = parse(text)
        first, *others = meaning.objects
        there = {(m.colour, m.shape) for m in meaning.objects}
        free = [colour for colour in COLOURS if (colour, first.shape) not in there]
        wrong = {
            "colour": [Mention(free[0], first.shape, first.size), *others],
            "shape": [Mention(first.colour, "square" if first.shape != "square" else "circle", first.size), *others],
            "more": [first, *others, Mention("red", "circle")],
            "fewer": others,
        }
        if first.size:
            wrong["size"] = [Mention(first.colour, first.shape, "small" if first.size == "large" else "large"), *others]
        for what, objects in wrong.items():
            alike = sorted(map(str, objects)) == sorted(map(str, meaning.objects))
            planted[what] += score(Meaning(tuple(objects), meaning.relation), found).all and not alike
        if meaning.relation:
            opposite = Meaning(meaning.objects, OPPOSITE[meaning.relation])
            assert score(opposite, found).objects
            planted["relation"] += score(opposite, found).all
    assert planted["colour"] == planted["size"] == planted["relation"] == planted["more"] == planted["fewer"] == 0
    assert planted["shape"] <= 0.005 * len(split.captions)


def test_captions_of_other_pictures_are_mostly_wrong(split: Split) -> None:
    """A checker that finds everything in anything would score a model that ignores its prompt."""
    assert accuracy(split.images, (*split.captions[1:], split.captions[0])) < 0.02


def test_what_is_read_is_where_it_was_drawn() -> None:
    """Places and sizes against the scene itself, to a fraction of a pixel."""
    things = (Thing("triangle", "red", "large", 8.3, 10.2, 5.4), Thing("circle", "cyan", "small", 24.1, 22.7, 3.3))
    (found,) = read(render([things]))
    for mine, theirs in zip(found, things, strict=True):
        assert (mine.shape, mine.colour, mine.size) == (theirs.shape, theirs.colour, theirs.size)
        assert abs(mine.x - theirs.x) < 0.2
        assert abs(mine.y - theirs.y) < 0.2
        assert abs(mine.radius - theirs.radius) < 0.2


def test_things_that_are_no_shape() -> None:
    """Blobs and noise are what a bad sampler makes: they must not pass for a third of all shapes."""
    image = torch.full((1, 3, 32, 32), -1.0)
    image[0, 0, 4:28, 14:17] = 0.8  # a bar
    ((bar,),) = read(image)
    assert bar.shape == "unknown"
    assert read(torch.full((2, 3, 32, 32), -1.0)) == [(), ()]
    noise = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert accuracy(noise, ("a red circle",) * 40) == 0
    with pytest.raises(ValueError, match=r"the checker reads \(N, 3, 32, 32\)"):
        read(torch.zeros(1, 1, 8, 8))


def test_a_relation_on_the_other_axis_is_wrong() -> None:
    """'Left of' is not 'above': a model that only puts objects apart would get half of the relations right."""
    above = (Thing("circle", "red", "large", 15, 8, 5), Thing("square", "blue", "large", 17, 24, 5))
    (found,) = read(render([above]))
    said = (Mention("red", "circle"), Mention("blue", "square"))
    assert {name for name in RELATION_WORDS if score(Meaning(said, name), found).relation} == {"above"}
    assert score(Meaning(said[::-1], "below"), found) == Score(True, True, True, None)
    assert score(Meaning(said[:1], None, "middle"), found[:1]).place is False


def test_interval() -> None:
    """Against values of the formula that are published (Newcombe 1998, table I) and at the ends."""
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = wilson(15, 148)
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
    assert wilson(0, 20)[0] == 0.0
    assert round(wilson(0, 20)[1], 4) == 0.1611
    assert round(wilson(20, 20)[0], 4) == round(1 - 0.1611, 4)
    with pytest.raises(ValueError, match="successes=3 of trials=2"):
        wilson(3, 2)
