"""Measures the models of a run: `results.json` holds every figure, `targets` in it those that were asked for.

Samples are cached in `cache/` in shards, so an evaluation that was killed goes on with the shard that it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.lab.checkpoint import write_tensors
from fewstep.lab.classifier import Classifier, load_classifier
from fewstep.lab.config import ConfigError, EvaluateConfig
from fewstep.lab.context import Interrupted, StageContext
from fewstep.lab.data import Data, load_data
from fewstep.lab.evaluation import distances, pairs, rows, timing
from fewstep.lab.evaluation.circumstances import stage_seconds
from fewstep.lab.evaluation.distances import Reference
from fewstep.lab.evaluation.plan import Draw, Plan, Students
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.evaluation.verdict import targets
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.latents import run_autoencoder, sample_shape
from fewstep.lab.metrics import register_judge
from fewstep.lab.sampling import knowingly, own_sampler
from fewstep.lab.shards import ShardCache
from fewstep.lab.stages.results import header, made_with, say_targets, write_results
from fewstep.lab.validate_teachers import TEACHERS
from fewstep.lab.workers import default_workers

NOISES_SHOWN = 2  # images per class in the report's grids


def run(ctx: StageContext) -> None:
    """Sample, measure, write `results.json` and `grids.safetensors` (the images that the report shows)."""
    data = load_data(ctx.config.data)
    plan, models = plan_of(ctx, len(data.train))
    samples = samples_of(ctx, plan.requests(), models)
    samples.make(ctx.console, ctx.config.progress, ctx.stopping, ctx.tell)
    with knowingly():
        results = measure(ctx, samples, plan, reference_of(ctx, samples, data))
    write_grids(ctx.out / "grids.safetensors", samples, plan)
    write_results(ctx, results)
    say_targets(ctx, results)


def reference_of(ctx: StageContext, samples: Samples, data: Data) -> Reference:
    """The data as the judge of `samples` sees it."""
    return Reference.of(samples.judge, data, ctx.stage.kid_subsets, ctx.stage.allow_few_samples)


def plan_of(ctx: StageContext, training_images: int) -> tuple[Plan, dict[str, Model]]:
    """What is to be sampled, and the models that it takes by their names.

    `validate` has made sure that `needs` holds every kind.
    """
    stage: EvaluateConfig = ctx.stage
    (teacher, *_), (guide, *_) = ctx.inputs_of_kind(*TEACHERS), ctx.inputs_of_kind("guide")
    first, *others = (name for name in ctx.inputs_of_kind("halve") if ctx.config.stages[name].students != "encoder")
    folders = {name: ctx.inputs[name] / "model" for name in (teacher, guide)}
    for name in (first, *others):
        for steps in ctx.config.stages[name].steps:
            folders[f"{name}/steps_{steps}"] = ctx.inputs[name] / f"steps_{steps}" / "model"
    models = {name: Model(folder, ctx.device) for name, folder in folders.items()}
    students, *more = (students_of(ctx, name, models) for name in (first, *others))
    return Plan(stage, teacher, guide, students, tuple(more), training_images), models


def samples_of(
    ctx: StageContext,
    sizes: Mapping[Draw, int],
    models: Mapping[str, Model],
    prompts: Mapping[str, tuple[str, ...]] | None = None,
) -> Samples:
    """Sets of samples of these sizes, seen by the judge that the run trained; prompts: sets of them by name."""
    config = ctx.config.data
    return Samples(
        sizes=sizes,
        models=models,
        cache=ShardCache(ctx.out / "cache"),
        judge=_judge(ctx),
        shape=sample_shape(ctx.config),
        classes=tuple(range(config.num_classes)) if ctx.config.text is None else (),
        seed=ctx.stage.seed,
        chunk=ctx.stage.chunk,
        device=ctx.device,
        workers=ctx.stage.workers or default_workers(ctx.device),
        autoencoder=run_autoencoder(ctx.config, ctx.device),
        prompts=prompts or {},
    )


def measure(ctx: StageContext, samples: Samples, plan: Plan, reference: Reference) -> dict[str, Any]:
    """Everything that stands in `results.json`.

    Raises:
        Interrupted: asked to stop; what was measured is measured again, from the samples that are kept.
    """
    results = header(ctx, **reference.sizes)
    parts: dict[str, Callable[[], Any]] = {
        "judge": lambda: {
            "accuracy_heldout": reference.heldout.accuracy,
            "accuracy_train": reference.train.accuracy,
        },
        "reference_check": lambda: pairs.check_reference(samples, plan),
        "teacher": lambda: distances.teacher_rows(samples, plan, reference),
        "teacher_data": lambda: distances.teacher_against_data(samples, plan, reference),
        "rows": lambda: rows.all_rows(samples, plan, reference),
        "paired_ratios": lambda: rows.against_best(results["rows"], "paired_error"),
        "distance_ratios": lambda: rows.against_best(results["rows"], "teacher_distance"),
        "guidance_response": lambda: pairs.responses(samples, plan),
        "stage_one": lambda: pairs.stage_one_rows(samples, plan),
        "stage_shares": lambda: pairs.stage_shares(samples, plan),
        "curve": lambda: distances.curve_rows(samples, plan, reference),
        "networks": lambda: {name: model.size for name, model in samples.models.items()},
        "timing": lambda: timing.measure(samples, plan),
        "stage_seconds": lambda: stage_seconds(ctx),
        "circumstances": lambda: made_with(ctx, samples.workers),
        "targets": lambda: [target.to_json() for target in targets(results, ctx.stage)],
    }
    for name, part in parts.items():
        if ctx.stopping():
            raise Interrupted(f"{ctx.stage.name}: stopped before measuring {name}; the samples are kept")
        results[name] = part()
    return results


def write_grids(path: Path, samples: Samples, plan: Plan) -> None:
    """The first images of each class, a tensor (N, C, H, W) per w and row: teacher, undistilled, students."""
    options = plan.options
    count = min(NOISES_SHOWN * len(samples.classes), options.num_samples, options.paired_noises)
    shown: dict[str, Tensor] = {}
    for w in options.weights:
        named = [("teacher", plan.reference(w))]
        named += [(f"baseline {draw.sampler}", draw) for draw in plan.baselines(options.headline, w)]
        named += [(f"student {steps}", plan.student(steps, w)) for steps in options.steps]
        for name, draw in named:
            shown[f"{w:g}/{name}"] = torch.cat(list(samples.batches(draw, count))).clamp(-1, 1)
    write_tensors(path, shown)


def students_of(ctx: StageContext, name: str, models: dict[str, Model]) -> Students:
    """The students of a stage of kind halve, whose `models` are named `<stage>/steps_<N>`.

    Raises:
        ConfigError: they carry no record of their training.
    """
    steps = ctx.config.stages[name].steps
    trained = models[f"{name}/steps_{steps[0]}"].network.trained
    if trained is None or trained.w_range is None:
        raise ConfigError(f"{ctx.inputs[name]}: its students do not say for which w they were trained; train them anew")
    return Students(name, {n: f"{name}/steps_{n}" for n in steps}, trained.w_range, own_sampler(trained))


def _judge(ctx: StageContext) -> str:
    """The name by which torch-fidelity knows the classifier in `needs`; "" without one."""
    for folder in ctx.inputs_of_kind("classifier").values():
        classifier = load_classifier(folder / "model").to(ctx.device)
        return register_judge("fewstep-judge", partial(_look, classifier, ctx.device))
    return ""


def _look(classifier: Classifier, device: torch.device, images: Tensor) -> tuple[Tensor, Tensor]:
    features, logits = classifier(images.to(device))
    return features, logits
