"""Figures of measured numbers. Every function takes the material and returns a figure, drawn in `style`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewstep.lab.report.model import Material, Row
from fewstep.lab.report.style import (
    BASELINE_STYLES,
    FAINT,
    INK,
    SAMPLER_NAMES,
    count_steps,
    plain_log,
    step_axis,
    step_style,
)

DEAR = "one guided call, which costs 2"  # undistilled samplers cannot cost less
APART = 34  # points of a curve nearer than this, in pixels of the screen, share one label


class Measure(NamedTuple):
    """A measured quantity: its key in a row, the label of its axis, whether it is logarithmic, of judged features."""

    key: str
    label: str
    log: bool
    judged: bool = False


MEASURES = (
    Measure("paired_error", "paired error (RMSE)", True),
    Measure("teacher_distance", "Fréchet distance to teacher", True, judged=True),
    Measure("fid_heldout", "FID to held-out", True, judged=True),
    Measure("is", "inception score", False, judged=True),
    Measure("accuracy", "class accuracy", False),
)


def quality(material: Material) -> Figure:
    """Every measure against steps, one column per w: students, undistilled samplers at equal NFE, the teacher."""
    weights = material.weights
    figure = Figure((2.5 * len(weights) + 0.6, 1.72 * len(MEASURES) + 0.5))
    panels = figure.subplots(len(MEASURES), len(weights), sharex=True, sharey="row", squeeze=False)
    for line, measure in zip(panels, MEASURES, strict=True):
        for axes, w in zip(line, weights, strict=True):
            quality_panel(axes, material, measure, w)
        name_axis(line[0], material, measure)
    for axes, w in zip(panels[0], weights, strict=True):
        axes.set_title(f"$w = {w:g}$" + ("  (no guidance)" if w == 0 else ""), pad=7)
    for axes in panels[-1]:
        axes.set_xlabel("network evaluations of the student")
    figure.align_ylabels(panels[:, 0])
    found = [dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) for axes in panels.flat]
    entries = {label: handle for entry in found for label, handle in entry.items()}
    figure.subplots_adjust(hspace=0.16, wspace=0.09)
    figure.legend(list(entries.values()), list(entries), loc="lower center", bbox_to_anchor=(0.5, 0.905), ncols=3)
    return figure


def name_axis(axes: Axes, material: Material, measure: Measure) -> None:
    """The measure at the left of its row and, smaller, whose features it is of."""
    axes.set_ylabel(measure.label)
    if measure.judged:
        features = ",\n".join(str(material.results["features"]).split(", "))
        axes.set_ylabel(f"{measure.label}\n{features}", fontsize=8.5, linespacing=1.15)


def quality_panel(axes: Axes, material: Material, measure: Measure, w: float) -> None:
    """One measure at one w."""
    for sampler, (colour, dashes, marker) in BASELINE_STYLES.items():
        rows = by_steps(material.rows(role="baseline", sampler=sampler, w=w), "student_steps")
        points = [row["student_steps"] for row in rows], [row[measure.key] for row in rows]
        name = f"undistilled {SAMPLER_NAMES[sampler]}"
        axes.plot(*points, color=colour, ls=dashes, marker=marker, ms=3.2, lw=1.1, label=name)
        dear = [(row["student_steps"], row[measure.key]) for row in rows if row["nfe"] > row["student_steps"]]
        for x, y in dear:
            axes.plot(x, y, color=colour, marker=marker, ms=4.6, mfc="white", ls="", zorder=3, label=DEAR)
    rows = by_steps(material.rows(role="student", w=w), "steps")
    points = [row["steps"] for row in rows], [row[measure.key] for row in rows]
    axes.plot(*points, color=INK, lw=1.2, zorder=3, label="distilled")
    for row in rows:
        colour, marker = step_style(row["steps"])
        axes.plot(row["steps"], row[measure.key], color=colour, marker=marker, ms=6, mec="white", mew=0.6, zorder=4)
    level = teacher_level(material, measure.key, w)
    if level is not None:
        floor = measure.key == "teacher_distance"
        name, dashes = ("teacher against itself (floor)", "-.") if floor else ("teacher", "--")
        axes.axhline(level, color="#b22222", lw=0.9, ls=dashes, zorder=2, label=name)
    step_axis(axes, material.steps)
    if measure.log:
        plain_log(axes)


def teacher_level(material: Material, key: str, w: float) -> float | None:
    """The teacher's own value of a measure; of the distance to the teacher, the sampling floor if it was measured."""
    row = material.row("teacher", w=w)
    value = row["floor"] if key == "teacher_distance" else row.get(key)
    return None if value is None else float(value)


def by_steps(rows: list[Row], key: str) -> list[Row]:
    """Rows in the order of their steps."""
    return sorted(rows, key=lambda row: int(row[key]))


def fid_is(material: Material) -> Figure:
    """FID against IS over w, one line per step count and one for the teacher; each point is one w."""
    figure = Figure((5.6, 4.0))
    axes = figure.subplots()
    reference = material.rows("curve", student_steps=None)[0]
    teacher = f"teacher,\n{SAMPLER_NAMES[reference['sampler']]} {reference['steps']}"
    curves: list[tuple[int | None, str, str, str]] = [(None, teacher, INK, "o")]
    curves += [(steps, count_steps(steps), *step_style(steps)) for steps in material.steps]
    for steps, name, colour, marker in curves:
        rows = sorted(material.rows("curve", student_steps=steps), key=lambda row: float(row["w"]))
        points = [row["is"] for row in rows], [row["fid_heldout"] for row in rows]
        width, order = (1.8, 5) if steps is None else (1.2, 3)
        axes.plot(*points, color=colour, marker=marker, mec="white", mew=0.5, lw=width, zorder=order, label=name)
    plain_log(axes)
    axes.margins(x=0.1)
    axes.autoscale_view()
    _name_weights(axes, sorted(material.rows("curve", student_steps=None), key=lambda row: float(row["w"])))
    features, count = material.results["features"], material.results["curve"][0]["samples"]
    axes.set_xlabel(f"inception score (higher is better)\n{features}; {count:,} samples per point")
    axes.set_ylabel(f"FID to held-out (lower is better)\n{features}")
    axes.grid(True, axis="both")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _name_weights(axes: Axes, rows: list[Row]) -> None:
    """Name w beside the teacher's points: right of them, away from the students; past the highest score to the left."""
    last, turn = (-math.inf, -math.inf), max(rows, key=lambda row: float(row["is"]))["w"]
    for row in rows:
        place = axes.transData.transform((row["is"], row["fid_heldout"]))
        if math.dist(place, last) < APART:
            continue
        last = tuple(place)
        offset, side = ((-7, -3), "right") if row["w"] > turn else ((6, -9), "left")
        text = axes.annotate(
            f"$w = {row['w']:g}$", (row["is"], row["fid_heldout"]), xytext=offset, textcoords="offset points",
            ha=side, fontsize=8.5, color=FAINT, zorder=6,
        )  # fmt: skip
        text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def stages(material: Material) -> Figure:
    """The error that the stages add: accumulated from stage to stage (line), and each one's own (bars)."""
    weights = material.weights
    figure = Figure((2.5 * len(weights) + 0.6, 2.5))
    panels = figure.subplots(1, len(weights), sharey=True, squeeze=False)
    for axes, w in zip(panels[0], weights, strict=True):
        rows = material.rows("stage_shares", w=w)
        places = range(len(rows))
        colours = [step_style(row["steps"])[0] if row["stage"] == "student" else "#a6a6a6" for row in rows]
        axes.bar(places, [row["own"] for row in rows], width=0.62, color=colours, label="own error")
        accumulated = [row["accumulated"] for row in rows]
        axes.plot(places, accumulated, color=INK, marker="o", ms=3.5, label="error to the teacher")
        axes.set_xticks(places, [stage_name(row) for row in rows], rotation=45, ha="right", rotation_mode="anchor")
        axes.set_title(f"$w = {w:g}$")
    panels[0][0].set_ylabel("paired error (RMSE)")
    panels[0][0].legend(loc="upper left")
    figure.subplots_adjust(wspace=0.09)
    return figure


def stage_name(row: Row) -> str:
    """A stage in few words: "guidance" is stage one, "32 of stage one" the same at fewer steps, else a student."""
    if row["stage"] == "stage one":
        return "stage one"
    return f"… at {row['steps']} steps" if row["stage"] == "fewer steps" else count_steps(row["steps"])


def speed(material: Material) -> Figure:
    """Speed-up over the many-step guided teacher at every batch size, beside what calls and NFE would give."""
    timing = material.results["timing"]
    figure = Figure((2.5 * len(timing) + 0.6, 2.6))
    panels = figure.subplots(1, len(timing), sharey=True, squeeze=False)
    for axes, row in zip(panels[0], timing, strict=True):
        students = by_steps(row["students"], "steps")
        steps = [student["steps"] for student in students]
        for key, name, dashes in (("ideal_by_nfe", "ideal by NFE", ":"), ("ideal_by_calls", "ideal by calls", "--")):
            axes.plot(steps, [student[key] for student in students], color=FAINT, ls=dashes, lw=1.1, label=name)
        axes.plot(steps, [s["speed_up"] for s in students], color=INK, lw=1.2, label="measured")
        for student in students:
            colour, marker = step_style(student["steps"])
            axes.plot(student["steps"], student["speed_up"], color=colour, marker=marker, ms=6, mec="white", mew=0.6)
        step_axis(axes, steps)
        plain_log(axes)
        axes.set_title(f"batch {row['batch']}")
        axes.set_xlabel("steps of the student")
    teacher = timing[0]["teacher"]
    panels[0][0].set_ylabel(
        f"speed-up over teacher,\n{SAMPLER_NAMES[teacher['sampler']]} {teacher['steps']} (extrapolated)"
    )
    panels[0][-1].legend(loc="upper right")
    figure.subplots_adjust(wspace=0.09)
    return figure


def training(material: Material) -> Figure:
    """Loss of every training against its updates."""
    names = list(material.curves)
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure((2.35 * columns, 1.85 * lines))
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        curve = material.curves[name]
        axes.plot([line["step"] for line in curve], [line["loss"] for line in curve], color="#0072b2", lw=0.9)
        axes.set_title(name)
        plain_log(axes)
        axes.set_xlim(left=0)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for line in panels:
        line[0].set_ylabel("loss")
    for index in range(len(names)):
        if index + columns >= len(names):
            panels.flat[index].set_xlabel("updates")
    figure.tight_layout(h_pad=1.0, w_pad=0.8)
    return figure


FIGURES: dict[str, Callable[[Material], Figure]] = {
    "quality": quality,
    "fid_is": fid_is,
    "stages": stages,
    "speed": speed,
    "training": training,
}
