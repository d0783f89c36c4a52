"""Experiments for the tests of `lab`: the debug form of digits, and changes of single keys."""

import copy
from pathlib import Path
from typing import Any

from fewstep.lab.compose import compose
from fewstep.lab.config import Config

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
DIGITS, MOMENTS = EXPERIMENTS / "digits", EXPERIMENTS / "digits_moments"


def digits(*overrides: str) -> Config:
    """experiments/digits as the tests run it."""
    return compose(DIGITS, ["preset=debug", *overrides])


def moments(*overrides: str) -> Config:
    """experiments/digits_moments as the tests run it."""
    return compose(MOMENTS, ["preset=debug", *overrides])


def altered(config: Config, key: str, value: Any) -> Config:
    """A copy of `config` in which the dotted `key` has another value; unlike `digits`, unchecked and in no time."""
    changed = copy.deepcopy(config)
    *path, last = key.split(".")
    node: Any = changed
    for name in path:
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    if isinstance(node, dict):
        node[last] = value
    else:
        setattr(node, last, value)
    return changed
