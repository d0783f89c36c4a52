"""Whether samples show what their prompts say: read back by the checker of captioned shapes, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.lab.evaluation.plan import Draw
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.metrics import wilson
from fewstep.lab.shapes import Score, parse, read, score

UNSEEN = "unseen"  # the prompts whose combinations training never met
SHARES = ("all", "objects", "sizes", "relation", "place")


def alignment(samples: Samples, draws: Sequence[Draw], count: int) -> dict[str, dict[str, float]]:
    """For each part of what a caption says, the share of samples of which it holds, pooled over the sets.

    {"all": {"share", "low", "high", "trials"}, "objects": ..., ...}: low and high are the binomial 95 % interval
    (Wilson); a part that no prompt speaks of is left out.
    """
    return shares([one for draw in draws for one in _scores(samples, draw, count)])


def shares(found: Sequence[Score]) -> dict[str, dict[str, float]]:
    """The same of scores, for each part that any of them speaks of."""
    said = {part: [getattr(one, part) for one in found if getattr(one, part) is not None] for part in SHARES}
    return {part: share_of(values) for part, values in said.items() if values}


def _scores(samples: Samples, draw: Draw, count: int) -> list[Score]:
    return scores(samples.spec(draw).texts(0, count), torch.cat(list(samples.batches(draw, count))))


def scores(captions: Sequence[str], images: Tensor) -> list[Score]:
    """What of each caption is true of its image (N, 3, 32, 32) in about [-1, 1]."""
    found = read(images)
    return [score(parse(text), things) for text, things in zip(captions, found, strict=True)]


def share_of(found: Sequence[bool]) -> dict[str, Any]:
    """How many are true, with the binomial 95 % interval (Wilson): {"share", "low", "high", "trials"}."""
    low, high = wilson(sum(found), len(found))
    return {"share": sum(found) / len(found), "low": low, "high": high, "trials": len(found)}
