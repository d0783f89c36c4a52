"""The text encoder before its teacher: it learns from pictures in small what the order of words says."""

from fewstep.lab import distributed
from fewstep.lab.context import StageContext
from fewstep.lab.stages.fit import fit, seed_everything
from fewstep.lab.text import encoder_for
from fewstep.lab.thumbnails import ThumbnailRegression, Thumbnails


def run(ctx: StageContext) -> None:
    """Train it; writes `model/`, with which a teacher that needs this stage begins."""
    stage, seed = ctx.stage, seed_everything(ctx)
    encoder = encoder_for(ctx.config)
    fit(ctx, ThumbnailRegression(Thumbnails(encoder, stage.size, ctx.config.data.channels).to(ctx.device)), seed=seed)
    if distributed.is_main():
        encoder.eval().save(ctx.out / "model")
    distributed.barrier()
