"""Everything about a config that can be wrong and be said before any compute, one line each."""

import difflib
from collections.abc import Collection
from typing import Any

from fewstep.lab.config import (
    STAGES,
    ClassifierConfig,
    Config,
    ConfigError,
    EvaluateConfig,
    GuideConfig,
    HalveConfig,
    StageConfig,
    TeacherConfig,
    TrainingConfig,
)
from fewstep.lab.data import check_data
from fewstep.schedules import loss_weight, schedule_from_config


def validate(config: Config) -> None:
    """Check every value of `config` that the types alone cannot.

    Raises:
        ConfigError: for the first mistake found.
    """
    check_data(config.data)
    _one_of("prediction", config.prediction, ("x", "eps", "v", "flow"))
    _check_schedule(config.schedule)
    _require(config.threads is None or config.threads >= 1, "threads", config.threads, "1 or more, or null")
    _require(bool(config.stages), "stages", "{}", "at least one stage")
    stage_order(config)
    for name, stage in config.stages.items():
        _check_stage(f"stages.{name}", stage, config)


def untrained_weights(config: Config, name: str) -> str | None:
    """Which w the evaluation `name` asks for outside the range of the students that it judges, in a line; None if none.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    stage = config.stages[name]
    if not isinstance(stage, EvaluateConfig):
        return None
    judged = next(config.stages[need] for need in stage.needs if isinstance(config.stages[need], HalveConfig))
    low, high = judged.w_range or _needs_one(f"stages.{judged.name}", judged, config, "guide").w_range
    asked = sorted({*stage.weights, *stage.curve_weights})
    outside = [w for w in asked if not low <= w <= high]
    if not outside:
        return None
    text = f"stages.{name}: weights, curve_weights: w = {outside} lie outside the range [{low:g}, {high:g}]"
    return f"{text} that {judged.name} is trained for (w = 0 is no guidance)"


def stage_order(config: Config) -> list[str]:
    """Names of the stages such that each comes after what it needs, else as the config lists them.

    Raises:
        ConfigError: a need that is no stage, or stages that need each other in a circle.
    """
    order: list[str] = []
    for name in config.stages:
        order += _with_needs(name, config, order, path=())
    return order


def _with_needs(name: str, config: Config, done: Collection[str], path: tuple[str, ...]) -> list[str]:
    if name in path:
        raise ConfigError(f"stages.{name}.needs: a circle: {' -> '.join((*path, name))}")
    if name in done:
        return []
    order: list[str] = []
    for need in config.stages[name].needs:
        if need not in config.stages:
            raise ConfigError(f"stages.{name}.needs={need}: no such stage{_near(need, config.stages)}")
        order += _with_needs(need, config, [*done, *order], (*path, name))
    return [*order, name]


def _check_schedule(schedule: dict[str, Any]) -> None:
    try:
        schedule_from_config(schedule)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"schedule: {error}") from error


def _check_stage(key: str, stage: StageConfig, config: Config) -> None:
    _require(STAGES.get(stage.kind) is type(stage), f"{key}.kind", stage.kind, f"what defaults say, {kind_of(stage)}")
    if isinstance(stage, TrainingConfig):
        _check_training(key, stage)
    if isinstance(stage, ClassifierConfig):
        _positive(key, stage, "width")
        _require(stage.max_shift >= 0, f"{key}.max_shift", stage.max_shift, "0 or more pixels")
        _require(stage.noise >= 0, f"{key}.noise", stage.noise, "0 or more")
    if isinstance(stage, TeacherConfig):
        _require(0 <= stage.cond_drop < 1, f"{key}.cond_drop", stage.cond_drop, "in [0, 1)")
    if isinstance(stage, GuideConfig):
        _needs_one(key, stage, config, "teacher")
        _check_range(f"{key}.w_range", stage.w_range)
        _one_of(f"{key}.guidance_form", stage.guidance_form, ("normalized", "diffusers"))
    if isinstance(stage, HalveConfig):
        _check_halve(key, stage, config)
    if isinstance(stage, EvaluateConfig):
        _check_evaluate(key, stage, config)


def _check_training(key: str, stage: TrainingConfig) -> None:
    _positive(key, stage, "updates", "batch_size", "accumulate", "lr", "eps", "log_every")
    for name in ("warmup", "weight_decay", "checkpoint_updates", "checkpoint_seconds"):
        _require(getattr(stage, name) >= 0, f"{key}.{name}", getattr(stage, name), "0 or more")
    _one_of(f"{key}.anneal", stage.anneal, ("none", "linear", "cosine"))
    _one_of(f"{key}.precision", stage.precision, ("fp32", "bf16", "fp16"))
    divides = stage.batch_size % stage.accumulate == 0
    _require(divides, f"{key}.accumulate", stage.accumulate, f"a divisor of batch_size={stage.batch_size}")
    betas_fit = len(stage.betas) == 2 and all(0 <= beta < 1 for beta in stage.betas)
    _require(betas_fit, f"{key}.betas", stage.betas, "two numbers in [0, 1)")
    _require(stage.grad_clip is None or stage.grad_clip > 0, f"{key}.grad_clip", stage.grad_clip, "> 0, or null")
    _require(0 <= stage.ema_half_life <= 1, f"{key}.ema_half_life", stage.ema_half_life, "in [0, 1], of the run")
    decay = stage.ema_decay
    _require(decay is None or 0 <= decay < 1, f"{key}.ema_decay", decay, "in [0, 1), or null")
    _require(stage.dropout is None or 0 <= stage.dropout < 1, f"{key}.dropout", stage.dropout, "in [0, 1), or null")
    _check_weight(f"{key}.weight", stage.weight)


def _check_weight(key: str, weight: str) -> None:
    try:
        loss_weight(weight)
    except ValueError as error:
        raise ConfigError(f"{key}={weight}: {error}") from error


def _check_halve(key: str, stage: HalveConfig, config: Config) -> None:
    guide = _needs_one(key, stage, config, "guide")
    _require(bool(stage.steps) and stage.steps[-1] >= 1, f"{key}.steps", stage.steps, "at least one, each 1 or more")
    for before, steps in zip(stage.steps, stage.steps[1:], strict=False):
        if before != 2 * steps:
            reach = f"{before // 2} comes after {before}" if before % 2 == 0 else f"{before} cannot be halved"
            raise ConfigError(f"{key}.steps={stage.steps}: {steps} is not reached from {before} by halving ({reach})")
    for steps, updates in stage.updates_at.items():
        _one_of(f"{key}.updates_at", steps, stage.steps)
        _require(updates >= 1, f"{key}.updates_at.{steps}", updates, "1 or more")
    if stage.w_range is not None:
        _check_range(f"{key}.w_range", stage.w_range)
        low, high = guide.w_range
        inside = low <= stage.w_range[0] and stage.w_range[1] <= high
        _require(inside, f"{key}.w_range", stage.w_range, f"within the teacher's range {guide.w_range} ({guide.name})")


def _check_evaluate(key: str, stage: EvaluateConfig, config: Config) -> None:
    _positive(key, stage, "num_samples", "paired_noises", "chunk", "check_noises", "guide_steps", "kid_subsets")
    _positive(f"{key}.timing", stage.timing, "repeats", "teacher_steps")
    for name in ("weights", "check_weights", "curve_weights"):
        values = getattr(stage, name)
        _require(all(w >= 0 for w in values), f"{key}.{name}", values, "each 0 (no guidance) or more")
    _require(bool(stage.weights), f"{key}.weights", stage.weights, "at least one w (0 is no guidance)")
    for name in ("reference", "truth", "curve_reference"):
        sampler = getattr(stage, name)
        _one_of(f"{key}.{name}.sampler", sampler.sampler, ("ddim", "dpmpp_2m", "heun"))
        _positive(f"{key}.{name}", sampler, "steps")
    _one_of(f"{key}.headline", stage.headline, stage.steps)
    kinds = [config.stages[need].kind for need in stage.needs]
    for kind in ("classifier", "teacher", "guide", "halve"):
        _require(kind in kinds, f"{key}.needs", stage.needs, f"with a stage of kind {kind}")
    judged = next(config.stages[need].steps for need in stage.needs if config.stages[need].kind == "halve")
    for steps in stage.steps:
        _require(steps in judged, f"{key}.steps", steps, f"one of the trained students' {judged}")


def kind_of(stage: StageConfig) -> str:
    """The kind that goes with the stage's type."""
    return next(kind for kind, schema in STAGES.items() if schema is type(stage))


def _needs_one(key: str, stage: StageConfig, config: Config, kind: str) -> Any:
    found = [config.stages[need] for need in stage.needs if config.stages[need].kind == kind]
    _require(len(found) == 1, f"{key}.needs", stage.needs, f"exactly one stage of kind {kind}")
    return found[0]


def _check_range(key: str, w_range: list[float]) -> None:
    fits = len(w_range) == 2 and 0 <= w_range[0] <= w_range[1]
    _require(fits, key, w_range, "[w_min, w_max] with 0 <= w_min <= w_max (w = 0 is no guidance)")


def _positive(key: str, stage: object, *names: str) -> None:
    for name in names:
        _require(getattr(stage, name) > 0, f"{key}.{name}", getattr(stage, name), "more than 0")


def _one_of(key: str, value: Any, known: Collection[Any]) -> None:
    if value not in known:
        raise ConfigError(f"{key}={value}: must be one of {', '.join(map(str, known))}{_near(value, known, '')}")


def _require(holds: bool, key: str, value: Any, right: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={'null' if value is None else value}: must be {right}")


def _near(value: Any, known: Collection[Any], otherwise: str | None = None) -> str:
    near = difflib.get_close_matches(str(value), [str(name) for name in known], n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(map(str, known))}" if otherwise is None else otherwise
