"""A grid of w x steps as a table, a heat map, and FID against IS: what one training run gives at every w."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from fewstep.lab.checkpoint import write_text
from fewstep.lab.evaluation.alignment import UNSEEN
from fewstep.lab.evaluation.grid import value
from fewstep.lab.evaluation.rows import Row
from fewstep.lab.report.style import FAINT, INK, SAMPLER_NAMES, count_steps, plain_log, step_style, style
from fewstep.lab.report.tables import DASH, Table, fixed

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A measure of the grid: its key, name, digits in the table, whether it is logarithmic, whether more is better."""

    key: str
    name: str
    digits: int
    log: bool
    more: bool


MEASURES = (
    Measured("fid_heldout", "FID to held-out", 2, True, False),
    Measured("is", "inception score", 2, False, True),
    Measured("accuracy", "class accuracy", 3, False, True),
    Measured("paired_error", "paired error (RMSE)", 3, True, False),
)


ALIGNMENT = (
    Measured("all", "captions that hold", 3, False, True),
    Measured("objects", "objects of the right shape and colour", 3, False, True),
    Measured("relation", "relations that hold", 3, False, True),
    Measured(UNSEEN, "captions of unseen combinations that hold", 3, False, True),
)


def measures(results: Results) -> tuple[Measured, ...]:
    """What these results measure: for prompts, whether they hold takes the place of class accuracy."""
    first = results["rows"][0]
    *scores, paired = (m for m in MEASURES if m.key == "paired_error" or m.key in first["mean"])
    if against := _statistics(results):
        scores = [replace(m, name=f"FID to {against}") if m.key == "fid_heldout" else m for m in scores]
    aligned = ALIGNMENT if "alignment" in first else ()
    there = [m for m in aligned if (first["unseen"] if m.key == UNSEEN else m.key in first["alignment"])]
    return (*scores, *there, paired)


def _statistics(results: Results) -> str | None:
    """The file of statistics that FID is held against; None for held-out images."""
    path = results.get("reference", {}).get("path")  # results of earlier versions do not say
    return path and Path(path).name


@dataclass(frozen=True)
class Line:
    """The rows of one stage of students, or of one undistilled sampler."""

    name: str
    rows: tuple[Row, ...]

    def at(self, w: float, steps: int) -> Row | None:
        """The row of this place, if it was measured."""
        return next((row for row in self.rows if row["w"] == w and row["column"] == steps), None)


def write_grid_report(results: Results, out: Path) -> None:
    """Write `table.md`, `heat_map.png` and `pareto.png` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Results], Figure]] = {"heat_map": heat_map, "pareto": pareto}
    with style():
        for name, draw in pictures.items():
            draw(results).savefig(out / f"{name}.png")
    write_text(out / "table.md", markdown(results))


def lines(results: Results) -> list[Line]:
    """Students in the order of their stages, then undistilled samplers."""
    groups: dict[str, list[Row]] = {}
    for row in results["rows"]:
        if row["kind"] not in ("teacher", "truth"):
            groups.setdefault(_name(row), []).append(row)
    return [Line(name, tuple(rows)) for name, rows in groups.items()]


def _name(row: Row) -> str:
    if row["kind"] == "undistilled":
        return f"undistilled {SAMPLER_NAMES[row['sampler']]}"
    return f"{row['kind']} students ({row['stage']})"


def teacher(results: Results, w: float) -> Row:
    """The teacher by its reference sampler."""
    return next(row for row in results["rows"] if row["kind"] == "teacher" and row["w"] == w)


def markdown(results: Results) -> str:
    """What `table.md` holds: whose features they are of, a table for each measure, and what the figures mean."""
    parts = [f"FID and IS: **{results['features']}**.\n"]
    parts += [f"\n**{measure.name}**\n\n{table(results, measure).markdown()}" for measure in measures(results)]
    parts.append(f"\n**{_speed_name(results)}**\n\n{speed(results).markdown()}")
    return "".join(parts) + "\n" + note(results) + "\n"


def table(results: Results, measure: Measured) -> Table:
    """One measure: a row for each line and w, a column for each number of steps, and the teacher."""
    steps = _steps(results)
    rows = []
    for line in lines(results):
        for w in _weights(results):
            cells = [_cell(line.at(w, n), measure) for n in steps]
            if any(cell != DASH for cell in cells):
                level = DASH if measure.key == "paired_error" else _cell(teacher(results, w), measure)
                rows.append([line.name, f"{w:g}", *cells, level])
    return Table(["", "w", *(count_steps(n) for n in steps), "teacher"], rows, text_columns=1)


def speed(results: Results) -> Table:
    """Images per second of each line, at its largest w, and of the teacher; with decoding where there is any."""
    steps, decoding = _steps(results), results["decoding_images_per_second"]
    rows = []
    for line in lines(results):
        w = max(row["w"] for row in line.rows)
        cells = [_speed(line.at(w, n), decoding) for n in steps]
        rows.append([line.name, f"{w:g}", *cells, _speed(teacher(results, w), decoding)])
    return Table(["", "w", *(count_steps(n) for n in steps), "teacher"], rows, text_columns=1)


def _speed_name(results: Results) -> str:
    alone = "images per second, sampling in batches of " + str(results["settings"]["chunk"])
    return alone if results["decoding_images_per_second"] is None else f"{alone} (and decoding)"


def _speed(row: Row | None, decoding: float | None) -> str:
    if row is None:
        return DASH
    alone = row["images_per_second"]
    return f"{alone:,.0f}" if decoding is None else f"{alone:,.0f} ({1 / (1 / alone + 1 / decoding):,.0f})"


def _cell(row: Row | None, measure: Measured) -> str:
    if row is None or (measure.key == UNSEEN and row["unseen"] is None):
        return DASH
    if measure.key == "paired_error":
        text = fixed(row["paired_error"], measure.digits)
    elif measure in ALIGNMENT:
        share = row["unseen"]["all"] if measure.key == UNSEEN else row["alignment"][measure.key]
        text = f"{fixed(share['share'], 3)} [{fixed(share['low'], 3)}, {fixed(share['high'], 3)}]"
    else:
        text = f"{fixed(row['mean'][measure.key], measure.digits)} ± {fixed(row['std'][measure.key], measure.digits)}"
    return f"{text} (= {row['same_as']} steps)" if row["same_as"] else text


def note(results: Results) -> str:
    """What the table's figures are, in Markdown."""
    settings = results["settings"]
    reference = settings["reference"]
    text = (
        f"Mean ± standard deviation over {settings['sampling_seeds']} sampling seeds, {settings['num_samples']:,} "
        f"samples each, against {_reference(results)}; {results['features']}. *Paired "
        f"error*: RMSE to the teacher's images by {reference['steps']} steps of {SAMPLER_NAMES[reference['sampler']]} "
        f"from the same {settings['paired_noises']:,} noises, pixels in [-1, 1] (stochastic students draw noise of "
        "their own, so theirs does not go to 0). Undistilled samplers on the guided teacher have as many network "
        "evaluations as the student of their column: for w > 0 a guided call counts two, and they get at least one. "
        "w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). One student per number of steps serves all "
        "w of a stage."
    )
    if "alignment" in results["rows"][0]:
        text += (
            " *Captions that hold*: prompts are held-out captions, and what they say is read back from the image by "
            "colour segmentation and moments (no learning): as many objects as described, each of the right shape, "
            "colour and (where said) size, and the right relation or place; in brackets the binomial 95 % interval "
            "(Wilson). *Unseen combinations*: prompts that name one which no training image contains."
        )
    for row in results["rows"]:
        if row["kind"] == "truth":
            shown = [m for m in measures(results) if m.key not in ("paired_error", UNSEEN)]
            found = ", ".join(f"{measure.name} {_cell(row, measure)}" for measure in shown)
            sampler = f"{row['steps']} steps of {SAMPLER_NAMES[row['sampler']]}"
            text += f" The teacher by {sampler}, w = {row['w']:g}: {found}."
    if any(row["same_as"] for row in results["rows"]):
        text += (
            " *(= 2 steps)*: not trained; the stochastic student of 1 step is that of 2 steps, whose jump from t = 1 "
            "reaches 0 already."
        )
    return text


def _reference(results: Results) -> str:
    """What FID is held against."""
    file = _statistics(results)
    if file is None:
        return f"the {results['data']['heldout']:,} held-out images"
    count = results["reference"]["count"]
    return f"the statistics in {file}" + (f" of {count:,} images" if count else "")


def heat_map(results: Results) -> Figure:
    """Every measure of every line: w down, steps across, one colour scale for a measure."""
    shown, weights, steps = lines(results), _weights(results), _steps(results)
    rows = measures(results)
    height = max(1.3, 0.36 * len(weights)) * len(rows) + 1.2  # inches
    figure = Figure((0.62 * len(steps) * len(shown) + 1.6, height))
    panels = figure.subplots(len(rows), len(shown), sharex=True, sharey=True, squeeze=False)
    for axes, line in zip(panels[0], shown, strict=True):
        axes.set_title(line.name.replace(" (", "\n("), fontsize=9.5)
    for measure, row in zip(rows, panels, strict=True):
        values = np.array([[[_value(line.at(w, n), measure) for n in steps] for w in weights] for line in shown])
        norm = _norm(values, measure)
        for axes, shade in zip(row, values, strict=True):
            _shade(axes, shade, norm, measure)
            axes.set_xticks(range(len(steps)), [str(n) for n in steps])
            axes.set_yticks(range(len(weights)), [f"{w:g}" for w in weights])
        row[0].set_ylabel(f"{textwrap.fill(measure.name, 22)}\n$w$", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("steps")
    figure.text(0.5, 0.0, str(results["features"]), ha="center", va="top", fontsize=8.5, color=FAINT)
    figure.subplots_adjust(bottom=0.6 / height, top=1 - 0.6 / height, hspace=0.12, wspace=0.06)
    return figure


def _shade(axes: Axes, values: Any, norm: Normalize, measure: Measured) -> None:
    """One panel: colours, and the number in each cell in ink that can be read on it."""
    axes.imshow(np.ma.masked_invalid(values), norm=norm, cmap="cividis" if measure.more else "cividis_r", aspect="auto")
    for (i, j), number in np.ndenumerate(values):
        if np.isfinite(number):
            dark = float(norm(number)) < 0.5 if measure.more else float(norm(number)) > 0.5
            text = fixed(float(number), min(measure.digits, 2))
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _norm(values: Any, measure: Measured) -> Normalize:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return LogNorm(max(low, 1e-6), max(high, 1.001e-6)) if measure.log else Normalize(low, high)


def _value(row: Row | None, measure: Measured) -> float:
    return float("nan") if row is None else value(row, measure.key)


def pareto(results: Results) -> Figure:
    """FID against the captions that hold, IS, or (of extractors without classes) the paired error, a panel per line.

    One curve per number of steps, one point per w.

    The teacher is in each.
    """
    shown = lines(results)
    columns = min(3, len(shown))
    count = -(-len(shown) // columns)
    figure = Figure((3.1 * columns + 0.9, 2.7 * count + 0.5))
    panels = figure.subplots(count, columns, sharex=True, sharey=True, squeeze=False)
    for axes, line in zip(panels.flat, shown, strict=False):
        _curves(axes, results, line)
        axes.set_title(line.name, fontsize=9.5)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for row in panels:
        row[0].set_ylabel(f"{measures(results)[0].name}\n(lower is better)")
    for index in range(len(shown)):
        if index + columns >= len(shown):
            across = next(m for m in measures(results) if m.key == _across(results["rows"][0]))
            panels.flat[index].set_xlabel(f"{across.name} ({'higher' if across.more else 'lower'} is better)")
            panels.flat[index].tick_params(labelbottom=True)
    entries = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    figure.subplots_adjust(hspace=0.25, wspace=0.08)
    figure.legend(list(entries.values()), list(entries), loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=6)
    weights, count = ", ".join(f"{w:g}" for w in _weights(results)), results["settings"]["num_samples"]
    text = f"along a curve w = {weights}; {results['features']}; {count:,} samples per point"
    figure.text(0.5, -0.02, text, ha="center", va="top", fontsize=8.5, color=FAINT)
    return figure


def _curves(axes: Axes, results: Results, line: Line) -> None:
    """The panel of one line: students (or a sampler) by their steps, over the teacher."""
    rows = [teacher(results, w) for w in _weights(results)]
    axes.plot(*_points(rows), color=INK, marker="o", ms=3, lw=1.6, zorder=2, label="teacher")
    for steps in _steps(results):
        colour, marker = step_style(steps)
        found = [row for w in _weights(results) if (row := line.at(w, steps)) is not None]
        axes.plot(*_points(found), color=colour, marker=marker, ms=4.5, mec="white", mew=0.5, lw=1.2, zorder=3,
                  label=count_steps(steps))  # fmt: skip
    plain_log(axes)
    axes.grid(True, axis="both")


def _points(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [value(row, _across(row)) for row in rows], [value(row, "fid_heldout") for row in rows]


def _across(row: Row) -> str:
    """What FID is drawn against: whether prompts hold, the inception score, or the paired error."""
    return "all" if "alignment" in row else "is" if "is" in row["mean"] else "paired_error"


def _weights(results: Results) -> list[float]:
    return [float(w) for w in results["settings"]["weights"]]


def _steps(results: Results) -> list[int]:
    return sorted(results["settings"]["steps"], reverse=True)
