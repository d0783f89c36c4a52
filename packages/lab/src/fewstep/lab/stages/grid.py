"""Measures every student over w x steps: `results.json`, `table.md`, `heat_map.png`, `pareto.png`.

Samples are cached in `cache/` in shards, so a measurement that was killed goes on with the shard that it was at.
"""

from __future__ import annotations

from typing import Any

from fewstep.lab.context import StageContext
from fewstep.lab.data import Data, load_data
from fewstep.lab.evaluation.alignment import UNSEEN
from fewstep.lab.evaluation.circumstances import stage_seconds
from fewstep.lab.evaluation.distances import Reference
from fewstep.lab.evaluation.grid import Grid, alignment_verdicts, measure, verdicts
from fewstep.lab.evaluation.timing import decoding_speed
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.report.grid import write_grid_report
from fewstep.lab.sampling import knowingly
from fewstep.lab.stages.evaluate import samples_of, students_of
from fewstep.lab.stages.results import header, made_with, say_targets, tidy, write_results
from fewstep.lab.validate_teachers import TEACHERS

KID_SUBSETS = 1  # KID is not part of the grid


def run(ctx: StageContext) -> None:
    """Sample, measure, write."""
    grid, models = grid_of(ctx)
    data = load_data(ctx.config.data)
    samples = samples_of(ctx, grid.requests(), models, prompts_of(data))
    samples.make(ctx.console, ctx.config.progress, ctx.stopping, ctx.tell)
    reference = Reference.of(samples.judge, data, KID_SUBSETS, ctx.stage.allow_few_samples)
    with knowingly():
        rows = measure(samples, grid, reference)
    targets = [*verdicts(rows, ctx.stage.targets), *alignment_verdicts(rows, ctx.stage.alignment)]
    results: dict[str, Any] = {
        **header(ctx, **reference.sizes),
        "judge": {"accuracy_heldout": reference.heldout.accuracy},
        "rows": rows,
        "decoding_images_per_second": decoding_speed(samples),
        "networks": {name: model.size for name, model in models.items()},
        "stage_seconds": stage_seconds(ctx),
        "circumstances": made_with(ctx, samples.workers),
        "targets": [target.to_json() for target in targets],
    }
    results = tidy(results)
    write_grid_report(results, ctx.out)
    write_results(ctx, results)
    say_targets(ctx, results)
    ctx.console.print(f"{ctx.stage.name}  {ctx.out / 'table.md'}", highlight=False)


def grid_of(ctx: StageContext) -> tuple[Grid, dict[str, Model]]:
    """What is to be measured, and the models by their names; encoders are no samplers and left out."""
    ((teacher, folder),) = ctx.inputs_of_kind(*TEACHERS).items()
    models, students = {teacher: Model(folder / "model", ctx.device)}, []
    for name, folder in ctx.inputs_of_kind("halve").items():
        stage = ctx.config.stages[name]
        if stage.students != "encoder":
            models |= {f"{name}/steps_{n}": Model(folder / f"steps_{n}" / "model", ctx.device) for n in stage.steps}
            students.append((students_of(ctx, name, models), stage.students))
    data = ctx.config.data
    checked = data.name == "captioned_shapes"
    unseen = min(data.shapes.composition, ctx.stage.num_samples) if checked and data.shapes is not None else 0
    return Grid(ctx.stage, teacher, tuple(students), unseen, checked), models


def prompts_of(data: Data) -> dict[str, tuple[str, ...]]:
    """The held-out captions as "", those of unseen combinations by their name; {} for data without captions."""
    parts = {"": data.heldout.captions, UNSEEN: None if data.composition is None else data.composition.captions}
    return {name: captions for name, captions in parts.items() if captions is not None}
