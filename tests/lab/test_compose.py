"""Config errors are met before compute, in one line that says what would be right."""

from pathlib import Path

import pytest
from lab_configs import altered

from fewstep.lab.compose import compose
from fewstep.lab.config import STAGES, Config, ConfigError, ReportConfig
from fewstep.lab.stages.results import features_of
from fewstep.lab.validate import CHECKS, stage_order, untrained_weights, validate

DIGITS = Path(__file__).parents[2] / "experiments" / "digits"


def digits(*overrides: str) -> Config:
    return compose(DIGITS, ["preset=debug", *overrides])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.teacher.updats=3", "did you mean stages.teacher.updates?"),
        ("stages.tacher.updates=3", "did you mean stages.teacher?"),
        ("sead=3", "did you mean seed?"),
        ("updates=3", "did you mean stages.classifier.updates"),
        ("stages.evaluate.reference.stpes=3", "did you mean stages.evaluate.reference.steps?"),
        ("schedule.shfit=1", "did you mean schedule.shift?"),
        ("network.channels=24", "did you mean network.overrides.channels?"),
        ("network.chanels=24", "did you mean network.overrides.channels?"),
        ("stages.guide.student.network.width=8", "did you mean stages.guide.student.network.overrides.width?"),
        ("preset=ful", "known: debug, full, quickstart"),
        ("schedule=cosin", "known: cosine, karras, linear_beta, rectified_flow"),
        ("stages.teacher.updates=many", "'many' of type 'str' could not be converted to Integer"),
        ("stages.halve.steps=[16,8.5]", "stages.halve.steps[1]"),
        ("stages.teacher.updates", "not what hydra reads as key=value"),
        ("out=[1", "not what hydra reads as key=value"),
    ],
)
def test_misspelt_key_is_named_with_the_nearest_known_one(override: str, words: str) -> None:
    # Broken: a typo trains the default for an hour, or ends in hydra's page of search paths.
    with pytest.raises(ConfigError) as caught:
        digits(override)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("stages.halve.steps", [16, 6], "6 is not reached from 16 by halving (8 comes after 16)"),
        ("stages.halve.steps", [12, 6, 3, 1], "1 is not reached from 3 by halving (3 cannot be halved)"),
        ("stages.halve.steps", [], "at least one"),
        ("stages.halve.updates_at", {32: 9}, "stages.halve.updates_at=32"),
        ("stages.halve.w_range", [0.0, 9.0], "within the teacher's range [0.0, 4.0]"),
        ("stages.guide.w_range", [3.0, 1.0], "0 <= w_min <= w_max"),
        ("stages.guide.needs", [], "exactly one stage of kind teacher"),
        ("stages.guide.needs", ["tacher"], "did you mean teacher?"),
        ("stages.teacher.needs", ["halve"], "a circle: teacher -> halve -> guide -> teacher"),
        ("stages.teacher.weight", "trunc_snr", "known: snr, truncated_snr"),
        ("stages.teacher.anneal", "cosin", "did you mean cosine?"),
        ("stages.teacher.accumulate", 5, "a divisor of batch_size"),
        ("stages.teacher.updates", 0, "more than 0"),
        ("stages.teacher.warmup", 24, "less than 24, the fewest updates of a training here"),
        ("stages.halve.warmup", 8, "less than 8, the fewest updates"),
        ("stages.teacher.betas", [0.9], "two numbers in [0, 1)"),
        ("stages.teacher.cond_drop", 1.0, "in [0, 1)"),
        ("stages.evaluate.steps", [4, 32], "one of the trained students'"),
        ("stages.evaluate.steps", [3], "steps=3: must be one of the trained students"),
        ("stages.evaluate.num_samples", 15, "16 or more, the judge's features"),
        ("stages.evaluate.curve_samples", 15, "or set stages.evaluate.allow_few_samples=true"),
        ("stages.classifier.width", 21, "stages.evaluate.num_samples=40: must be 42 or more"),
        ("data.heldout", 15, "data.heldout=15: must be 16 or more"),
        ("prediction", "epsilon", "must be one of x, eps, v, flow"),
        ("data.image_size", 16, "digits has 8"),
        ("data.channels", 3, "digits has 1"),
        ("data.num_classes", 11, "digits has 10"),
        ("data.name", "stripes", "known: digits"),
        ("schedule", {"type": "Cosine", "log_snr_min": 30.0}, "schedule: log_snr_min"),
        ("threads", 0, "1 or more, or null"),
    ],
)
def test_impossible_value_is_refused_with_what_would_be_right(
    debug_config: Config, key: str, value: object, words: str
) -> None:
    # Broken: the run fails hours later, or trains something else than was asked.
    with pytest.raises(ConfigError) as caught:
        validate(altered(debug_config, key, value))
    assert words in str(caught.value)
    assert str(caught.value).startswith((key, key.split(".")[0]))
    assert "\n" not in str(caught.value)


def test_few_samples_that_are_allowed_are_marked() -> None:
    # Broken: a figure of a quick test stands in a table like any other.
    few = digits("stages.evaluate.num_samples=10", "stages.evaluate.allow_few_samples=true")
    assert "fewer samples (10) than features (16)" in features_of(few.stages["evaluate"], few)
    enough = digits()
    assert "fewer" not in features_of(enough.stages["evaluate"], enough)


def test_stages_of_every_type_are_checked() -> None:
    # Broken: a type that is left out of the table runs with whatever was typed.
    assert {schema for schema in STAGES.values() if schema not in CHECKS} == {ReportConfig}  # its one key is a title


def test_other_weights_and_steps_may_be_evaluated_without_touching_the_targets() -> None:
    # Broken: looking at another w ends in an error about a target that the user never wrote.
    stage = digits("stages.evaluate.weights=[2]", "stages.evaluate.steps=[2]", "stages.evaluate.headline=2")
    assert stage.stages["evaluate"].targets.paired


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ([], None),
        (["stages.guide.w_range=[0,1]"], "w = [3.0] lie outside the range [0, 1] that halve is trained for"),
        (["stages.halve.w_range=[0.5,4]"], "w = [0.0] lie outside the range [0.5, 4] that halve is trained for"),
        (["stages.evaluate.curve_weights=[0,5]"], "w = [5.0] lie outside the range [0, 4] that halve is trained for"),
    ],
)
def test_weights_that_no_student_will_know_are_named(overrides: list[str], found: str | None) -> None:
    text = untrained_weights(digits(*overrides), "evaluate")
    assert text is None if found is None else found in str(text)


def test_override_reaches_its_stage_alone_with_its_type() -> None:
    config = digits("stages.guide.updates=7", "stages.guide.lr=1", "stages.halve.updates_at.1=30", "seed=5")
    assert (config.stages["guide"].updates, config.stages["guide"].lr, config.seed) == (7, 1.0, 5)
    assert config.stages["teacher"].updates != 7
    assert config.stages["halve"].updates_at == {1: 30}


def test_keys_of_the_users_own_need_no_plus() -> None:
    # `network.overrides` is open: its keys are the network's arguments, which the network itself checks.
    config = digits("network.overrides.channels=24", "stages.guide.student.network.overrides.channels=8")
    assert config.network.overrides == {"channels": 24}
    assert config.stages["guide"].student.network.overrides == {"channels": 8}


def test_a_stage_may_be_added_for_a_baseline_at_one_w() -> None:
    config = digits("+stage@stages.guide_w1=guide", "stages.guide_w1.needs=[teacher]", "stages.guide_w1.w_range=[1,1]")
    assert config.stages["guide_w1"].name == "guide_w1"
    order = stage_order(config)
    assert order.index("guide_w1") > order.index("teacher")


def test_presets_differ_in_their_folder_so_that_their_results_cannot_mix() -> None:
    outs = {compose(DIGITS, [f"preset={name}"]).out for name in ("quickstart", "full", "debug")}
    assert len(outs) == 3
    assert compose(DIGITS).out == "runs/digits"


def test_folder_without_config_is_named() -> None:
    with pytest.raises(ConfigError, match=r"experiment=nowhere: no config\.yaml"):
        compose("nowhere")
