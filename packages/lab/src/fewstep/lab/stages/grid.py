"""Measures every student over w x steps: `results.json`, `table.md`, `heat_map.png`, `pareto.png`.

Samples are cached in `cache/`, their features in `features/`, both in shards, so a measurement that was killed goes on
with the shard that it was at.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fewstep.lab.context import StageContext
from fewstep.lab.data import Data, load_data
from fewstep.lab.evaluation.alignment import UNSEEN
from fewstep.lab.evaluation.circumstances import stage_seconds
from fewstep.lab.evaluation.grid import Grid, alignment_verdicts, measure, verdicts
from fewstep.lab.evaluation.plan import PAIRED
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.evaluation.scores import Scores, accuracy, make
from fewstep.lab.evaluation.timing import decoding_speed
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.measuring.images import HeldOutImages
from fewstep.lab.measuring.job import Extraction
from fewstep.lab.metrics import Statistics, fewer_than_features
from fewstep.lab.progress import SamplingProgress, Tell
from fewstep.lab.report.grid import write_grid_report
from fewstep.lab.sampling import knowingly
from fewstep.lab.stages.evaluate import samples_of, students_of
from fewstep.lab.stages.results import header, made_with, say_targets, tidy, write_results
from fewstep.lab.validate_teachers import TEACHERS


def run(ctx: StageContext) -> None:
    """Sample, measure, write."""
    grid, data, samples = _asked(ctx)
    scores = scores_of(ctx, data)
    make_sets(ctx, samples, scores, ctx.tell)
    with knowingly():
        rows = measure(samples, grid, scores, ctx.stopping)
    extractor, reference = scores.heldout.extractor, scores.reference
    few = fewer_than_features(ctx.stage.num_samples, len(reference.mean), reference.count)
    lacking = few if ctx.stage.features else None  # of the run's own judge, `header` says it
    targets = [*verdicts(rows, ctx.stage.targets), *alignment_verdicts(rows, ctx.stage.alignment)]
    results: dict[str, Any] = {
        **header(ctx, train=len(data.train), heldout=len(data.heldout)),
        "judge": {"accuracy_heldout": accuracy(scores.heldout, data.heldout.labels) if scores.own else None},
        "extractor": {"name": extractor.name, "weights": extractor.weights},
        "reference": {
            "path": ctx.stage.statistics or None,
            "count": reference.count,
            "resolution": scores.heldout.images.resolution,
            "digest": reference.digest if isinstance(reference, Statistics) else None,
        },
        "rows": rows,
        "decoding_images_per_second": decoding_speed(samples),
        "networks": {name: model.size for name, model in samples.models.items()},
        "stage_seconds": stage_seconds(ctx),
        "circumstances": made_with(ctx, samples.workers),
        "targets": [target.to_json() for target in targets],
    }
    if lacking is not None:
        results["features"] += f", {lacking}: FID means nothing"
    results = tidy(results)
    write_grid_report(results, ctx.out)
    write_results(ctx, results)
    say_targets(ctx, results)
    ctx.console.print(f"{ctx.stage.name}  {ctx.out / 'table.md'}", highlight=False)


def _asked(ctx: StageContext) -> tuple[Grid, Data, Samples]:
    """What is to be measured, the data, and the sets of samples that it takes."""
    grid, models = grid_of(ctx)
    data = load_data(ctx.config.data)
    return grid, data, samples_of(ctx, grid.requests(), models, prompts_of(data))


def scores_of(ctx: StageContext, data: Data) -> Scores:
    """What the sets are held against, in the features of the extractor that was asked for or the run's classifier."""
    stage = ctx.stage
    features = stage.features or str(next(iter(ctx.inputs_of_kind("classifier").values())) / "model")
    images, weights = HeldOutImages(data, ctx.config.data), stage.extractor_weights or None
    heldout = Extraction(images, features, str(ctx.out), stage.chunk, str(ctx.device), weights)
    statistics = Path(stage.statistics) if stage.statistics else None
    return Scores.of(heldout, statistics, stage.num_samples, stage.allow_few_samples, ctx.stopping)


def make_share(ctx: StageContext, shard: int, shards: int, tell: Tell) -> None:
    """The sets of one of `shards` jobs, so that none has all the dear ones.

    Raises:
        Interrupted: asked to stop; what was made is kept.
    """
    _, data, samples = _asked(ctx)
    make_sets(ctx, samples.share(shard, shards), scores_of(ctx, data), tell)


def make_sets(ctx: StageContext, samples: Samples, scores: Scores, tell: Tell) -> None:
    """Every set and its features; samples that no paired error needs are forgotten set by set, if that is asked for."""
    stage, keep = ctx.stage, ctx.stage.keep_samples
    if keep:
        samples.make(ctx.console, ctx.config.progress, ctx.stopping, tell)
    measured = [draw for draw in samples.sizes if draw.prompts != UNSEEN]
    with SamplingProgress(ctx.console, len(measured) * stage.num_samples, bar=ctx.config.progress and keep) as shown:
        for draw in measured:
            work = scores.of_set(samples, draw, stage.num_samples)
            paired = stage.paired_noises if draw.noises == PAIRED else 0
            if not keep:
                missing = paired if work.whole() else samples.sizes[draw]
                samples.first(draw, missing).make(ctx.console, ctx.config.progress, ctx.stopping)
            began = time.perf_counter()
            make(work, ctx.stopping)
            shown.advance(f"features of {draw.label}", stage.num_samples, 1, time.perf_counter() - began)
            if not keep:
                samples.forget(draw, paired)
                tell(shown.made, shown.total)


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
