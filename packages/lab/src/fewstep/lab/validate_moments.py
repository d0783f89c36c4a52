"""What can be wrong with the stages of moment matching: the distillation, the teacher's sweep, the comparison."""

from fewstep.lab.checks import (
    check_range,
    check_samples,
    check_weight,
    may_need,
    needs_one,
    one_of,
    positive,
    require,
    trained_range,
)
from fewstep.lab.config import (
    CompareConfig,
    Config,
    MomentsConfig,
    RatioTarget,
    StageConfig,
    SweepConfig,
)
from fewstep.lab.validate_teachers import TEACHERS, check_distillable, check_other_schedule

ADAPTIVE = "adaptive"  # the weight that depends on more than the noise level
MOST_STEPS = (1, 2, 4, 8, 16)  # that moment matching is meant for
STUDENTS = ("moments", "halve")  # kinds of stages whose students can be compared
MEASURES = ("fid_heldout", "fid_train", "kid", "is", "precision", "recall", "accuracy", "spread")


def check_moments(key: str, stage: MomentsConfig, config: Config) -> None:
    """A distillation by moment matching."""
    teacher = check_distillable(key, stage, config)
    one_of(f"{key}.method", stage.method, ("alternating", "instant"))
    one_of(f"{key}.renoise", stage.renoise, ("posterior", "unconditional", "ddim"))
    right = "null: they depend on the student, so none can be computed before it"
    require(stage.targets is None, f"{key}.targets", stage.targets, right)
    clip = stage.clip
    require(clip is None or (len(clip) == 2 and clip[0] < clip[1]), f"{key}.clip", clip, "null or [low, high]")
    require(bool(stage.steps), f"{key}.steps", stage.steps, "at least one")
    for steps in stage.steps:
        one_of(f"{key}.steps", steps, MOST_STEPS)
    for name in ("updates_at", "weight_at"):
        for steps in getattr(stage, name):
            one_of(f"{key}.{name}", steps, MOST_STEPS)
    fewest = 1 if stage.method == "instant" else 2
    right = f"{fewest} or more: of alternating updates every second one is the student's"
    require(stage.updates >= fewest, f"{key}.updates", stage.updates, right)
    for steps, updates in stage.updates_at.items():
        require(updates >= fewest, f"{key}.updates_at.{steps}", updates, right)
    for steps, weight in stage.weight_at.items():
        if weight != ADAPTIVE:
            check_weight(f"{key}.weight_at.{steps}", weight)
    check_other_schedule(f"{key}.schedule", stage.schedule, teacher, config)
    if stage.w_range is not None:
        check_range(f"{key}.w_range", stage.w_range)
    _check_start(key, stage, config)
    if stage.method == "instant":
        _check_instant(key, stage)
        found = stage.preconditioner_batches
        right = f"1 or more: {teacher.name} was not trained here, so nothing is known of its gradients"
        require(teacher.kind != "pretrained" or found > 0, f"{key}.preconditioner_batches", found, right)


def _check_start(key: str, stage: MomentsConfig, config: Config) -> None:
    """Students that start from progressively distilled ones, which take w."""
    halve = may_need(key, stage, config, "halve")
    if halve is None:
        return
    right = f"with students that sample: those of {halve.name} are encoders"
    require(halve.students != "encoder", f"{key}.needs", stage.needs, right)
    for steps in stage.steps:
        require(steps in halve.steps, f"{key}.steps", steps, f"one of those that {halve.name} has: {halve.steps}")
    low, high = trained_range(halve, config)
    right = f"a range within that of {halve.name}, [{low:g}, {high:g}] (w = 0 is no guidance): its students take w"
    inside = stage.w_range is not None and low <= stage.w_range[0] and stage.w_range[1] <= high
    require(inside, f"{key}.w_range", stage.w_range, right)


def _check_instant(key: str, stage: MomentsConfig) -> None:
    right = "fp32 or bf16: the instant form's inner gradient has no loss scaling"
    require(stage.precision != "fp16", f"{key}.precision", stage.precision, right)
    right = "posterior with method=instant: ablations are for method=alternating"
    require(stage.renoise == "posterior", f"{key}.renoise", stage.renoise, right)
    part = stage.batch_size // stage.accumulate
    right = f"even in each of accumulate={stage.accumulate} parts: the instant form needs two halves"
    require(part % 2 == 0, f"{key}.batch_size", stage.batch_size, right)
    right = "ddp: the instant form's gradient by the teacher's parameters needs them whole (FSDP2 shards them)"
    require(stage.parallel == "ddp", f"{key}.parallel", stage.parallel, right)
    right = "2 or more, or null: the instant form needs two halves"
    require(stage.micro_batch is None or stage.micro_batch >= 2, f"{key}.micro_batch", stage.micro_batch, right)
    require(stage.preconditioner_batches >= 0, f"{key}.preconditioner_batches", stage.preconditioner_batches, ">= 0")
    require(not stage.compile, f"{key}.compile", "true", "false: the instant form differentiates forwards, uncompiled")


def check_sweep(key: str, stage: SweepConfig, config: Config) -> None:
    """The teacher's sweep."""
    positive(key, stage, "steps", "num_samples", "chunk", "kid_subsets")
    for name in ("noise_levels", "weights"):
        require(bool(getattr(stage, name)), f"{key}.{name}", [], "at least one")
    for level in stage.noise_levels:
        require(0 <= level <= 1, f"{key}.noise_levels", level, "in [0, 1]")
    require(all(w >= 0 for w in stage.weights), f"{key}.weights", stage.weights, "each 0 (no guidance) or more")
    needs_one(key, stage, config, "classifier")
    teacher = needs_one(key, stage, config, *TEACHERS)
    check_other_schedule(f"{key}.schedule", stage.schedule, teacher, config)
    check_samples(stage, config)


def check_compare(key: str, stage: CompareConfig, config: Config) -> None:
    """The comparison of students."""
    positive(key, stage, "num_samples", "sampling_seeds", "chunk", "kid_subsets")
    require(all(w >= 0 for w in stage.weights), f"{key}.weights", stage.weights, "each 0 (no guidance) or more")
    for kinds in (("classifier",), TEACHERS, ("sweep",)):
        needs_one(key, stage, config, *kinds)
    check_samples(stage, config)
    students = {need: config.stages[need].steps for need in stage.needs if config.stages[need].kind in STUDENTS}
    require(bool(students), f"{key}.needs", stage.needs, f"with a stage of kind {' or '.join(STUDENTS)}")
    for need in stage.needs:
        found = config.stages[need]
        if isinstance(found, MomentsConfig) and found.w_range is not None and found.w_range[0] < found.w_range[1]:
            low, high = found.w_range
            right = f"one of {key}.weights={stage.weights} within it: its students would not be measured"
            require(any(low <= w <= high for w in stage.weights), f"stages.{need}.w_range", found.w_range, right)
    for i, target in enumerate(stage.targets):
        _check_target(f"{key}.targets[{i}]", target, students)
        _check_alike(config.stages[target.stage], config.stages.get(target.over))


def _check_target(key: str, target: RatioTarget, students: dict[str, list[int]]) -> None:
    one_of(f"{key}.stage", target.stage, students)
    one_of(f"{key}.over", target.over, ("teacher", *students))
    for name in (target.stage, *({target.over} - {"teacher"})):
        one_of(f"{key}.steps", target.steps, students[name])
    one_of(f"{key}.measure", target.measure, MEASURES)
    limits = [target.at_most, target.at_least]
    require(limits.count(None) == 1, key, limits, "one of at_most and at_least")


def _check_alike(one: StageConfig, other: StageConfig | None) -> None:
    """Two forms of moment matching that are held against each other: at one problem."""
    if isinstance(one, MomentsConfig) and isinstance(other, MomentsConfig):
        for name in ("schedule", "weight", "weight_at", "weight_shift", "w_range"):
            right = f"{getattr(other, name)} as stages.{other.name}.{name}: the two are compared"
            require(getattr(one, name) == getattr(other, name), f"stages.{one.name}.{name}", getattr(one, name), right)
