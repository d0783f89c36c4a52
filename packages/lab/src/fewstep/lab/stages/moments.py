"""Moment matching (paper B): students of a few ancestral steps, each distilled from the teacher itself.

Every number of steps is a training of its own in `steps_<N>/`, skipped once its own `DONE` stands. Teacher, student and
auxiliary denoiser run on the stage's schedule, which is what p(s) is; the student is saved with it.
"""

import copy
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fewstep.distill import (
    InstantMomentMatching,
    Method,
    MomentMatching,
    adam_preconditioner,
    estimate_preconditioner,
)
from fewstep.lab import record
from fewstep.lab.checkpoint import load_latest
from fewstep.lab.config import ConfigError
from fewstep.lab.context import StageContext
from fewstep.lab.data import Order
from fewstep.lab.inpainting import with_masks
from fewstep.lab.latents import training_split
from fewstep.lab.networks import config_of, on_schedule, with_dropout
from fewstep.lab.stages.fit import compile_networks, finish, fit, load_model, seed_everything, stage_seed
from fewstep.lab.text import conditioned
from fewstep.lab.validate_teachers import TEACHERS
from fewstep.models import NetworkDenoiser, with_guidance_input
from fewstep.schedules import Cond, Trained, sample_seeds

PRECONDITIONER = 0  # in place of a number of steps: the seed of its batches


def run(ctx: StageContext) -> None:
    """Distil students of `stage.steps` steps; writes `steps_<N>/model/` for each."""
    for steps in ctx.stage.steps:
        out = ctx.out / f"steps_{steps}"
        if not record.is_done(out):
            _distil(ctx, steps, out)


def _distil(ctx: StageContext, steps: int, out: Path) -> None:
    """Train the student of `steps` steps."""
    stage, began, seed = ctx.stage, time.monotonic(), seed_everything(ctx, steps)
    (folder,) = ctx.inputs_of_kind(*TEACHERS).values()
    teacher = on_schedule(load_model(ctx, folder), stage.schedule)
    student = _student(ctx, teacher, steps)
    method = (_alternating if stage.method == "alternating" else _instant)(ctx, teacher, student, steps)
    updates = stage.updates_for(steps)
    fit(ctx, method, out=out, updates=updates, seed=seed, label=f"{stage.name} {steps}")
    finish(ctx, student, out, began)


def _alternating(ctx: StageContext, teacher: NetworkDenoiser, student: NetworkDenoiser, steps: int) -> Method:
    """Algorithm 2."""
    stage, auxiliary = ctx.stage, _auxiliary(ctx, teacher, student)
    compile_networks(ctx, teacher, student, auxiliary)
    return MomentMatching(
        teacher, student, auxiliary, steps,
        null_cond=teacher.null_cond, w_range=_w_range(ctx), weight=_weight(ctx, steps),
        weight_shift=stage.weight_shift, renoise=stage.renoise,
    )  # fmt: skip


def _instant(ctx: StageContext, teacher: NetworkDenoiser, student: NetworkDenoiser, steps: int) -> Method:
    """Algorithm 3."""
    clip = None if ctx.stage.clip is None else (ctx.stage.clip[0], ctx.stage.clip[1])
    return InstantMomentMatching(
        teacher, student, steps, _preconditioner(ctx, teacher, steps),
        null_cond=teacher.null_cond, w_range=_w_range(ctx), weight=_weight(ctx, steps),
        weight_shift=ctx.stage.weight_shift, clip=clip,
    )  # fmt: skip


def _w_range(ctx: StageContext) -> tuple[float, float] | None:
    return None if ctx.stage.w_range is None else (ctx.stage.w_range[0], ctx.stage.w_range[1])


def _weight(ctx: StageContext, steps: int) -> str:
    weight: str = ctx.stage.weight_at.get(steps, ctx.stage.weight)
    return weight


def _student(ctx: StageContext, teacher: NetworkDenoiser, steps: int) -> NetworkDenoiser:
    """A copy of the teacher, or the progressively distilled student of as many steps if there is one."""
    stage = ctx.stage
    w_range = _w_range(ctx)
    halved = list(ctx.inputs_of_kind("halve").values())
    if halved:
        student = on_schedule(load_model(ctx, halved[0] / f"steps_{steps}"), stage.schedule)
    elif w_range is not None and w_range[0] < w_range[1]:
        student = with_guidance_input(teacher, w_range=w_range)
    else:
        student = copy.deepcopy(teacher)
    student = _trainable(ctx, student)
    student.trained = Trained("moments", steps, w_range if student.takes_guidance else None)
    return student


def _auxiliary(ctx: StageContext, teacher: NetworkDenoiser, student: NetworkDenoiser) -> NetworkDenoiser:
    """A copy of the teacher that takes w if the student does."""
    guidance = config_of(student)["guidance"]
    if guidance is None:
        return _trainable(ctx, copy.deepcopy(teacher))
    return _trainable(ctx, with_guidance_input(teacher, guidance["form"], tuple(guidance["w_range"])))


def _trainable(ctx: StageContext, denoiser: NetworkDenoiser) -> NetworkDenoiser:
    return with_dropout(denoiser, ctx.stage.dropout).to(ctx.device).requires_grad_(True)


def _preconditioner(ctx: StageContext, teacher: NetworkDenoiser, steps: int) -> dict[str, Tensor]:
    """Adam's, from a few batches, or as the teacher's training left it in its last checkpoint."""
    if ctx.stage.preconditioner_batches:
        weight = _weight(ctx, steps)
        return estimate_preconditioner(
            teacher, _batches(ctx, teacher),
            weight="flat" if weight == "adaptive" else weight, weight_shift=ctx.stage.weight_shift,
        )  # fmt: skip
    ((name, folder),) = ctx.inputs_of_kind(*TEACHERS).items()
    found = load_latest(folder / "checkpoints", lambda text: ctx.console.print(text, style="yellow"))
    if found is None:
        key = f"stages.{ctx.stage.name}.preconditioner_batches=0"
        raise ConfigError(f"{key}: {folder / 'checkpoints'} is empty; give a number of batches to measure it on")
    options, squares = ctx.config.stages[name], {}
    for i, (weight, value) in enumerate(teacher.named_parameters()):  # Adam numbers them in this order
        square = found.tensors.get(f"optimizer/denoiser/{i}/exp_avg_sq")
        squares[weight] = torch.zeros_like(value) if square is None else square.to(ctx.device)  # None: had no gradient
    return adam_preconditioner(squares, found.step, options.betas[1], options.eps)


def _batches(ctx: StageContext, teacher: NetworkDenoiser) -> Iterator[tuple[Tensor, Cond, Tensor]]:
    """Images, conditions and seeds for the preconditioner."""
    split = with_masks(conditioned(training_split(ctx.config, ctx.stage), teacher), ctx.config, teacher).to(ctx.device)
    seed = stage_seed(ctx, PRECONDITIONER)
    order = Order(len(split), ctx.stage.batch_size, seed)
    for n in range(ctx.stage.preconditioner_batches):
        positions = order.positions(n)
        seeds = sample_seeds(seed, n, positions.to(ctx.device))
        x, cond = split.take(order.indices(positions).to(ctx.device), seeds)
        yield x, cond, seeds
