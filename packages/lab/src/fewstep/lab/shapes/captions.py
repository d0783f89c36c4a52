"""What is said of a scene, in several phrasings, and back from the words to what they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from fewstep.lab.shapes.scene import COLOURS, SHAPES, SIDE, Scene, Thing

SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
RELATION_WORDS = {
    "left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
    "above": ("above", "over"), "below": ("below", "under"),
}  # fmt: skip
SIDES = {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"}
PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
# {a}, {b}, {c}: objects; {rel}: of a to b, as words between them; {side}: the same, after b; {place}: where a is.
TEMPLATES = {
    1: ("{a}", "a picture of {a}", "there is {a}", "{a} in the {place}", "{a} alone"),
    2: ("{a} {rel} {b}", "{a} is {rel} {b}", "{b} with {a} {side}", "{a} and {b}", "a picture of {a} {rel} {b}"),
    3: ("{a} {rel} {b}, and {c}", "{a}, {b} and {c}", "{b} with {a} {side}, and {c}", "{c}, and {a} {rel} {b}"),
}
DRAWS = 9  # uniform numbers that a caption is chosen by


@dataclass(frozen=True)
class Mention:
    """An object as a caption describes it; size None: not said."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class Meaning:
    """What a caption says. relation: of the first object to the second. place: of the first, on the picture."""

    objects: tuple[Mention, ...]
    relation: str | None = None
    place: str | None = None


def relation_of(a: Thing, b: Thing) -> str:
    """Where a is seen from b, on the axis on which their bounding boxes are further apart."""
    across = abs(a.x - b.x) - a.half_width - b.half_width
    down = abs(a.y - b.y) - a.radius - b.radius
    if across >= down:
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def place_of(thing: Thing) -> str | None:
    """One of PLACES if it is clearly there, else None."""
    across, down = thing.x - SIDE / 2, thing.y - SIDE / 2
    if max(abs(across), abs(down)) <= SIDE / 10:
        return "middle"
    if min(abs(across), abs(down)) < SIDE / 8:
        return None
    return f"{'top' if down < 0 else 'bottom'} {'left' if across < 0 else 'right'}"


def caption(scene: Scene, u: Sequence[float]) -> tuple[str, Meaning]:
    """Words for the scene, chosen by DRAWS numbers in [0, 1), and what they mean."""
    first, *_ = things = scene if u[0] < 0.5 or len(scene) == 1 else (scene[1], scene[0], *scene[2:])
    place = place_of(first)
    templates = [t for t in TEMPLATES[len(scene)] if place is not None or "{place}" not in t]
    template = _pick(templates, u[1])
    mentions = [Mention(thing.colour, thing.shape, thing.size if u[2 + i] < 2 / 3 else None) for i, thing in
                enumerate(things)]  # fmt: skip
    said = {name: _words(mention, u[5 + i]) for i, (name, mention) in enumerate(zip("abc", mentions, strict=False))}
    relation = relation_of(things[0], things[1]) if "{rel}" in template or "{side}" in template else None
    if relation is not None:
        said |= {"rel": _pick(RELATION_WORDS[relation], u[8]), "side": SIDES[relation]}
    if "{place}" not in template:
        place = None
    return template.format(**said, place=place), Meaning(tuple(mentions), relation, place)


def parse(text: str) -> Meaning:
    """What a caption means. Raises ValueError for words that no phrasing here makes."""
    for pattern in _patterns():
        match = pattern.fullmatch(" ".join(text.lower().split()).rstrip("."))
        if match:
            return _meaning(match.groupdict())
    raise ValueError(f"caption {text!r} is none that captioned shapes are described with")


def _pick(choices: Sequence[str], u: float) -> str:
    return choices[min(int(u * len(choices)), len(choices) - 1)]


def _words(mention: Mention, u: float) -> str:
    size = f"{_pick(SIZE_WORDS[mention.size], u)} " if mention.size else ""
    return f"a {size}{mention.colour} {mention.shape}"


def _either(words: Sequence[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    sizes = _either([word for words in SIZE_WORDS.values() for word in words])
    parts = {
        name: f"an? (?:(?P<size_{name}>{sizes}) )?(?P<colour_{name}>{_either(list(COLOURS))}) "
        f"(?P<shape_{name}>{_either(SHAPES)})"
        for name in "abc"
    }
    parts["rel"] = f"(?P<rel>{_either([word for words in RELATION_WORDS.values() for word in words])})"
    parts["side"] = f"(?P<side>{_either(list(SIDES.values()))})"
    parts["place"] = f"(?P<place>{_either(PLACES)})"
    return tuple(re.compile(template.format(**parts)) for templates in TEMPLATES.values() for template in templates)


def _meaning(found: dict[str, str | None]) -> Meaning:
    sizes = {word: size for size, words in SIZE_WORDS.items() for word in words}
    relations = {word: name for name, words in RELATION_WORDS.items() for word in words}
    relations |= {words: name for name, words in SIDES.items()}
    mentions = [
        Mention(str(found[f"colour_{name}"]), str(found[f"shape_{name}"]), sizes.get(str(found[f"size_{name}"])))
        for name in "abc"
        if found.get(f"colour_{name}")
    ]
    said = found.get("rel") or found.get("side")
    return Meaning(tuple(mentions), relations[said] if said else None, found.get("place"))
