"""The teacher: a conditional denoiser whose condition is sometimes dropped, so that it can be guided."""

from fewstep.distill import DenoiserTraining
from fewstep.lab.context import StageContext
from fewstep.lab.networks import build_denoiser, with_dropout
from fewstep.lab.stages.fit import compile_networks, fit, save_model, seed_everything
from fewstep.lab.text import Prompted, encoder_for
from fewstep.models import NetworkDenoiser, TextEncoder
from fewstep.schedules import Trained


def run(ctx: StageContext) -> None:
    """Train the teacher, of captioned data together with its text encoder; writes `model/`, the averaged weights."""
    stage, seed = ctx.stage, seed_everything(ctx)
    fresh = build_denoiser(ctx.config, ctx.config.network)
    denoiser = with_dropout(fresh, stage.dropout).to(ctx.device)
    denoiser.trained = Trained("teacher")
    compile_networks(ctx, denoiser)
    trained: NetworkDenoiser | Prompted = denoiser
    if ctx.config.text is not None:
        (begun,) = ctx.inputs_of_kind("text_encoder").values() or (None,)
        encoder = TextEncoder.load(begun / "model") if begun else encoder_for(ctx.config)
        trained = Prompted(denoiser, encoder.to(ctx.device))
    method = DenoiserTraining(trained, trained.null_cond, cond_drop=stage.cond_drop, weight=stage.weight)
    fit(ctx, method, seed=seed)
    if isinstance(trained, Prompted):
        denoiser.use_text_encoder(trained.encoder)
    save_model(ctx, denoiser)
