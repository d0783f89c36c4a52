"""What the measuring stages share: the head and the tail of their `results.json`, and a line for every target."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fewstep.lab.checkpoint import write_text
from fewstep.lab.checks import few_samples
from fewstep.lab.config import Config, StageConfig
from fewstep.lab.context import StageContext
from fewstep.lab.evaluation import FORMAT
from fewstep.lab.evaluation.circumstances import circumstances


def features_of(stage: StageConfig, config: Config) -> str:
    """Whose features distances are measured in, and a mark where there are too few samples for as many features."""
    few = few_samples(stage, config) if hasattr(stage, "allow_few_samples") else None
    mark = "" if few is None else f", fewer samples ({few[1]}) than features ({few[2]}): FID means nothing"
    published = getattr(stage, "features", "")
    if published and not Path(published).is_dir():
        return f"{published} features{mark}"
    judge = {"captioned_shapes": "shape", "digits": "digit", "mnist": "digit"}.get(config.data.name, "image")
    return f"{judge}-classifier features, not Inception{mark}"


def header(ctx: StageContext, **sizes: int) -> dict[str, Any]:
    """The first entries: what was measured, with which settings, against how many images of each split."""
    data = ctx.config.data
    return {
        "format": FORMAT,
        "experiment": ctx.config.name,
        "features": features_of(ctx.stage, ctx.config),
        "settings": asdict(ctx.stage),
        "data": {"name": data.name, "classes": data.num_classes, **sizes},
    }


def made_with(ctx: StageContext, workers: int) -> dict[str, Any]:
    """Commit, seed and hardware of this process, and how many processes sampled."""
    return {**circumstances(ctx.config.seed, ctx.device), "workers": workers}


def tidy(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity are None, and floats have six digits, more than any is known to."""
    if isinstance(value, dict):
        return {key: tidy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [tidy(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_results(ctx: StageContext, results: dict[str, Any]) -> None:
    """Write `results.json`, whole or not at all."""
    write_text(ctx.out / "results.json", json.dumps(tidy(results), indent=1, allow_nan=False) + "\n")


def say_targets(ctx: StageContext, results: dict[str, Any]) -> None:
    """A line for every target."""
    for target in results["targets"]:
        mark = "ok  " if target["pass"] else ("aim " if target["aim"] else "MISS")
        limit = f"{target['kind'].replace('_', ' ')} {target['limit']:g}"
        ctx.console.print(f"{mark} {target['value']:8.4f}  {limit:14}  {target['name']}", highlight=False)
