"""The teacher: a conditional denoiser whose condition is sometimes dropped, so that it can be guided."""

from fewstep.distill import DenoiserTraining
from fewstep.lab.context import StageContext
from fewstep.lab.networks import build_denoiser, with_dropout
from fewstep.lab.stages.fit import compile_networks, fit, save_model, seed_everything
from fewstep.schedules import Trained


def run(ctx: StageContext) -> None:
    """Train the teacher; writes `model/`, the averaged weights."""
    stage, seed = ctx.stage, seed_everything(ctx)
    fresh = build_denoiser(ctx.config, ctx.config.network)
    denoiser = with_dropout(fresh, stage.dropout).to(ctx.device)
    denoiser.trained = Trained("teacher")
    compile_networks(ctx, denoiser)
    method = DenoiserTraining(denoiser, denoiser.null_cond, cond_drop=stage.cond_drop, weight=stage.weight)
    fit(ctx, method, seed=seed)
    save_model(denoiser, ctx.out)
