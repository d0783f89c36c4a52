"""The teacher at its best (paper B, section 5): ancestral sampling over noise levels and small guidance weights."""

from __future__ import annotations

from typing import Any

from fewstep.lab.context import StageContext
from fewstep.lab.data import load_data
from fewstep.lab.evaluation.distances import data_row
from fewstep.lab.evaluation.plan import Draw
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.sampling import knowingly
from fewstep.lab.stages.evaluate import reference_of, samples_of
from fewstep.lab.stages.results import header, made_with, write_results
from fewstep.lab.validate_teachers import TEACHERS


def run(ctx: StageContext) -> None:
    """Write `results.json`: a row for every noise level and w, and the one of the lowest FID to held-out images."""
    stage = ctx.stage
    ((teacher, folder),) = ctx.inputs_of_kind(*TEACHERS).items()
    grid = [(level, w) for level in stage.noise_levels for w in stage.weights]
    draws = [Draw(teacher, "ancestral", stage.steps, w, noise_level=level) for level, w in grid]
    models = {teacher: Model(folder / "model", ctx.device, stage.schedule)}
    samples = samples_of(ctx, dict.fromkeys(draws, stage.num_samples), models)
    samples.make(ctx.console, ctx.config.progress, ctx.stopping, ctx.tell)
    data = load_data(ctx.config.data)
    reference = reference_of(ctx, samples, data)
    with knowingly():
        rows = [
            {"noise_level": draw.noise_level, **data_row(samples, draw, stage.num_samples, reference)} for draw in draws
        ]
    best = min(rows, key=lambda row: float(row["fid_heldout"]))
    results: dict[str, Any] = {
        **header(ctx, **reference.sizes),
        "rows": rows,
        "best": best,
        "training_images": reference.of_training_images(),
        "circumstances": made_with(ctx, samples.workers),
    }
    write_results(ctx, results)
    found = f"FID {best['fid_heldout']:.3f}, recall {best['recall']:.3f}"
    ctx.console.print(f"{stage.name}  best: noise {best['noise_level']:g}, w = {best['w']:g}: {found}", highlight=False)
