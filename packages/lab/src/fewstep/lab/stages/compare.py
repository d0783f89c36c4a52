"""Students of a few steps beside the teacher at its best: `results.json` with means over sampling seeds and targets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from fewstep.lab.checkpoint import write_tensors
from fewstep.lab.context import StageContext
from fewstep.lab.data import load_data
from fewstep.lab.evaluation.circumstances import stage_seconds
from fewstep.lab.evaluation.comparison import TEACHER, Contestant, compare, training_of, verdicts
from fewstep.lab.evaluation.plan import Draw
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.sampling import knowingly, own_sampler
from fewstep.lab.stages.evaluate import NOISES_SHOWN, reference_of, samples_of
from fewstep.lab.stages.results import header, made_with, say_targets, write_results
from fewstep.lab.validate_moments import STUDENTS
from fewstep.lab.validate_teachers import TEACHERS


def run(ctx: StageContext) -> None:
    """Sample, measure, write `results.json` and `grids.safetensors` (the images that the report shows)."""
    stage, data = ctx.stage, load_data(ctx.config.data)
    (folder,) = ctx.inputs_of_kind("sweep").values()
    sweep = json.loads((folder / "results.json").read_text())
    found = list(_contestants(ctx, sweep))
    contestants, models = [one for one, _ in found], {one.draw.model: model for one, model in found}
    sizes = {draw: stage.num_samples for one in contestants for draw in one.draws(stage.sampling_seeds)}
    samples = samples_of(ctx, sizes, models)
    samples.make(ctx.console, ctx.config.progress, ctx.stopping, ctx.tell)
    reference = reference_of(ctx, samples, data)
    with knowingly():
        rows = compare(samples, contestants, stage, reference)
    results: dict[str, Any] = {
        **header(ctx, **reference.sizes),
        "judge": {"accuracy_heldout": reference.heldout.accuracy},
        "training_images": reference.of_training_images(),
        "sweep": sweep["rows"],
        "rows": rows,
        "networks": {name: model.size for name, model in models.items()},
        "stage_seconds": stage_seconds(ctx),
        "circumstances": made_with(ctx, samples.workers),
        "targets": [target.to_json() for target in verdicts(rows, stage.targets)],
    }
    _write_grids(ctx, samples, contestants)
    write_results(ctx, results)
    say_targets(ctx, results)


def _contestants(ctx: StageContext, sweep: dict[str, Any]) -> Iterator[tuple[Contestant, Model]]:
    """The teacher as the sweep found it best, then the students in the order of `needs` and of their steps."""
    best, (folder,) = sweep["best"], ctx.inputs_of_kind(*TEACHERS).values()
    draw = Draw(TEACHER, best["sampler"], best["steps"], best["w"], noise_level=best["noise_level"])
    yield Contestant(TEACHER, draw), Model(folder / "model", ctx.device, sweep["settings"]["schedule"])
    for name, folder in ctx.inputs.items():
        stage = ctx.config.stages[name]
        for steps in stage.steps if stage.kind in STUDENTS else ():
            out = folder / f"steps_{steps}"
            model = Model(out / "model", ctx.device)
            trained = model.network.trained
            low, high = (trained and trained.w_range) or (0.0, 0.0)
            for w in ctx.stage.weights if model.network.takes_guidance else (0.0,):
                if low <= w <= high:
                    draw = Draw(f"{name}/steps_{steps}", own_sampler(trained), steps, w)
                    yield Contestant(name, draw, training_of(out, stage, steps)), model


def _write_grids(ctx: StageContext, samples: Samples, contestants: list[Contestant]) -> None:
    """The first images of each class, (N, C, H, W) by "stage/steps/w", from the same noises."""
    count = min(NOISES_SHOWN * len(samples.classes), ctx.stage.num_samples)
    shown = {
        f"{one.stage}/{one.draw.steps}/{one.draw.w:g}": torch.cat(list(samples.batches(one.draw, count)))
        for one in contestants
    }
    write_tensors(ctx.out / "grids.safetensors", {name: images.clamp(-1, 1) for name, images in shown.items()})
