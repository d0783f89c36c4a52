"""Checks of single values of a config; what they raise is one line that names key, value and what would be right."""

import difflib
from collections.abc import Collection
from typing import Any

from fewstep.lab.config import ClassifierConfig, Config, ConfigError, HalveConfig, StageConfig
from fewstep.schedules import Schedule, loss_weight, schedule_from_config


def needs_one(key: str, stage: StageConfig, config: Config, *kinds: str) -> Any:
    """The only stage of these kinds among those that `stage` needs."""
    found = [config.stages[need] for need in stage.needs if config.stages[need].kind in kinds]
    require(len(found) == 1, f"{key}.needs", stage.needs, f"exactly one stage of kind {' or '.join(kinds)}")
    return found[0]


def may_need(key: str, stage: StageConfig, config: Config, *kinds: str) -> Any:
    """The only stage of these kinds among those that `stage` needs, None without any; more than one are refused."""
    asked = any(config.stages[need].kind in kinds for need in stage.needs)
    return needs_one(key, stage, config, *kinds) if asked else None


def few_samples(stage: Any, config: Config) -> tuple[str, int, int] | None:
    """(key, samples, features) where a measuring stage takes FID of fewer samples than its judge has features."""
    judges = [config.stages[need] for need in stage.needs if config.stages[need].kind == "classifier"]
    if getattr(stage, "features", ""):
        judges = []  # of published extractors, which the stage looks at before it samples
    counts = {f"stages.{stage.name}.num_samples": stage.num_samples, "data.heldout": config.data.heldout}
    if getattr(stage, "curve_samples", 0):
        counts[f"stages.{stage.name}.curve_samples"] = stage.curve_samples
    for judge in judges:
        assert isinstance(judge, ClassifierConfig)
        for key, count in counts.items():
            if count < judge.features:
                return key, count, judge.features
    return None


def check_samples(stage: Any, config: Config) -> None:
    """FID is of at least as many samples as features, unless `allow_few_samples` is set."""
    found = few_samples(stage, config)
    if found is not None and not stage.allow_few_samples:
        key, count, features = found
        right = f"{features} or more, the judge's features: FID of fewer is mostly a matter of how few"
        raise ConfigError(f"{key}={count}: must be {right}; or set stages.{stage.name}.allow_few_samples=true")


def trained_range(halve: HalveConfig, config: Config) -> tuple[float, float]:
    """The w that its students are trained for, (w_min, w_max): its own or that of stage one, which it needs.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    low, high = halve.w_range or needs_one(f"stages.{halve.name}", halve, config, "guide").w_range
    return low, high


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
