"""Encoders against reverse DDIM as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.lab.pictures import Pixels, enlarged, tile, to_bytes
from fewstep.lab.report.tables import Table, fixed, percent

NAMES = {"distilled": "distilled encoder and decoder", "ddim": "DDIM on the teacher"}
HEADER = ("", "steps", "w", "NFE", "latent RMSE", "round-trip RMSE", "transfer RMSE", "transfer accuracy")


def markdown(results: Mapping[str, Any]) -> str:
    """What `table.md` holds."""
    rows = [
        [NAMES[row["method"]], str(row["steps"]), f"{row['w']:g}", str(row["nfe"]), *_figures(row)]
        for row in results["rows"]
    ]
    settings = results["settings"]
    note = (
        f"{settings['images']} held-out images, encoded under their class and decoded under it (round trip) or under "
        f"another (transfer), clip=None. *Latent* and *transfer RMSE*: to {settings['truth_steps']} steps of DDIM on "
        "the guided teacher from the same image; *round-trip RMSE*: to the image, pixels in [-1, 1]; *transfer "
        f"accuracy*: share that the judge takes for the class asked for ({results['features']}). *NFE*: network "
        "evaluations per image, both ways together. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w)."
    )
    return Table(HEADER, rows).markdown() + "\n" + note + "\n"


def _figures(row: Mapping[str, Any]) -> list[str]:
    return [
        *(fixed(row[key], 4) for key in ("latent_rmse", "round_trip_rmse", "transfer_rmse")),
        percent(row["transfer_accuracy"]),
    ]


def picture(images: Tensor, made: list[Tensor], columns: int = 10) -> Pixels:
    """The first images (N, C, H, W), and below each what every method made of it."""
    rows = [enlarged(to_bytes(batch[:columns].clamp(-1, 1))) for batch in (images, *made)]
    return tile(np.concatenate(rows), min(columns, len(images)))
