"""Figures and table of a comparison: students of several stages beside the teacher at its best, by sampling seeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fewstep.lab.evaluation.comparison import TEACHER
from fewstep.lab.report.figures import Measure, name_axis
from fewstep.lab.report.grids import sheet
from fewstep.lab.report.model import Material, Row
from fewstep.lab.report.style import INK, count_steps, plain_log, step_axis
from fewstep.lab.report.tables import DASH, Table, fixed, percent, seconds

STAGE_STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"))
MEASURES = (
    Measure("fid_heldout", "FID to held-out", True, judged=True),
    Measure("recall", "recall", False, judged=True),
    Measure("spread", "spread within classes", False, judged=True),
    Measure("precision", "precision", False, judged=True),
    Measure("is", "inception score", False, judged=True),
    Measure("accuracy", "class accuracy", False),
)
# What tells of each kind of training: a key in its log, and its name.
LOGS = {
    "moment_gap": "gap of auxiliary to teacher",
    "auxiliary_mse": "auxiliary: squared error",
    "objective": "objective (eq. 9)",
    "grad_norm": "norm of gradients",
    "loss": "loss",
}


def teacher(material: Material) -> Row:
    """The row of the teacher at its best."""
    return material.row(stage=TEACHER)


def stages(material: Material) -> list[str]:
    """Names of the stages whose students are compared."""
    return list(dict.fromkeys(row["stage"] for row in material.results["rows"] if row["stage"] != TEACHER))


def best_rows(material: Material, stage: str) -> list[Row]:
    """The students of a stage, most steps first; of several w that of the lowest FID."""
    rows = material.rows(stage=stage)
    steps = sorted({row["steps"] for row in rows}, reverse=True)
    same = [[row for row in rows if row["steps"] == n] for n in steps]
    return [min(each, key=lambda row: float(row["mean"]["fid_heldout"])) for each in same]


def quality(material: Material) -> Figure:
    """Every measure against steps, a line for each stage; the teacher's value and its spread as a band."""
    figure = Figure((9.6, 5.2))
    panels = figure.subplots(2, 3, sharex=True)
    for axes, measure in zip(panels.flat, MEASURES, strict=True):
        _panel(axes, material, measure)
        name_axis(axes, material, measure)
    for axes in panels[-1]:
        axes.set_xlabel("sampling steps")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.94), ncols=len(labels))
    figure.tight_layout(rect=(0, 0, 1, 0.95), h_pad=1.0, w_pad=1.2)
    return figure


def _panel(axes: Axes, material: Material, measure: Measure) -> None:
    steps = sorted({row["steps"] for stage in stages(material) for row in material.rows(stage=stage)})
    for stage, (colour, marker) in zip(stages(material), STAGE_STYLES, strict=False):
        rows = best_rows(material, stage)
        means, stds = ([row[part][measure.key] for row in rows] for part in ("mean", "std"))
        places = [row["steps"] for row in rows]
        axes.errorbar(places, means, stds, color=colour, marker=marker, mec="white", mew=0.5, capsize=2, label=stage)
    level, spread = (teacher(material)[part][measure.key] for part in ("mean", "std"))
    axes.axhline(level, color=INK, lw=0.9, ls="--", zorder=1, label="teacher at its best")
    axes.axhspan(level - spread, level + spread, color=INK, alpha=0.08, lw=0, zorder=0)
    step_axis(axes, steps)
    if measure.log:
        plain_log(axes)


def sweep(material: Material) -> Figure:
    """FID and recall of the teacher over noise level and w, the best cell framed."""
    rows = material.results["sweep"]
    levels, weights = (sorted({row[key] for row in rows}) for key in ("noise_level", "w"))
    figure = Figure((2.4 + 1.5 * len(weights), 1.0 + 0.55 * len(levels)))
    best = min(rows, key=lambda row: float(row["fid_heldout"]))
    measures = (("fid_heldout", "FID to held-out"), ("recall", "recall"))
    for axes, (key, name) in zip(figure.subplots(1, 2), measures, strict=True):
        found = {(row["noise_level"], row["w"]): row[key] for row in rows}
        values = np.array([[found[level, w] for w in weights] for level in levels])
        axes.imshow(values, cmap="Blues_r" if key == "fid_heldout" else "Blues", aspect="auto", alpha=0.6)
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                chosen = (levels[i], weights[j]) == (best["noise_level"], best["w"])
                axes.text(j, i, f"{value:.3f}", ha="center", va="center", weight="bold" if chosen else "normal")
        axes.set_xticks(range(len(weights)), [f"{w:g}" for w in weights])
        axes.set_yticks(range(len(levels)), [f"{level:g}" for level in levels])
        axes.set_xlabel("guidance weight $w$")
        axes.set_title(name)
        axes.grid(False)
    figure.axes[0].set_ylabel("noise level")
    figure.tight_layout(w_pad=1.5)
    return figure


def samples(material: Material) -> Figure:
    """Rows: the teacher, then each stage's students; columns: classes, the same noise down a column."""
    best = [teacher(material), *(row for stage in stages(material) for row in best_rows(material, stage))]
    rows = [(_name(row), images) for row in best if (images := _images(material, row)) is not None]
    figure = Figure((8.2, 0.36 * len(rows) + 0.6))
    axes = figure.subplots()
    canvas, centres, middles = sheet(rows, 2, int(material.results["data"]["classes"]), apart=0)
    axes.imshow(canvas, interpolation="nearest", aspect="equal")
    axes.set_yticks(centres, [name for name, _ in rows])
    axes.set_xticks(middles, [str(i) for i in range(len(middles))])
    axes.tick_params(length=0, pad=4, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def _name(row: Row) -> str:
    return f"{row['stage']}, {count_steps(row['steps'])}"


def _images(material: Material, row: Row) -> Tensor | None:
    return material.grids.get(f"{row['stage']}/{row['steps']}/{row['w']:g}")


def training(material: Material) -> Figure:
    """What each training logged that says whether it goes well, against its updates."""
    shown = [(name, key) for name, lines in material.curves.items() for key in LOGS if _logs(lines, key)]
    columns = 4
    lines = -(-len(shown) // columns)
    figure = Figure((2.4 * columns, 1.8 * lines))
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, (name, key) in zip(panels.flat, shown, strict=False):
        points = [(line["step"], line[key]) for line in material.curves[name] if key in line]
        axes.plot(*zip(*points, strict=True), color="#0072b2", lw=0.9)
        axes.set_title(f"{name}:\n{LOGS[key]}", fontsize=9)
        axes.set_xlim(left=0)
        if min(value for _, value in points) > 0:
            plain_log(axes)
        else:
            axes.axhline(0, color=INK, lw=0.6)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.tight_layout(h_pad=1.0, w_pad=0.8)
    return figure


def _logs(lines: list[dict[str, float]], key: str) -> bool:
    """The loss only where nothing else is logged: that of moment matching is no error that falls."""
    own = [name for name in ("moment_gap", "objective") if any(name in line for line in lines)]
    return any(key in line for line in lines) and (key not in ("loss", "grad_norm") or (key == "loss") != bool(own))


FIGURES: dict[str, Callable[[Material], Figure]] = {
    "samples": samples,
    "quality": quality,
    "sweep": sweep,
    "training": training,
}


def table(material: Material) -> Table:
    """Every row with mean and standard deviation; ratios to the teacher at its best; what training took."""
    header = (
        "sampler", "w", "NFE", "FID held-out", "over teacher", "recall", "over teacher", "spread", "precision", "IS",
        "accuracy", "student updates", "training",
    )  # fmt: skip
    level = teacher(material)["mean"]
    rows, groups = [_cells(teacher(material), level)], set()
    for stage in stages(material):
        groups.add(len(rows))
        rows += [_cells(row, level) for row in material.rows(stage=stage)]
    return Table(header, rows, groups=frozenset(groups))


def _cells(row: Row, level: Row) -> list[str]:
    mean, std, took = row["mean"], row["std"], row["training"]
    name = f"teacher, {row['steps']} steps, noise {row['noise_level']:g}" if took is None else _name(row)
    return [
        name, f"{row['w']:g}", str(row["nfe"]), _both(mean, std, "fid_heldout", 3), _ratio(mean, level, "fid_heldout"),
        _both(mean, std, "recall", 3), _ratio(mean, level, "recall"), _both(mean, std, "spread", 2),
        fixed(mean["precision"], 3), fixed(mean["is"], 2), percent(mean["accuracy"]),
        DASH if took is None else f"{took['student_updates']:,}", DASH if took is None else seconds(took["seconds"]),
    ]  # fmt: skip


def _both(mean: Row, std: Row, key: str, places: int) -> str:
    return f"{mean[key]:.{places}f} ± {std[key]:.{places}f}"


def _ratio(mean: Row, level: Row, key: str) -> str:
    return f"{mean[key] / level[key]:.2f}×" if level[key] else DASH
