"""Stage two (papers C and A, algorithms 2, 3 and 4): each student takes one step where its teacher takes two.

Every halving is a training of its own in `steps_<N>/`: fresh optimiser, learning rate annealed to 0, no average of
weights; it starts from its teacher's weights and is skipped once its own `DONE` stands.
"""

import copy
import time
from pathlib import Path

import torch

from fewstep.distill import EncoderDistillation, ProgressiveDistillation
from fewstep.distill.halving import Halving
from fewstep.distill.progressive import Kind
from fewstep.lab import record
from fewstep.lab.config import HalveConfig
from fewstep.lab.context import StageContext
from fewstep.lab.inpainting import split_for
from fewstep.lab.networks import build_denoiser, config_of, guided_student, own_network, with_dropout
from fewstep.lab.stages.fit import compile_networks, finish, fit, load_model, seed_everything
from fewstep.lab.validate_teachers import TEACHERS
from fewstep.models import GuidedDenoiser, NetworkDenoiser
from fewstep.schedules import Denoiser, Trained, sample_seeds

ROUNDING = 1e-8  # mean squared difference of x from one network by two ways


def run(ctx: StageContext) -> None:
    """Distil students of `stage.steps` steps; writes `steps_<N>/model/` for each."""
    (folder,) = ctx.inputs_of_kind("guide").values()
    (undistilled,) = ctx.inputs_of_kind(*TEACHERS).values() or (None,)
    for steps in ctx.stage.steps:
        out = ctx.out / f"steps_{steps}"
        if not record.is_done(out):
            first = steps == ctx.stage.steps[0]
            _halve(ctx, load_model(ctx, folder), undistilled if first else None, steps, out)
        folder = out


def _halve(ctx: StageContext, start: NetworkDenoiser, undistilled: Path | None, steps: int, out: Path) -> None:
    """Train the student of `steps` steps, from `start`, against it taking twice as many, or the guided teacher."""
    stage, began, seed = ctx.stage, time.monotonic(), seed_everything(ctx, steps)
    low, high = stage.w_range or _range_of(start)
    student = _student(ctx, start, first=steps == stage.steps[0])
    student.trained = Trained(stage.students, steps, (low, high))
    network = start if undistilled is None else load_model(ctx, undistilled)
    teacher = network if undistilled is None else GuidedDenoiser(network, network.null_cond).to(ctx.device)
    method = _method(stage, teacher, student, steps, (low, high))
    if stage.students == "stochastic" and steps == 1 and teacher.trained and teacher.trained.steps == 2:
        _assert_nothing_to_learn(ctx, method, seed)
        text = f"{stage.name} 1  not trained: it is the student of 2 steps, whose jump from t = 1 reaches 0 already"
        ctx.console.print(text, highlight=False)
    else:
        compile_networks(ctx, network, student)
        updates = stage.updates_for(steps)
        fit(ctx, method, out=out, updates=updates, seed=seed, label=f"{stage.name} {steps}")
    finish(ctx, student, out, began)


def _method(
    stage: HalveConfig, teacher: Denoiser, student: NetworkDenoiser, steps: int, w_range: tuple[float, float]
) -> Halving:
    """What trains students of the kind that the stage asks for."""
    if stage.students == "encoder":
        return EncoderDistillation(teacher, student, steps, w_range, stage.weight)
    kind: Kind = "stochastic" if stage.students == "stochastic" else "deterministic"
    return ProgressiveDistillation(teacher, student, steps, w_range, stage.weight, kind)


@torch.no_grad()
def _assert_nothing_to_learn(ctx: StageContext, method: Halving, seed: int) -> None:
    """The student, a copy of its teacher, answers with its targets: the loss of a batch is 0 but for rounding."""
    split = split_for(ctx.config, ctx.stage, method).to(ctx.device)
    first = torch.arange(min(len(split), ctx.stage.batch_size), device=ctx.device)
    seeds = sample_seeds(seed, 0, first)
    x, cond = split.take(first, seeds)
    _, logs = method.loss(method.draw(x, cond, seeds, 0), 0)
    assert float(logs["x_mse"]) < ROUNDING, f"{ctx.stage.name}: a copy of the 2-step student has loss {logs['x_mse']:g}"


def _student(ctx: StageContext, teacher: NetworkDenoiser, first: bool) -> NetworkDenoiser:
    """A copy of the teacher; only the first student may be a network of its own, which those after it inherit."""
    network = own_network(ctx.config, ctx.stage.student.network) if first else None
    student = copy.deepcopy(teacher)
    if network is not None:
        own = build_denoiser(ctx.config, network, teacher.prediction).to(ctx.device)
        student = guided_student(teacher, own, config_of(teacher)["guidance"]["form"], _range_of(teacher))
    return with_dropout(student, ctx.stage.dropout).to(ctx.device).requires_grad_(True)


def _range_of(teacher: NetworkDenoiser) -> tuple[float, float]:
    """The range of w that stage one trained it for."""
    low, high = config_of(teacher)["guidance"]["w_range"]
    return low, high
