"""Measurements of any number of runs, brought to one form: what each set of samples cost and how good it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from fewstep.lab.config import ConfigError
from fewstep.lab.evaluation import FORMAT
from fewstep.lab.report.model import Row, read_grids
from fewstep.lab.report.style import SAMPLER_NAMES

SHOWN_W = 1.0  # the w whose samples are shown, if there are any


@dataclass(frozen=True)
class Point:
    """One set of samples. seconds: per image. few: why its FID means nothing. w = 0 is no guidance (scale is 1 + w).

    curve: run and name of the curve that it lies on; None for that of its measurement and its own name.
    """

    name: str
    steps: int
    nfe: int
    w: float
    seconds: float | None
    fid: float | None
    score: float | None
    samples: int
    few: str | None = None
    kid: float | None = None
    curve: tuple[str, str] | None = None


@dataclass(frozen=True)
class Measured:
    """What one `results.json` says. family: what figures must share to be compared: features and reference.

    seed: of sampling. facts: where the figures come from. grids: images (N, C, H, W) by name.
    """

    name: str
    family: str
    seed: int
    points: tuple[Point, ...]
    facts: dict[str, str]
    grids: Mapping[str, Tensor] = field(default_factory=dict)
    classes: int = 1


def read_runs(folders: Sequence[Path]) -> list[Measured]:
    """Every `results.json` with FID in these folders of runs or measurements, and in their stages.

    Raises:
        ConfigError: a folder without any, or a file that is damaged or of another version.
    """
    names = _names(folders)
    found: list[Measured] = []
    for folder, name in zip(folders, names, strict=True):
        paths = [folder / "results.json", *sorted(folder.glob("*/results.json"))]
        mine = [one for path in paths if path.is_file() and (one := _read(path, name, folder)) is not None]
        if not mine:
            right = "an experiment, the folder of a run that was evaluated, or that of `fewstep measure`"
            raise ConfigError(f"{folder}: holds no results.json with FID: must be {right}")
        found += mine
    return found


def families(found: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Those that may be compared with each other."""
    groups: dict[str, list[Measured]] = {}
    for one in found:
        groups.setdefault(one.family, []).append(one)
    return groups


def curves(group: Sequence[Measured]) -> dict[tuple[str, str], list[Point]]:
    """What a curve joins, by run and what was sampled, in the order in which it was measured.

    Students of one stage that `fewstep measure` measured one by one, at this w and that, lie on one curve.
    """
    own = sorted({point.curve[0] for one in group for point in one.points if point.curve is not None})
    short = dict(zip(own, _names([Path(run) for run in own]), strict=True)) if own else {}
    found: dict[tuple[str, str], list[Point]] = {}
    for one in group:
        for point in one.points:
            run, name = point.curve or (one.name, point.name)
            found.setdefault((short.get(run, run), name), []).append(point)
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{folders[0]}: is given twice")


def _read(path: Path, run: str, folder: Path) -> Measured | None:
    """None for measurements without FID, such as those of editing."""
    try:
        results = json.loads(path.read_text())
        if results["format"] != FORMAT:
            raise ConfigError(f"{path}: not in the format that this version reads ({FORMAT}); measure again")
        points = tuple(_points(results))
        if not points:
            return None
        name = run if path.parent == folder else f"{run}/{path.parent.name}"
        shown = _grids(results, read_grids(path.parent))
        classes = int(results.get("data", {}).get("classes", 1))
        return Measured(name, _family(results), _seed(results), points, _facts(results), shown, classes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: damaged, or not of a measurement ({error!r})") from error


def _points(results: Row) -> Iterator[Point]:
    if results.get("kind") == "measure":
        for row in results["rows"]:
            yield _of_model(row) if "model" in row else _point(row, "samples", row["few_samples"])
        return
    mark = str(results["features"]).partition("fewer samples")
    few = "".join(mark[1:]) or None
    seen: set[tuple[str, int, float]] = set()
    for section in ("teacher", "rows", "curve"):
        for row in results.get(section) or []:
            if "fid_heldout" not in row and "fid_heldout" not in row.get("mean", {}):
                return
            point = _point({"samples": results["settings"].get("num_samples"), **row, **row.get("mean", {})},
                           str(row.get("stage") or row["model"].split("/")[0]), few)  # fmt: skip
            place = (point.name, point.steps, point.w)
            if place not in seen:  # points of the curve that were measured of more samples before
                seen.add(place)
                yield point


def _of_model(row: Row) -> Point:
    """Of a model in `<run>/<stage>/model` or `<run>/<stage>/steps_<N>/model`."""
    folder = Path(row["model"])
    folder = folder.parent if folder.name == "model" else folder
    stage = folder.parent if folder.name.startswith("steps_") else folder
    point = _point(row, "/".join(folder.parts[-2:]), row["few_samples"])
    return replace(point, curve=(str(stage.parent), _sampled(stage.name, row)))


def _sampled(name: str, row: Row) -> str:
    sampler = row.get("sampler")
    what = name if sampler is None else f"{name}, {SAMPLER_NAMES.get(sampler, sampler)}"
    return f"{what} (noise {row['noise_level']:g})" if row.get("noise_level") else what


def _point(row: Row, name: str, few: str | None) -> Point:
    speed = row.get("images_per_second")
    fid = row["fid"] if "fid" in row else row["fid_heldout"]
    return Point(
        _sampled(name, row), int(row.get("steps", 0)), int(row.get("nfe", 0)), float(row.get("w", 0.0)),
        1 / speed if speed else None, fid, row.get("is"), int(row["samples"]), few, row.get("kid"),
    )  # fmt: skip


def _family(results: Row) -> str:
    reference = results.get("reference", {})
    if reference.get("path"):  # of `fewstep measure`, or of a grid against statistics
        extractor = results.get("extractor") or {"name": results["features"], "weights": results["weights"]}
        count = "an unknown number of" if reference["count"] is None else f"{reference['count']:,}"
        size = f"{reference['resolution']} x {reference['resolution']}"
        weights = f"{extractor['name']} (weights {extractor['weights'][:10]})"
        digest = reference.get("digest")
        name = Path(reference["path"]).name + (f" ({digest[:10]})" if digest else "")
        return f"{weights}, against {count} images of {size}, {name}"
    data = results["data"]
    features = str(results["features"]).split(", fewer samples")[0]
    return f"{features}, against {data['heldout']:,} held-out images of {data['name']}"


def _seed(results: Row) -> int:
    found = results.get("settings") or results.get("spec") or {"seed": 0}
    return int(found["seed"])


def _facts(results: Row) -> dict[str, str]:
    found = results["circumstances"]
    hardware = found["cpu"] if found["device"] == "cpu" else f"{found['device']}, {found['cpu']}"
    training = "" if results.get("kind") == "measure" else f"{found['seed']} (training), "
    sets = results.get("settings", {}).get("sampling_seeds", 1)
    return {
        "seeds": f"{training}{_seed(results)} (sampling)" + (f", {sets} sets" if sets > 1 else ""),
        "commit": str(found["commit"])[:10],
        "hardware": f"{hardware}, {found['threads']} threads",
        "torch": str(found["torch"]),
        "finished": str(found["finished"]),
    }


def _grids(results: Row, grids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is shown: of an evaluation at several w those at SHOWN_W, or at its last one."""
    weights = [f"{float(w):g}" for w in results.get("settings", {}).get("weights", [])]
    of_w = [key for key in grids if key.split("/")[0] in weights and key.count("/") == 1]
    if not of_w:
        return dict(grids)
    shown = f"{SHOWN_W:g}" if f"{SHOWN_W:g}" in weights else weights[-1]
    return {f"{key.split('/')[1]}, w = {shown}": grids[key] for key in of_w if key.split("/")[0] == shown}
