"""What a report is made of: the results of an evaluation, images to show, training curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.lab.config import ConfigError
from fewstep.lab.evaluation import FORMAT

Row = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """results: `results.json`. grids: images (N, C, H, W) by "w/row". curves: lines of `metrics.jsonl` by training."""

    title: str
    results: Mapping[str, Any]
    grids: Mapping[str, Tensor] = field(default_factory=dict)
    curves: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)

    @property
    def weights(self) -> list[float]:
        """The w that everything was measured at."""
        return [float(w) for w in self.results["settings"]["weights"]]

    @property
    def steps(self) -> list[int]:
        """The students' steps, most first."""
        return sorted(self.results["settings"]["steps"], reverse=True)

    def rows(self, section: str = "rows", **wanted: Any) -> list[Row]:
        """Rows of a section of the results that have these values."""
        return [row for row in self.results[section] if all(row[key] == value for key, value in wanted.items())]

    def row(self, section: str = "rows", **wanted: Any) -> Row:
        """The only such row.

        Raises:
            ConfigError: there is none; the results are of another evaluation.
        """
        found = self.rows(section, **wanted)
        if not found:
            raise ConfigError(f"results.json: {section} has no row with {wanted}")
        return found[0]


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` of an evaluate stage.

    Raises:
        ConfigError: not there, cut short, or not written by this version.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no results of an evaluation ({error})") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ConfigError(f"{path}: not in the format that this version reads ({FORMAT}); evaluate again")
    return results


def read_grids(folder: Path) -> dict[str, Tensor]:
    """Images that the evaluate stage kept for the report; none where the file is missing.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / "grids.safetensors"
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path}: damaged ({error}); evaluate again") from error
