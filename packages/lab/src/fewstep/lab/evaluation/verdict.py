"""The targets of an experiment against what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fewstep.lab.config import EvaluateConfig
from fewstep.lab.evaluation.rows import select
from fewstep.lab.metrics import Target


def targets(results: dict[str, Any], options: EvaluateConfig) -> list[Target]:
    """Every figure that `options.targets` asks for, with its value in `results`."""
    return [target for part in (_teacher, _paired, _headline, _time) for target in part(results, options)]


def _teacher(results: dict[str, Any], options: EvaluateConfig) -> Iterator[Target]:
    asked = options.targets
    if asked.teacher_accuracy is not None:
        for row in select(results["teacher"], w=1.0):
            yield Target("teacher: class accuracy, w = 1", row["accuracy"], asked.teacher_accuracy, "at_least")
    if asked.teacher_fid is not None and results["teacher_data"] is not None:
        ratio = results["teacher_data"]["ratio"]
        yield Target("teacher: FID to held-out, w = 0, over that of training images", ratio, asked.teacher_fid)
    if asked.reference is not None:
        for row in results["reference_check"]:
            name = f"{row['sampler']} steps against {row['against']}: RMSE, w = {row['w']:g}"
            yield Target(name, row["paired_error"], asked.reference)


def _paired(results: dict[str, Any], options: EvaluateConfig) -> Iterator[Target]:
    for asked in options.targets.paired:
        for row in select(results["paired_ratios"], w=asked.w, steps=asked.steps):
            name = f"paired error over best undistilled, w = {asked.w:g}, {_steps(asked.steps)}"
            yield Target(name, row["ratio"], asked.at_most)
    if options.targets.stage_one is not None:
        for row in select(results["stage_one"], sampler="dpmpp_2m"):
            name = f"stage one alone, {_steps(row['steps'])}: paired error, w = {row['w']:g}"
            yield Target(name, row["paired_error"], options.targets.stage_one, aim=True)


def _headline(results: dict[str, Any], options: EvaluateConfig) -> Iterator[Target]:
    asked, steps = options.targets, options.headline
    if asked.distance is not None:
        for row in select(results["distance_ratios"], steps=steps):
            name = f"Frechet distance to teacher over best undistilled, w = {row['w']:g}, {_steps(steps)}"
            yield Target(name, row["ratio"], asked.distance)
    if asked.response is not None:
        for row in select(results["guidance_response"], steps=steps):
            name = f"guidance response over teacher's, w = {row['w']:g} against {row['w_none']:g}, {_steps(steps)}"
            yield Target(name, row["ratio"], asked.response, "within")
    if asked.fid is not None:
        teachers = {row["w"]: row["fid_heldout"] for row in results["teacher"]}
        for row in select(results["rows"], role="student", steps=steps, w=0.0):
            name = f"FID to held-out over teacher's, w = 0, {_steps(steps)}"
            yield Target(name, row["fid_heldout"] / teachers[0.0], asked.fid)


def _time(results: dict[str, Any], options: EvaluateConfig) -> Iterator[Target]:
    if options.targets.overhead is not None:
        for timing in results["timing"]:
            if timing["batch"] > 1:
                name = f"ddim over its denoiser calls, seconds, batch {timing['batch']}"
                yield Target(name, timing["overhead"]["ratio"], options.targets.overhead)


def _steps(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"
