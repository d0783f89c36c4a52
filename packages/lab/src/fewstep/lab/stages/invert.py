"""Measures encoders against reverse DDIM on the guided teacher: `results.json`, `table.md`, `transfer.png`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.lab.checkpoint import write_text
from fewstep.lab.classifier import load_classifier
from fewstep.lab.context import StageContext
from fewstep.lab.data import load_data, pixels
from fewstep.lab.evaluation.circumstances import circumstances, stage_seconds
from fewstep.lab.evaluation.inversion import DDIM, DISTILLED, Bridge, measure, verdicts
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.pictures import write_png
from fewstep.lab.report.inversion import markdown, picture
from fewstep.lab.sampling import knowingly
from fewstep.lab.stages.results import header, say_targets, tidy, write_results
from fewstep.lab.validate_teachers import TEACHERS


def run(ctx: StageContext) -> None:
    """Encode, decode, measure, write."""
    stage = ctx.stage
    heldout = load_data(ctx.config.data).heldout
    x, taken = pixels(heldout.images, torch.arange(stage.images), ctx.device)
    labels = heldout.labels.to(ctx.device)[taken]
    truth, *bridges = _bridges(ctx)
    rows, shown = [], []
    with knowingly():
        found = measure(bridges, truth, x, labels, ctx.config.data.num_classes, _judge(ctx), stage, ctx.stopping)
        for row, made in found:
            rows.append(row)
            if row["w"] == stage.weights[-1]:
                shown.append(made.moved)
    results: dict[str, Any] = {
        **header(ctx),
        "rows": rows,
        "stage_seconds": stage_seconds(ctx),
        "circumstances": circumstances(ctx.config.seed, ctx.device),
        "targets": [target.to_json() for target in verdicts(rows, stage)],
    }
    results = tidy(results)
    write_png(ctx.out / "transfer.png", picture(x.cpu(), shown))
    write_text(ctx.out / "table.md", markdown(results))
    write_results(ctx, results)
    say_targets(ctx, results)
    ctx.console.print(f"{stage.name}  {ctx.out / 'table.md'}", highlight=False)


def _bridges(ctx: StageContext) -> Iterator[Bridge]:
    """The teacher's many-step one, then for each number of steps the distilled one and the teacher's."""
    chains = {ctx.config.stages[name].students: path for name, path in ctx.inputs_of_kind("halve").items()}
    (folder,) = ctx.inputs_of_kind(*TEACHERS).values()
    teacher = Model(folder / "model", ctx.device).denoiser
    yield Bridge(DDIM, ctx.stage.truth_steps, teacher, teacher, two_branches=True)
    for steps in ctx.stage.steps:
        encoder, decoder = (_student(ctx, chains[kind], steps) for kind in ("encoder", "deterministic"))
        yield Bridge(DISTILLED, steps, encoder.denoiser, decoder.denoiser, two_branches=False)
        yield Bridge(DDIM, steps, teacher, teacher, two_branches=True)


def _student(ctx: StageContext, folder: Path, steps: int) -> Model:
    return Model(folder / f"steps_{steps}" / "model", ctx.device)


def _judge(ctx: StageContext) -> Callable[[Tensor], Tensor]:
    """Logits (N, K) that the run's judge gives to images."""
    (folder,) = ctx.inputs_of_kind("classifier").values()
    classifier = load_classifier(folder / "model").to(ctx.device)

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = classifier(images.to(ctx.device))[1]
            return found.cpu()

    return logits
