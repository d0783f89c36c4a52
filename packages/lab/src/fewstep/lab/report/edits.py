"""Editing and inpainting by prompt as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.lab.evaluation.rows import Row
from fewstep.lab.pictures import Pixels, enlarged, tile, to_bytes
from fewstep.lab.report.tables import DASH, Table, percent

METHODS = {
    "source": "no edit", "noise": "resampled from noise", "edited": "edited", "told": "told what is known at each step",
    "trained": "trained with masks",
}  # fmt: skip
HEADER = ("task", "method", "model", "steps", "strength", "NFE", "success", "prompt holds", "changed", "others kept")
COLUMNS = 8  # of the picture
GREY = 0.0  # of what is hidden


def markdown(results: Mapping[str, Any], prompts: Sequence[str]) -> str:
    """What `table.md` holds."""
    rows = [[row["task"], METHODS[row["method"]], *_sampled(row), *_shares(row)] for row in results["rows"]]
    groups = [i for i, row in enumerate(results["rows"]) if row["method"] == "source"]
    settings = results["settings"]
    note = (
        f"{settings['prompts']} held-out scenes, one object of each with another colour or shape in the prompt; w = "
        f"{settings['w']:g} (w = 0 is no guidance, Stable Diffusion's guidance scale is 1 + w). *Success*, with its "
        "binomial 95 % interval (Wilson): the *prompt holds* as the checker reads the picture (number, shapes, "
        "colours, sizes, relation, place), the object is *changed* (one of the new kind within "
        f"{settings['reach']:g} pixels of its place) and all *others* are *kept* (same shape and colour, as near); of "
        f"inpainting also: every known pixel bit for bit ({_known(results['rows'])}). *Inpaint*: the object's bounding "
        f"box and {settings['margin']:g} pixels around it are hidden; *resampled from noise* is pasted into what is "
        "known. *Strength*: share of the way back to noise. *NFE*: network evaluations per image."
    )
    shown = f"In `edits.png`: {'; '.join(prompts[:COLUMNS])}. {legend(results)}"
    table = Table(HEADER, rows, text_columns=3, groups=frozenset(groups)).markdown()
    return f"{table}\n{note}\n\n{shown}\n"


def _sampled(row: Row) -> list[str]:
    if not row["steps"]:
        return [DASH] * 4
    return [row["model"], str(row["steps"]), f"{row['strength']:g}", str(row["nfe"])]


def _shares(row: Row) -> list[str]:
    success = row["success"]
    interval = f"{percent(success['share'])} ({100 * success['low']:.1f}–{100 * success['high']:.1f})"
    return [interval, *(percent(row[part]["share"]) for part in ("prompt", "changed", "kept"))]


def _known(rows: Sequence[Row]) -> str:
    worst = min(row["known"]["share"] for row in rows if row["task"] == "inpaint")
    return f"of {percent(worst)} of pictures in every row" if worst < 1 else "of all pictures in every row"


def pictured(results: Mapping[str, Any]) -> list[int]:
    """Rows that the picture shows: of editing those of the headline's strength, and samples of the headline alone."""
    settings, found = results["settings"], []
    for i, row in enumerate(results["rows"]):
        edited = row["method"] == "edited" and row["strength"] == settings["headline_strength"]
        noise = row["method"] == "noise" and row["steps"] == settings["headline"]
        if edited or noise or row["method"] in ("told", "trained"):
            found.append(i)
    return found


def legend(results: Mapping[str, Any]) -> str:
    """What the rows of the picture are, from above."""
    rows = [results["rows"][i] for i in pictured(results)]
    names = {task: [_name(row) for row in rows if row["task"] == task] for task in ("edit", "inpaint")}
    return "Rows: the scenes; " + "; ".join(names["edit"]) + "; what is hidden; " + "; ".join(names["inpaint"]) + "."


def _name(row: Row) -> str:
    return f"{row['task']}, {METHODS[row['method']]}, {row['model']}, {row['steps']} steps"


def picture(results: Mapping[str, Any], scenes: Tensor, hidden: Tensor, made: Sequence[Tensor]) -> Pixels:
    """The first scenes (N, C, H, W), what became of them, the scenes with what was hidden, and what became of these.

    made: pictures of every row of the table.
    """
    shown = [(results["rows"][i]["task"], made[i]) for i in pictured(results)]
    edits, paintings = ([images for what, images in shown if what == task] for task in ("edit", "inpaint"))
    rows = [scenes, *edits, torch.where(hidden, GREY, scenes), *paintings]
    columns = min(COLUMNS, len(scenes))
    return tile(np.concatenate([enlarged(to_bytes(images[:columns].clamp(-1, 1))) for images in rows]), columns)
