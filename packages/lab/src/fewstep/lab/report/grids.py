"""Sample grids: rows are samplers, columns classes, the same noise down a column."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fewstep.lab.pictures import Pixels, enlarged, to_bytes
from fewstep.lab.report.figures import Measure, quality_panel
from fewstep.lab.report.model import Material, Row
from fewstep.lab.report.style import SAMPLER_NAMES, count_steps

FACTOR = 12  # every pixel is drawn as so many, so that scaling the figure cannot make them uneven
GAP = 10  # white between images, and more of it before the last row, in enlarged pixels
APART = 34


def grid_rows(material: Material, w: float) -> list[tuple[str, Tensor]]:
    """(label, images (N, C, H, W)) of the grid of one w: the teacher, students, last the best undistilled sampler."""
    images = {key.split("/", 1)[1]: value for key, value in material.grids.items() if key.split("/", 1)[0] == f"{w:g}"}
    if not images:
        return []
    best = best_undistilled(material, w)
    return [
        (f"teacher, {material.results['settings']['reference']['steps']} steps", images["teacher"]),
        *((count_steps(steps), images[f"student {steps}"]) for steps in material.steps),
        (f"undistilled {SAMPLER_NAMES[best['sampler']]}, NFE {best['nfe']}", images[f"baseline {best['sampler']}"]),
    ]


def best_undistilled(material: Material, w: float) -> Row:
    """The undistilled sampler with the least paired error at the cost of the student that targets are about."""
    rows = material.rows(role="baseline", student_steps=material.results["settings"]["headline"], w=w)
    return min(rows, key=lambda row: float(row["paired_error"]))


def sheet(
    rows: list[tuple[str, Tensor]], per_class: int, classes: int, apart: int = APART
) -> tuple[Pixels, list[float], list[float]]:
    """The grid as one picture, and the centres of its rows and of its classes, in pixels of the picture.

    apart: white before the last row, beside what is between all.
    """
    lines = [enlarged(to_bytes(by_class(images, classes, per_class)), FACTOR) for _, images in rows]
    count, height, width = lines[0].shape[:3]
    tops = [i * (height + GAP) + (apart if i == len(lines) - 1 else 0) for i in range(len(lines))]
    lefts = [i * (width + GAP) for i in range(count)]
    canvas = np.full((tops[-1] + height, lefts[-1] + width, 3), 255, dtype=np.uint8)
    for top, line in zip(tops, lines, strict=True):
        for left, image in zip(lefts, line, strict=True):
            canvas[top : top + height, left : left + width] = image
    shown = count // classes
    middles = [(lefts[i * shown] + lefts[(i + 1) * shown - 1] + width) / 2 for i in range(classes)]
    return canvas, [top + height / 2 for top in tops], middles


def by_class(images: Tensor, classes: int, per_class: int) -> Tensor:
    """Images of classes 0, 1, ..., 0, 1, ... in the order 0, 0, ..., 1, 1, ...; fewer where there are not so many."""
    per_class = max(1, min(per_class, len(images) // classes))
    order = [copy * classes + index for index in range(classes) for copy in range(per_class)]
    return images[[i for i in order if i < len(images)]]


def draw(axes: Axes, material: Material, w: float, per_class: int) -> None:
    """The grid of one w: pixels are squares, rows named at the left, classes above."""
    rows = grid_rows(material, w)
    canvas, centres, middles = sheet(rows, per_class, int(material.results["data"]["classes"]))
    axes.imshow(canvas, interpolation="nearest", aspect="equal")
    axes.set_yticks(centres, [label for label, _ in rows])
    axes.set_xticks(middles, [str(i) for i in range(len(middles))])
    axes.tick_params(length=0, pad=4, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def samples(material: Material, w: float, per_class: int = 2) -> Figure:
    """The grid of one w, `per_class` images of every class side by side."""
    figure = Figure((8.2, 4.2))
    axes = figure.subplots()
    draw(axes, material, w, per_class)
    axes.set_title(f"$w = {w:g}$", pad=10)
    return figure


def banner(material: Material, w: float) -> Figure:
    """The picture of the README: samples of every step count, and the paired error beside undistilled samplers."""
    figure = Figure((10.4, 3.7))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw(left, material, w, per_class=1)
    quality_panel(right, material, Measure("paired_error", "", True), w)
    right.set_ylabel("paired error to the teacher (RMSE)")
    right.set_xlabel("network evaluations of the student")
    handles, labels = right.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    right.legend(
        list(entries.values()), list(entries), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handlelength=1.7
    )
    left.set_title(f"same noise, guidance $w = {w:g}$", pad=10)
    figure.subplots_adjust(wspace=0.19)
    return figure
