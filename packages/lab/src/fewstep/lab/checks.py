"""Checks of single values of a config; what they raise is one line that names key, value and what would be right."""

import difflib
from collections.abc import Collection
from typing import Any

from fewstep.lab.config import Config, ConfigError, StageConfig
from fewstep.schedules import Schedule, loss_weight, schedule_from_config


def needs_one(key: str, stage: StageConfig, config: Config, *kinds: str) -> Any:
    """The only stage of these kinds among those that `stage` needs."""
    found = [config.stages[need] for need in stage.needs if config.stages[need].kind in kinds]
    require(len(found) == 1, f"{key}.needs", stage.needs, f"exactly one stage of kind {' or '.join(kinds)}")
    return found[0]


def check_range(key: str, w_range: list[float]) -> None:
    """[w_min, w_max] with 0 <= w_min <= w_max; w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w)."""
    fits = len(w_range) == 2 and 0 <= w_range[0] <= w_range[1]
    require(fits, key, w_range, "[w_min, w_max] with 0 <= w_min <= w_max (w = 0 is no guidance)")


def positive(key: str, stage: object, *names: str) -> None:
    """Attributes of `stage` that are to be more than 0."""
    for name in names:
        require(getattr(stage, name) > 0, f"{key}.{name}", getattr(stage, name), "more than 0")


def one_of(key: str, value: Any, known: Collection[Any]) -> None:
    """A value out of those that are known; else the nearest of them is named."""
    if value not in known:
        raise ConfigError(f"{key}={value}: must be one of {', '.join(map(str, known))}{near(value, known, '')}")


def require(holds: bool, key: str, value: Any, right: str) -> None:
    """Raise ConfigError unless it holds; `right`: what the value must be."""
    if not holds:
        raise ConfigError(f"{key}={'null' if value is None else value}: must be {right}")


def near(value: Any, known: Collection[Any], otherwise: str | None = None) -> str:
    """"; did you mean ...?" with the nearest known name, else `otherwise`, else all of them."""
    found = difflib.get_close_matches(str(value), [str(name) for name in known], n=1)
    if found:
        return f"; did you mean {found[0]}?"
    return f"; known: {', '.join(map(str, known))}" if otherwise is None else otherwise


def check_schedule(key: str, schedule: dict[str, Any]) -> Schedule:
    """The schedule of these settings."""
    try:
        return schedule_from_config(schedule)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def check_weight(key: str, weight: str) -> None:
    """A loss weight of `fewstep.schedules`."""
    try:
        loss_weight(weight)
    except ValueError as error:
        raise ConfigError(f"{key}={weight}: {error}") from error
