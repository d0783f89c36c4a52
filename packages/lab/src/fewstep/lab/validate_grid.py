"""What can be wrong with the stages that measure a grid of w x steps, and encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.lab.checks import check_samples, needs_one, one_of, positive, require, trained_range
from fewstep.lab.config import (
    AlignmentTarget,
    Config,
    ConfigError,
    GridConfig,
    HalveConfig,
    InvertConfig,
    StageConfig,
)
from fewstep.lab.validate_teachers import TEACHERS

if TYPE_CHECKING:
    from fewstep.lab.metrics import Statistics

MEASURES = ("fid_heldout", "paired_error")
ALIGNMENT = ("all", "objects", "sizes", "relation", "place", "unseen")


def check_grid(key: str, stage: GridConfig, config: Config) -> None:
    """The grid of w x steps."""
    positive(key, stage, "num_samples", "sampling_seeds", "paired_noises", "chunk")
    require(bool(stage.steps), f"{key}.steps", stage.steps, "at least one number of steps")
    _check_weights(key, stage.weights)
    for name, sampler in (("reference", stage.reference), ("truth", stage.truth)):
        one_of(f"{key}.{name}.sampler", sampler.sampler, ("ddim", "dpmpp_2m", "heun"))
        positive(f"{key}.{name}", sampler, "steps")
    for w in stage.truth_weights:
        one_of(f"{key}.truth_weights", w, stage.weights)
    _check_features(key, stage, config)
    needs_one(key, stage, config, *TEACHERS)
    check_samples(stage, config)
    for need in stage.needs:
        right = f"without {need}: students of moment matching are measured by a stage of kind compare"
        require(config.stages[need].kind != "moments", f"{key}.needs", stage.needs, right)
    students = {name: found for name, found in halvings(stage, config).items() if found.students != "encoder"}
    require(bool(students), f"{key}.needs", stage.needs, "with a stage of kind halve that is not of encoders")
    for i, target in enumerate(stage.targets):
        one_of(f"{key}.targets[{i}].measure", target.measure, MEASURES)
        one_of(f"{key}.targets[{i}].w", target.w, stage.weights)
        for name in ("stage", "over"):
            one_of(f"{key}.targets[{i}].{name}", getattr(target, name), students)
            known = [steps for steps in students[getattr(target, name)].steps if steps in stage.steps]
            one_of(f"{key}.targets[{i}].steps", target.steps, known)
    for i, asked in enumerate(stage.alignment):
        _check_alignment(f"{key}.alignment[{i}]", asked, stage, config, students)


def _check_features(key: str, stage: GridConfig, config: Config) -> None:
    """Whose features FID is of, and what it is held against: files that are not there are found before any compute."""
    unread = config.data.name == "captioned_shapes" and not stage.keep_samples
    require(not unread, f"{key}.keep_samples", stage.keep_samples, "true: captions are read back from the samples")
    judges = [need for need in stage.needs if config.stages[need].kind == "classifier"]
    if not stage.features:
        right = f"with exactly one stage of kind classifier; or set {key}.features, e.g. to inception-v3-compat"
        require(len(judges) == 1, f"{key}.needs", stage.needs, right)
        for name in ("extractor_weights", "statistics"):
            given = getattr(stage, name)
            require(not given, f"{key}.{name}", given, f"left out without {key}.features, the name of an extractor")
        return
    from fewstep.lab.metrics import fewer_than_features

    (name, features), behind = _extractor(key, stage, config), config.data.heldout or None
    if stage.statistics:
        found = _statistics(f"{key}.statistics", Path(stage.statistics), name, config.data.image_size)
        features, behind = len(found.mean), found.count
    lacking = None if features is None else fewer_than_features(stage.num_samples, features, behind)
    right = f"of as many as features at least ({lacking}); or set {key}.allow_few_samples=true"
    require(lacking is None or stage.allow_few_samples, f"{key}.num_samples", stage.num_samples, right)


def _extractor(key: str, stage: GridConfig, config: Config) -> tuple[str, int | None]:
    """Its name, as statistics have it, and how many features it gives, if that is known without its weights."""
    from fewstep.lab.classifier import load_classifier
    from fewstep.lab.metrics.extractors import CLASSIFIER, NAMES, find_extractor
    from fewstep.lab.metrics.statistics import INCEPTION, INCEPTION_FEATURES

    weights = Path(stage.extractor_weights) if stage.extractor_weights else None
    find_extractor(stage.features, weights, (f"{key}.features=", f"{key}.extractor_weights="))
    if stage.features in NAMES:
        return stage.features, INCEPTION_FEATURES if stage.features == INCEPTION else None
    try:
        classifier = load_classifier(Path(stage.features))
    except ConfigError as error:
        raise ConfigError(f"{key}.features={error}") from error
    for name in ("channels", "num_classes"):
        value = getattr(config.data, name)
        right = f"a classifier of data.{name}={value}; this one has {classifier.config[name]}"
        require(classifier.config[name] == value, f"{key}.features", stage.features, right)
    return CLASSIFIER, classifier.head.in_features


def _statistics(key: str, path: Path, name: str, side: int) -> Statistics:
    """Statistics of that extractor, of images of that side; its weights are looked at when they are loaded."""
    from fewstep.lab.metrics import Statistics

    require(path.is_file(), key, path, "an .npz of statistics (ours, ADM's, EDM's)")
    try:
        found = Statistics.load(path)
        found.refuse_other(path, name, found.weights or "", side)
    except ValueError as error:
        raise ConfigError(f"{key}={error}") from error
    return found


def _check_alignment(
    key: str, target: AlignmentTarget, stage: GridConfig, config: Config, students: dict[str, HalveConfig]
) -> None:
    """What captions are asked to hold of the teacher, or of students."""
    require(config.data.name == "captioned_shapes", key, config.data.name, "left out: only captioned_shapes is checked")
    one_of(f"{key}.measure", target.measure, ALIGNMENT)
    one_of(f"{key}.w", target.w, stage.weights)
    teachers = [name for name in stage.needs if config.stages[name].kind in TEACHERS]
    one_of(f"{key}.stage", target.stage, teachers if target.steps == 0 else students)
    if target.steps:
        known = [steps for steps in students[target.stage].steps if steps in stage.steps]
        one_of(f"{key}.steps", target.steps, known)
    limits = [limit for limit in (target.at_least, target.below) if limit is not None]
    right = "one of at_least and below, in [0, 1]; below is of students"
    fits = len(limits) == 1 and 0 <= limits[0] <= 1 and not (target.below is not None and target.steps == 0)
    require(fits, key, f"at_least={target.at_least}, below={target.below}", right)


def check_invert(key: str, stage: InvertConfig, config: Config) -> None:
    """The comparison of encoders with reverse DDIM."""
    positive(key, stage, "images", "truth_steps", "chunk")
    require(stage.images <= config.data.heldout, f"{key}.images", stage.images, f"at most {config.data.heldout}")
    require(config.data.num_classes > 1, "data.num_classes", config.data.num_classes, f"2 or more for {key}")
    _check_weights(key, stage.weights)
    needs_one(key, stage, config, "classifier")
    needs_one(key, stage, config, *TEACHERS)
    found = halvings(stage, config)
    for students in ("encoder", "deterministic"):
        chains = [one for one in found.values() if one.students == students]
        require(len(chains) == 1, f"{key}.needs", stage.needs, f"exactly one stage of kind halve, students={students}")
        for steps in stage.steps:
            one_of(f"{key}.steps", steps, chains[0].steps)
        low, high = trained_range(chains[0], config)
        for w in stage.weights:
            right = f"in [{low:g}, {high:g}], for which {chains[0].name} is trained"
            require(low <= w <= high, f"{key}.weights", w, right)
    one_of(f"{key}.headline", stage.headline, stage.steps)


def halvings(stage: StageConfig, config: Config) -> dict[str, HalveConfig]:
    """The stages of kind halve that a stage needs, by name."""
    needed = {name: config.stages[name] for name in stage.needs}
    return {name: found for name, found in needed.items() if isinstance(found, HalveConfig)}


def _check_weights(key: str, weights: list[float]) -> None:
    right = "at least one, each 0 (no guidance) or more"
    require(bool(weights) and all(w >= 0 for w in weights), f"{key}.weights", weights, right)
