"""Targets are found in the results by w and steps, and an unmet one is said to be unmet."""

from __future__ import annotations

import math

from fewstep.lab.config import EvaluateConfig, PairedTarget, TargetsConfig
from fewstep.lab.evaluation.verdict import targets
from fewstep.lab.stages.results import tidy

RESULTS = {
    "teacher": [{"w": 0.0, "accuracy": 0.9, "fid_heldout": 2.0}, {"w": 1.0, "accuracy": 0.995, "fid_heldout": 9.0}],
    "teacher_data": {"ratio": 1.6},
    "reference_check": [{"w": 3.0, "sampler": "dpmpp_2m 64", "against": "ddim 512", "paired_error": 0.004}],
    "paired_ratios": [
        {"w": 0.0, "steps": 4, "ratio": 0.7}, {"w": 1.0, "steps": 4, "ratio": 0.5}, {"w": 1.0, "steps": 1, "ratio": 0.1}
    ],
    "distance_ratios": [{"w": 0.0, "steps": 4, "ratio": 0.2}, {"w": 0.0, "steps": 1, "ratio": 5.0}],
    "guidance_response": [{"w": 3.0, "w_none": 0.0, "steps": 4, "ratio": 0.8}],
    "stage_one": [
        {"w": 0.0, "sampler": "dpmpp_2m", "steps": 64, "paired_error": 0.07},
        {"w": 0.0, "sampler": "ddim", "steps": 64, "paired_error": 0.01},
    ],
    "rows": [
        {"role": "student", "w": 0.0, "steps": 4, "fid_heldout": 2.9},
        {"role": "baseline", "w": 0.0, "steps": 4, "fid_heldout": 50.0},
    ],
    "timing": [{"batch": 1, "overhead": {"ratio": 1.5}}, {"batch": 64, "overhead": {"ratio": 1.01}}],
}  # fmt: skip
ASKED = TargetsConfig(
    teacher_accuracy=0.99, teacher_fid=1.5, reference=0.01,
    paired=[PairedTarget(0.0, 4, 0.8), PairedTarget(1.0, 4, 0.45)],
    distance=0.3, response=0.15, fid=1.5, stage_one=0.06, overhead=1.05,
)  # fmt: skip


def test_every_target_meets_its_number() -> None:
    """The right row (this w, these steps, this sampler) against the right limit, in the right direction."""
    found = [(t.value, t.limit, t.reached) for t in targets(RESULTS, EvaluateConfig(targets=ASKED))]
    assert found == [
        (0.995, 0.99, True), (1.6, 1.5, False), (0.004, 0.01, True), (0.7, 0.8, True), (0.5, 0.45, False),
        (0.07, 0.06, False), (0.2, 0.3, True), (0.8, 0.15, False), (1.45, 1.5, True), (1.01, 1.05, True),
    ]  # fmt: skip


def test_an_aim_is_not_a_target() -> None:
    """Stage one alone has an aim: reported, but no reason to call the run a failure."""
    aims = [t.name for t in targets(RESULTS, EvaluateConfig(targets=ASKED)) if t.aim]
    assert aims == ["stage one alone, 64 steps: paired error, w = 0"]


def test_nothing_asked_nothing_judged() -> None:
    """An experiment without targets must not be held against those of another."""
    assert targets(RESULTS, EvaluateConfig()) == []


def test_results_hold_no_nan() -> None:
    """NaN is no JSON: a browser or jq would refuse the whole file."""
    found = tidy({"a": [math.nan, 1 / 3, {"b": -math.inf}], "c": "nan", "d": 3})
    assert found == {"a": [None, 0.333333, {"b": None}], "c": "nan", "d": 3}


def test_a_target_that_is_not_evaluated_has_no_verdict() -> None:
    """`weights=[9]` alone must do: a user who looks at another w is not asked to rewrite the targets."""
    asked = TargetsConfig(paired=[PairedTarget(9.0, 4, 0.1), PairedTarget(0.0, 2, 0.1), PairedTarget(0.0, 4, 0.8)])
    assert [target.value for target in targets(RESULTS, EvaluateConfig(targets=asked))] == [0.7]
