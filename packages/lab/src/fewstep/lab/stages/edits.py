"""Measures editing and inpainting by prompt: `results.json`, `table.md`, `edits.png`.

Pictures are cached in `cache/` in shards, so a measurement that was killed goes on with the shard that it was at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.lab.captioned import world_of
from fewstep.lab.checkpoint import write_text
from fewstep.lab.context import StageContext
from fewstep.lab.evaluation.chunks import Chunk, make_missing
from fewstep.lab.evaluation.circumstances import stage_seconds
from fewstep.lab.evaluation.edits import (
    EDIT,
    INPAINT,
    NOISE,
    NOTHING,
    SOURCE,
    Questions,
    Samplers,
    Way,
    about,
    judged,
    key_of,
    make_shard,
    pasted,
    row_of,
    verdicts,
)
from fewstep.lab.evaluation.rows import Row
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.pictures import write_png
from fewstep.lab.report.edits import markdown, picture
from fewstep.lab.shapes import render
from fewstep.lab.shards import ShardCache
from fewstep.lab.stages.evaluate import students_of
from fewstep.lab.stages.results import header, made_with, say_targets, tidy, write_results
from fewstep.lab.validate_teachers import TEACHERS
from fewstep.lab.workers import default_workers


class Answer(NamedTuple):
    """A row of the table, and the pictures (N, C, H, W) that it is about."""

    row: Row
    images: Tensor


def run(ctx: StageContext) -> None:
    """Edit, inpaint, read back, write."""
    stage, data = ctx.stage, ctx.config.data
    assert data.shapes is not None  # `validate` asks for captioned shapes
    questions = Questions(world_of(data.shapes), data.shapes.seed, stage.margin, stage.seed)
    samplers = samplers_of(ctx)
    made = _made(ctx, questions, samplers)
    answers = list(_answers(ctx, questions, samplers, made))
    rows = [answer.row for answer in answers]
    results: dict[str, Any] = tidy({
        **header(ctx),
        "rows": rows,
        "networks": {name: model.size for name, model in samplers.models.items()},
        "stage_seconds": stage_seconds(ctx),
        "circumstances": made_with(ctx, _workers(ctx)),
        "targets": [target.to_json() for target in verdicts(rows, stage)],
    })  # fmt: skip
    asked = questions.changes(0, stage.prompts)
    scenes, hidden = render([change.before for change in asked]), questions.masks(asked).bool()
    write_png(ctx.out / "edits.png", picture(results, scenes, hidden, [answer.images for answer in answers]))
    write_text(ctx.out / "table.md", markdown(results, [change.prompt for change in asked]))
    write_results(ctx, results)
    say_targets(ctx, results)
    ctx.console.print(f"{stage.name}  {ctx.out / 'table.md'}", highlight=False)


def samplers_of(ctx: StageContext) -> Samplers:
    """The teacher and the students that are measured."""
    ((teacher, folder),) = ctx.inputs_of_kind(*TEACHERS).items()
    ((name, chain),) = ctx.inputs_of_kind("halve").items()
    models = {teacher: Model(folder / "model", ctx.device)}
    models |= {f"{name}/steps_{n}": Model(chain / f"steps_{n}" / "model", ctx.device) for n in ctx.stage.steps}
    students = students_of(ctx, name, models)
    return Samplers(models, teacher, students.models, students.sampler)


def _workers(ctx: StageContext) -> int:
    return int(ctx.stage.workers or default_workers(ctx.device))


def _made(ctx: StageContext, questions: Questions, samplers: Samplers) -> dict[Way, Tensor]:
    """The pictures of every way; what is not in the cache is made.

    Raises:
        Interrupted: asked to stop; finished chunks are kept.
    """
    stage, cache = ctx.stage, ShardCache(ctx.out / "cache")
    ways = {way: key_of(samplers.models[way.model], way, questions, stage.w) for way in samplers.ways(stage)}
    ranges = [(start, min(start + stage.chunk, stage.prompts)) for start in range(0, stage.prompts, stage.chunk)]
    chunks = [
        Chunk(way.label, about(way, samplers, stage.w)["nfe"], key, start, stop,
              (samplers.models[way.model], way, questions, stage.w, start, stop, key, cache))
        for way, key in ways.items()
        for start, stop in ranges
    ]  # fmt: skip
    make_missing(
        chunks, make_shard, cache, _workers(ctx), ctx.console, ctx.stopping, bar=ctx.config.progress, tell=ctx.tell
    )
    shards = {way: [cache.get(key, *ends) for ends in ranges] for way, key in ways.items()}
    return {way: torch.cat([shard.images for shard in found if shard is not None]) for way, found in shards.items()}


def _answers(ctx: StageContext, questions: Questions, samplers: Samplers, made: dict[Way, Tensor]) -> Iterator[Answer]:
    """Every row with its pictures, those of editing first."""
    scenes = render([change.before for change in questions.changes(0, ctx.stage.prompts)])
    for task in (EDIT, INPAINT):
        yield _answer(ctx, questions, task, SOURCE, scenes, NOTHING)
        for way, images in made.items():
            if way.task == task:
                yield _answer(ctx, questions, task, way.method, images, about(way, samplers, ctx.stage.w))
            elif way.method == NOISE:  # the same samples stand against inpainting, pasted into what is known
                there = pasted(questions, images)
                yield _answer(ctx, questions, task, NOISE, there, about(way, samplers, ctx.stage.w))


def _answer(
    ctx: StageContext, questions: Questions, task: str, method: str, images: Tensor, more: dict[str, Any]
) -> Answer:
    return Answer(row_of(task, method, judged(questions, images, ctx.stage.reach, task), **more), images)
