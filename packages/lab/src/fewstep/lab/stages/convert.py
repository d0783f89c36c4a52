"""A teacher fine-tuned to another prediction: eps says nothing of x where there is only noise."""

import copy
from typing import cast

from fewstep.distill import DenoiserTraining
from fewstep.lab.context import StageContext
from fewstep.lab.networks import with_dropout
from fewstep.lab.stages.fit import compile_networks, fit, load_model, save_model, seed_everything
from fewstep.models import NetworkDenoiser
from fewstep.schedules import Prediction, Trained


def run(ctx: StageContext) -> None:
    """Fine-tune a copy of the teacher; writes `model/`, the averaged weights."""
    stage, seed = ctx.stage, seed_everything(ctx)
    (folder,) = ctx.inputs_of_kind("teacher", "pretrained").values()
    teacher = with_dropout(load_model(ctx, folder), stage.dropout)
    to = cast(Prediction, stage.to)
    converted = NetworkDenoiser(
        copy.deepcopy(teacher.network), teacher.schedule, to, time_input=teacher.time_input, trained=Trained("teacher"),
        text_encoder=teacher.text_encoder,
    )  # fmt: skip
    converted.to(ctx.device).requires_grad_(True)
    compile_networks(ctx, converted)
    method = DenoiserTraining(converted, converted.null_cond, cond_drop=stage.cond_drop, weight=stage.weight)
    fit(ctx, method, seed=seed)
    save_model(ctx, converted)
