"""Errors between samples that start from the same noise: against the teacher, and from stage to stage."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.lab.evaluation.plan import BASELINES, Draw, Plan
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.metrics import paired_error


def pair_row(samples: Samples, draw: Draw, against: Draw, count: int) -> dict[str, Any]:
    """Paired error of two sets over their first `count` noises: JSON-able."""
    found = paired_error(samples.squared_errors(draw, against, count))
    return {"paired_error": found.rmse, "paired_stderr": found.stderr, "paired_noises": found.pairs}


def error_to_teacher(samples: Samples, plan: Plan, draw: Draw) -> dict[str, Any]:
    """Paired error against the teacher's reference sampler at the same w."""
    return pair_row(samples, draw, plan.reference(draw.w), plan.options.paired_noises)


def check_reference(samples: Samples, plan: Plan) -> list[dict[str, Any]]:
    """How far the reference sampler (or, if that is the many-step one, the curve's) lies from the many-step one."""
    rows = []
    for w in plan.check_weights:
        draw, truth = plan.checked(w), plan.truth(w)
        found = pair_row(samples, draw, truth, plan.options.check_noises)
        names = {"sampler": f"{draw.sampler} {draw.steps}", "against": f"{truth.sampler} {truth.steps}"}
        rows.append({"w": w, **names, **found})
    return rows


def stage_one_rows(samples: Samples, plan: Plan) -> list[dict[str, Any]]:
    """Stage one alone against the teacher, at enough steps for the error to be the network's."""
    rows = []
    for w in plan.options.weights:
        for sampler in BASELINES:
            draw = plan.stage_one(w, sampler)
            found = error_to_teacher(samples, plan, draw)
            rows.append({"w": w, "sampler": sampler, "steps": draw.steps, "nfe": samples.nfe(draw), **found})
    return rows


def stage_shares(samples: Samples, plan: Plan) -> list[dict[str, Any]]:
    """What each stage adds to the error, for each w in the order in which the stages were trained.

    own: paired error to what this stage was taught (the samples of the stage before from the same noises). accumulated:
    paired error to the teacher. share: of the last student's squared error, what the square of `accumulated` grew by.
    "fewer steps" is no training: stage one at the steps that the first student was taught to halve.
    """
    rows = []
    for w in plan.options.weights:
        first = plan.own_teacher(max(plan.options.steps), w)
        chain: list[tuple[str, Draw, Draw]] = [("stage one", plan.stage_one(w, "dpmpp_2m"), plan.reference(w))]
        chain.append(("fewer steps", first, plan.stage_one(w, "dpmpp_2m")))
        for steps in sorted(plan.options.steps, reverse=True):
            chain.append(("student", plan.student(steps, w), plan.own_teacher(steps, w)))
        rows += _chain_rows(samples, plan, w, chain)
    return rows


def _chain_rows(samples: Samples, plan: Plan, w: float, chain: list[tuple[str, Draw, Draw]]) -> list[dict[str, Any]]:
    count = plan.options.paired_noises
    rows: list[dict[str, Any]] = []
    for stage, draw, taught_by in chain:
        own = pair_row(samples, draw, taught_by, count)["paired_error"]
        accumulated = error_to_teacher(samples, plan, draw)["paired_error"]
        rows.append({"w": w, "stage": stage, "steps": draw.steps, "own": own, "accumulated": accumulated})
    before = 0.0
    for row in rows:
        row["share"] = (row["accumulated"] ** 2 - before**2) / max(rows[-1]["accumulated"] ** 2, 1e-30)
        before = row["accumulated"]
    return rows


def responses(samples: Samples, plan: Plan) -> list[dict[str, Any]]:
    """How far each student's samples move between the least and the greatest w, beside the teacher's; [] for one w.

    The mean over noises of the RMSE between the two images that one noise gives; 0 for a student that ignores w.
    """
    low, high = min(plan.options.weights), max(plan.options.weights)
    if low == high:
        return []
    count = plan.options.paired_noises

    def moved(a: Draw, b: Draw) -> float:
        return float(torch.sqrt(samples.squared_errors(a, b, count)).mean())

    teacher = moved(plan.reference(high), plan.reference(low))
    rows = []
    for steps in plan.options.steps:
        student = moved(plan.student(steps, high), plan.student(steps, low))
        pair = {"steps": steps, "w": high, "w_none": low, "noises": count}
        rows.append({**pair, "student": student, "teacher": teacher, "ratio": student / teacher})
    return rows
