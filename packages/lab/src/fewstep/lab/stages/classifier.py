"""The judge: a classifier trained on the training split, which measures samples and is no part of what it measures."""

import json

from fewstep.lab import distributed
from fewstep.lab.checkpoint import write_text
from fewstep.lab.classifier import Classifier, ClassifierTraining, accuracy, save_classifier
from fewstep.lab.context import StageContext
from fewstep.lab.data import load_data
from fewstep.lab.stages.fit import fit, seed_everything


def run(ctx: StageContext) -> None:
    """Train the judge; writes `model/` and `accuracy.json`, its share of right answers on both splits."""
    stage, seed, data = ctx.stage, seed_everything(ctx), load_data(ctx.config.data)
    classifier = Classifier(ctx.config.data.channels, ctx.config.data.num_classes, stage.width).to(ctx.device)
    fit(ctx, ClassifierTraining(classifier, stage.max_shift, stage.noise), seed=seed)
    if distributed.is_main():
        classifier.eval()
        splits = {"train": data.train.to(ctx.device), "heldout": data.heldout.to(ctx.device)}
        found = {name: accuracy(classifier, split) for name, split in splits.items()}
        ctx.console.print(f"{stage.name}  accuracy on held-out images {found['heldout']:.2%}", highlight=False)
        save_classifier(classifier, ctx.out / "model")
        write_text(ctx.out / "accuracy.json", json.dumps(found) + "\n")
    distributed.barrier()
