"""Captioned shapes: scenes of one to three objects, their images and captions, and a checker that reads images back."""

from fewstep.lab.shapes.captions import Meaning, Mention, caption, parse
from fewstep.lab.shapes.checker import Found, Score, read, score
from fewstep.lab.shapes.render import render
from fewstep.lab.shapes.scene import Thing, World, sample_scenes

__all__ = [
    "Found", "Meaning", "Mention", "Score", "Thing", "World", "caption", "parse", "read", "render", "sample_scenes",
    "score",
]
