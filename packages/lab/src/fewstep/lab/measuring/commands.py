"""`fewstep stats` and `fewstep measure`: reference statistics of images, and FID and the rest of samples."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fewstep.lab.config import ConfigError
from fewstep.lab.sample import MODEL, add_cluster, add_drawing, check_shards, require

if TYPE_CHECKING:
    from fewstep.lab.measuring.images import Images
    from fewstep.lab.measuring.job import Extraction

KEYS = "key=value"


def add_commands(commands: Any) -> None:
    """Both."""
    stats = commands.add_parser("stats", help="write reference statistics of images, to measure FID against")
    stats.add_argument("path", help="an experiment (its training images), samples, or a folder of image files")
    stats.add_argument("overrides", nargs="*", default=[], metavar=KEYS, help="keys of the experiment")
    stats.add_argument("--out", required=True, metavar="FILE.npz", help="where to; readable by others too")
    stats.add_argument("--chunk", type=int, default=250, help="images at once")
    stats.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    _add_extractor(stats)
    stats.set_defaults(command=stats_command)
    measure = commands.add_parser("measure", help="measure samples on disk, or those of a model as they are drawn")
    measure.add_argument("--samples", metavar="PATH", help="samples.safetensors, a folder of shards or of image files")
    measure.add_argument("--model", metavar="DIR", help=f"draw them from this model instead: {MODEL}")
    add_drawing(measure, num=50_000)
    reference = "statistics (ours, ADM's, EDM's), or images: these alone also give KID, precision and recall"
    measure.add_argument("--reference", required=True, metavar="PATH", help=reference)
    measure.add_argument("--out", required=True, metavar="DIR", help="folder for results.json and the features")
    measure.add_argument("--keep-samples", action="store_true", help="keep what is drawn, in shards")
    measure.add_argument("--clip", metavar="DIR", help="CLIP of transformers, for the score of samples with prompts")
    measure.add_argument("--splits", type=int, default=10, help="parts that IS is the mean of")
    measure.add_argument("--allow-few-samples", action="store_true", help="also FID of fewer samples than features")
    add_cluster(measure)
    _add_extractor(measure)
    measure.set_defaults(command=measure_command)


def _add_extractor(parser: argparse.ArgumentParser) -> None:
    features = "inception-v3-compat, clip-vit-b-32, dinov2-vit-l-14, ..., or the folder of a classifier"
    parser.add_argument("--features", default="inception-v3-compat", metavar="NAME", help=features)
    parser.add_argument("--weights", metavar="FILE", help="its weights; default: in torch's cache")


def stats_command(args: argparse.Namespace, console: Console) -> int:
    """Write the statistics; features are kept beside the file until it is there, so that a killed call goes on.

    Raises:
        ConfigError: no images, no such extractor, or its weights are missing.
    """
    from fewstep.lab import distributed
    from fewstep.lab.measuring.images import open_images
    from fewstep.lab.measuring.job import Extraction, summarise
    from fewstep.lab.metrics import Statistics

    out = Path(args.out)
    require(out.suffix == ".npz", "--out", args.out, "a file that ends in .npz")
    require(args.chunk >= 1, "--chunk", args.chunk, "1 or more")
    images, parts = open_images(args.path, args.overrides), out.with_suffix(".parts")
    work = Extraction(images, args.features, str(parts), args.chunk, args.device, args.weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    _make(work, console)
    if distributed.is_main():
        moments = summarise(work, splits=1).moments
        extractor, resolution = work.extractor, images.resolution
        found = Statistics(
            moments.mean, moments.covariance, extractor.name, extractor.weights, resolution, moments.count
        )
        found.save(out)
        shutil.rmtree(parts)
        size = f"{moments.count:,} images of {resolution} x {resolution}, {len(moments.mean):,} features"
        console.print(f"{out}: {extractor.name} of {size}", markup=False, highlight=False)
    distributed.stop()
    return 0


def measure_command(args: argparse.Namespace, console: Console) -> int:
    """Extract the features that are missing, here or by a job array, and write `results.json`.

    Raises:
        ConfigError: an argument that cannot be, or missing weights.
        ValueError: a reference of another extractor or resolution, too few samples, or samples that are not finite.
    """
    from fewstep.lab import distributed
    from fewstep.lab.cluster.choice import chosen
    from fewstep.lab.measuring.job import Extraction
    from fewstep.lab.measuring.measure import Measurement

    for name in ("num", "chunk", "splits"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "1 or more")
    args.out = str(Path(args.out).absolute())
    images = _images(args)
    require(args.splits <= images.count, "--splits", args.splits, f"{images.count} or less, the samples' number")
    work = Extraction(images, args.features, args.out, args.chunk, args.device, args.weights, args.clip)
    measurement = Measurement(work, args.reference, args.splits, args.allow_few_samples)
    cluster = chosen(args.overrides)
    check_shards(args.shards, cluster)
    if cluster.kind == "slurm":
        from fewstep.lab.cluster.arrays import submit_shards
        from fewstep.lab.measuring.measure import Collecting, Extracting

        measurement.check()
        then = Collecting(measurement)
        sharded, out = Extracting(measurement), Path(args.out)
        return submit_shards(cluster, out, args.shards, sharded, console, command=args.words, then=then)
    measurement.check()
    for each in measurement.works():
        _make(each, console)
    if distributed.is_main():
        measurement.write(console)
    distributed.stop()
    return 0


def _images(args: argparse.Namespace) -> Images:
    from fewstep.lab.distributed import pick_device
    from fewstep.lab.measuring.images import ModelImages, open_images
    from fewstep.lab.sample import spec_of
    from fewstep.lab.sample_shards import FOLDER
    from fewstep.models import load

    if (args.samples is None) == (args.model is None):
        raise ConfigError("--samples, --model: exactly one of them must be given")
    if args.samples is not None:
        return open_images(str(Path(args.samples).absolute()))
    args.model = str(Path(args.model).absolute())
    spec = spec_of(args, load(args.model, pick_device(args.device)))
    keep = str(Path(args.out) / FOLDER) if args.keep_samples else None
    return ModelImages(args.model, spec, args.num, args.device, keep)


def _make(work: Extraction, console: Console) -> None:
    """What is missing, shared with the processes that torchrun started; all wait for the last."""
    from fewstep.lab import distributed
    from fewstep.lab.distributed import pick_device

    device = pick_device(work.device)
    distributed.start(device)
    with distributed.together(device):
        work.make(distributed.rank(), distributed.world_size(), lambda: False, console)
