"""Everything about a config that can be wrong and be said before any compute, one line each."""

from collections.abc import Callable, Collection
from typing import Any

from fewstep.lab.checks import (
    check_range,
    check_samples,
    check_schedule,
    check_weight,
    may_need,
    near,
    needs_one,
    one_of,
    positive,
    require,
    trained_range,
)
from fewstep.lab.cluster.config import problem
from fewstep.lab.config import (
    STAGES,
    AutoencoderConfig,
    ClassifierConfig,
    CompareConfig,
    Config,
    ConfigError,
    ConvertConfig,
    EditsConfig,
    EvaluateConfig,
    GridConfig,
    GuideConfig,
    HalveConfig,
    InvertConfig,
    MomentsConfig,
    PretrainedAutoencoderConfig,
    PretrainedConfig,
    StageConfig,
    SweepConfig,
    TeacherConfig,
    TextEncoderConfig,
    TrainingConfig,
)
from fewstep.lab.data import CAPTIONED, check_data
from fewstep.lab.text import PRETRAINED, TOKENIZERS
from fewstep.lab.validate_edits import check_edits
from fewstep.lab.validate_grid import check_grid, check_invert, halvings
from fewstep.lab.validate_latents import check_autoencoder, check_pretrained_autoencoder, check_space
from fewstep.lab.validate_moments import ADAPTIVE, check_compare, check_moments, check_sweep
from fewstep.lab.validate_teachers import TEACHERS, check_convert, check_distillable, check_pretrained, check_student


def validate(config: Config) -> None:
    """Check every value of `config` that the types alone cannot.

    Raises:
        ConfigError: for the first mistake found.
    """
    check_data(config.data)
    check_text(config)
    one_of("prediction", config.prediction, ("x", "eps", "v", "flow"))
    check_schedule("schedule", config.schedule)
    require(config.threads is None or config.threads >= 1, "threads", config.threads, "1 or more, or null")
    require(config.weights in (None, "bf16"), "weights", config.weights, "bf16, or null for float32")
    require(bool(config.stages), "stages", "{}", "at least one stage")
    stage_order(config)
    wrong = problem(config.cluster)
    if wrong is not None:
        raise ConfigError(wrong)
    check_space(config)
    for name, stage in config.stages.items():
        _check_stage(f"stages.{name}", stage, config)


def untrained_weights(config: Config, name: str) -> str | None:
    """Which w the evaluation `name` asks for outside the range of the students that it judges, in a line; None if none.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    stage = config.stages[name]
    if not isinstance(stage, EvaluateConfig):
        return None
    judged = next(found for found in halvings(stage, config).values() if found.students != "encoder")
    low, high = trained_range(judged, config)
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
            raise ConfigError(f"stages.{name}.needs={need}: no such stage{near(need, config.stages)}")
        order += _with_needs(need, config, [*done, *order], (*path, name))
    return [*order, name]


MEASURED_BY_CLASS = ("evaluate", "invert", "sweep", "compare", "report")  # kinds that know no captions


def check_text(config: Config) -> None:
    """Captioned data and a text encoder go together; what measures classes cannot measure captions."""
    captioned = config.data.name in CAPTIONED
    if config.text is None or not captioned:
        right = f"given for {config.data.name}, e.g. text=small" if captioned else f"null: {config.data.name} has none"
        return require(captioned == (config.text is not None), "text", config.text and "{...}", right)
    one_of("text.tokenizer", config.text.tokenizer, TOKENIZERS)
    kinds = [stage.kind for stage in config.stages.values()]
    has_encoder = config.text.tokenizer != PRETRAINED or ("pretrained" in kinds and "teacher" not in kinds)
    right = "bpe or bytes: only a teacher of kind pretrained brings an encoder"
    require(has_encoder, "text.tokenizer", config.text.tokenizer, right)
    positive("text", config.text, "width", "depth", "heads")
    require(config.text.length >= 2, "text.length", config.text.length, "2 or more: a token and the end")
    least = config.text.tokenizer != "bpe" or config.text.vocabulary >= 258
    require(least, "text.vocabulary", config.text.vocabulary, "258 or more: every byte and two reserved ones")
    divides = config.text.width % config.text.heads == 0
    require(divides, "text.heads", config.text.heads, f"a divisor of width={config.text.width}")
    for name, stage in config.stages.items():
        right = "one that knows captions: of measurements that is grid"
        require(stage.kind not in MEASURED_BY_CLASS, f"stages.{name}.kind", stage.kind, right)


def _check_stage(key: str, stage: StageConfig, config: Config) -> None:
    require(STAGES.get(stage.kind) is type(stage), f"{key}.kind", stage.kind, f"what defaults say, {kind_of(stage)}")
    for schema in reversed(type(stage).__mro__):  # what holds for every training comes first
        if schema in CHECKS:
            CHECKS[schema](key, stage, config)


def _check_training(key: str, stage: TrainingConfig, config: Config) -> None:
    positive(key, stage, "updates", "batch_size", "accumulate", "lr", "eps", "log_every")
    for name in ("warmup", "weight_decay", "checkpoint_updates", "checkpoint_seconds"):
        require(getattr(stage, name) >= 0, f"{key}.{name}", getattr(stage, name), "0 or more")
    right = "more than 0, or null for exactly `updates`"
    require(stage.seconds is None or stage.seconds > 0, f"{key}.seconds", stage.seconds, right)
    fewest = min([stage.updates, *getattr(stage, "updates_at", {}).values()])
    right = f"less than {fewest}, the fewest updates of a training here: lr would never be reached"
    require(stage.warmup == 0 or stage.warmup < fewest, f"{key}.warmup", stage.warmup, right)
    one_of(f"{key}.anneal", stage.anneal, ("none", "linear", "cosine"))
    one_of(f"{key}.precision", stage.precision, ("fp32", "bf16", "fp16"))
    one_of(f"{key}.parallel", stage.parallel, ("ddp", "fsdp"))
    sharded = stage.parallel == "fsdp"
    require(not (sharded and stage.precision == "fp16"), f"{key}.precision", "fp16", "fp32 or bf16 with parallel=fsdp")
    require(not (sharded and stage.compile), f"{key}.compile", "true", "false with parallel=fsdp")
    most = stage.micro_batch
    require(most is None or most >= 1, f"{key}.micro_batch", most, "1 or more, or null")
    divides = stage.batch_size % stage.accumulate == 0
    require(divides, f"{key}.accumulate", stage.accumulate, f"a divisor of batch_size={stage.batch_size}")
    betas_fit = len(stage.betas) == 2 and all(0 <= beta < 1 for beta in stage.betas)
    require(betas_fit, f"{key}.betas", stage.betas, "two numbers in [0, 1)")
    require(stage.grad_clip is None or stage.grad_clip > 0, f"{key}.grad_clip", stage.grad_clip, "> 0, or null")
    require(0 <= stage.ema_half_life <= 1, f"{key}.ema_half_life", stage.ema_half_life, "in [0, 1], of the run")
    decay = stage.ema_decay
    require(decay is None or 0 <= decay < 1, f"{key}.ema_decay", decay, "in [0, 1), or null")
    require(stage.dropout is None or 0 <= stage.dropout < 1, f"{key}.dropout", stage.dropout, "in [0, 1), or null")
    if not (isinstance(stage, MomentsConfig) and stage.weight == ADAPTIVE):
        check_weight(f"{key}.weight", stage.weight)


def _check_classifier(key: str, stage: ClassifierConfig, config: Config) -> None:
    positive(key, stage, "width")
    require(stage.max_shift >= 0, f"{key}.max_shift", stage.max_shift, "0 or more pixels")
    require(stage.noise >= 0, f"{key}.noise", stage.noise, "0 or more")


def _check_text_encoder(key: str, stage: TextEncoderConfig, config: Config) -> None:
    learns = config.text is not None and config.text.tokenizer != PRETRAINED
    right = "left out without a text encoder that learns, as text=small has"
    require(learns, f"{key}.kind", stage.kind, right)
    size = config.data.image_size
    require(1 <= stage.size <= size, f"{key}.size", stage.size, f"1 to {size} pixels, the side of the pictures")


def _check_teacher(key: str, stage: TeacherConfig, config: Config) -> None:
    may_need(key, stage, config, "text_encoder")
    require(0 <= stage.cond_drop < 1, f"{key}.cond_drop", stage.cond_drop, "in [0, 1)")


def _check_guide(key: str, stage: GuideConfig, config: Config) -> None:
    check_distillable(key, stage, config)
    check_student(key, stage, config)
    check_range(f"{key}.w_range", stage.w_range)
    one_of(f"{key}.guidance_form", stage.guidance_form, ("normalized", "diffusers"))


def _check_halve(key: str, stage: HalveConfig, config: Config) -> None:
    guide = needs_one(key, stage, config, "guide")
    may_need(key, stage, config, *TEACHERS)
    check_student(key, stage, config)
    one_of(f"{key}.students", stage.students, ("deterministic", "stochastic", "encoder"))
    require(bool(stage.steps) and stage.steps[-1] >= 1, f"{key}.steps", stage.steps, "at least one, each 1 or more")
    for before, steps in zip(stage.steps, stage.steps[1:], strict=False):
        if before != 2 * steps:
            reach = f"{before // 2} comes after {before}" if before % 2 == 0 else f"{before} cannot be halved"
            raise ConfigError(f"{key}.steps={stage.steps}: {steps} is not reached from {before} by halving ({reach})")
    for steps, updates in stage.updates_at.items():
        one_of(f"{key}.updates_at", steps, stage.steps)
        require(updates >= 1, f"{key}.updates_at.{steps}", updates, "1 or more")
    if stage.w_range is not None:
        check_range(f"{key}.w_range", stage.w_range)
        low, high = guide.w_range
        inside = low <= stage.w_range[0] and stage.w_range[1] <= high
        require(inside, f"{key}.w_range", stage.w_range, f"within the teacher's range {guide.w_range} ({guide.name})")


def _check_evaluate(key: str, stage: EvaluateConfig, config: Config) -> None:
    positive(key, stage, "num_samples", "paired_noises", "chunk", "check_noises", "guide_steps", "kid_subsets")
    positive(f"{key}.timing", stage.timing, "repeats", "teacher_steps")
    for name in ("weights", "check_weights", "curve_weights"):
        values = getattr(stage, name)
        require(all(w >= 0 for w in values), f"{key}.{name}", values, "each 0 (no guidance) or more")
    require(bool(stage.weights), f"{key}.weights", stage.weights, "at least one w (0 is no guidance)")
    for name in ("reference", "truth", "curve_reference"):
        sampler = getattr(stage, name)
        one_of(f"{key}.{name}.sampler", sampler.sampler, ("ddim", "dpmpp_2m", "heun"))
        positive(f"{key}.{name}", sampler, "steps")
    kinds = [config.stages[need].kind for need in stage.needs]
    for accepted in (("classifier",), TEACHERS, ("guide",), ("halve",)):
        right = f"with a stage of kind {' or '.join(accepted)}"
        require(any(kind in kinds for kind in accepted), f"{key}.needs", stage.needs, right)
    students = [found for found in halvings(stage, config).values() if found.students != "encoder"]
    require(bool(students), f"{key}.needs", stage.needs, "with a stage of kind halve that is not of encoders")
    judged = students[0].steps
    for steps in stage.steps:
        require(steps in judged, f"{key}.steps", steps, f"one of the trained students' {judged}")
    one_of(f"{key}.headline", stage.headline, stage.steps)
    check_samples(stage, config)


def kind_of(stage: StageConfig) -> str:
    """The kind that goes with the stage's type."""
    return next(kind for kind, schema in STAGES.items() if schema is type(stage))


# What is asked of stages of each type, and of types made from it.
CHECKS: dict[type, Callable[[str, Any, Config], None]] = {
    TrainingConfig: _check_training,
    ClassifierConfig: _check_classifier,
    AutoencoderConfig: check_autoencoder,
    PretrainedAutoencoderConfig: check_pretrained_autoencoder,
    TextEncoderConfig: _check_text_encoder,
    TeacherConfig: _check_teacher,
    PretrainedConfig: check_pretrained,
    ConvertConfig: check_convert,
    GuideConfig: _check_guide,
    HalveConfig: _check_halve,
    MomentsConfig: check_moments,
    SweepConfig: check_sweep,
    EvaluateConfig: _check_evaluate,
    GridConfig: check_grid,
    InvertConfig: check_invert,
    EditsConfig: check_edits,
    CompareConfig: check_compare,
}
