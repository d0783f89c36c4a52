"""The text encoder before its teacher: it learns from pictures in small what the order of words says."""

from fewstep.lab import distributed
from fewstep.lab.context import StageContext
from fewstep.lab.data import load_data
from fewstep.lab.stages.fit import fit, seed_everything
from fewstep.lab.text import new_encoder
from fewstep.lab.thumbnails import ThumbnailRegression, Thumbnails


def run(ctx: StageContext) -> None:
    """Train it; writes `model/`, with which a teacher that needs this stage begins."""
    stage, seed = ctx.stage, seed_everything(ctx)
    captions = load_data(ctx.config.data).train.captions
    assert captions is not None  # `validate` allows the stage with captioned data alone
    encoder = new_encoder(ctx.config.text, captions)
    fit(ctx, ThumbnailRegression(Thumbnails(encoder, stage.size, ctx.config.data.channels).to(ctx.device)), seed=seed)
    if distributed.is_main():
        encoder.eval().save(ctx.out / "model")
    distributed.barrier()
