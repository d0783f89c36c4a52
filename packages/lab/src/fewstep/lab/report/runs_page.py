"""One page for any number of runs: FID and IS by cost, over w, samples from the same noise, tables for papers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from fewstep.lab.checkpoint import write_text
from fewstep.lab.report.grids import sheet
from fewstep.lab.report.parts import picture, remark, scroll
from fewstep.lab.report.runs import Measured, Point, curves, families
from fewstep.lab.report.style import OTHER_STYLES, STEP_STYLES, count_steps, plain_log, step_style, style
from fewstep.lab.report.tables import DASH, Table, fixed, seconds

STYLES = (*STEP_STYLES.values(), *OTHER_STYLES)
DASHES = ("-", "--", ":", "-.")
MARK = "†"
MOST = 20  # samples in a row
TITLE = "Few-step samplers, compared"


def write_runs(found: Sequence[Measured], out: Path) -> Path:
    """Write `index.html`, its pictures (PNG, PDF), `table.md` and `table.tex` into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    body, markdown, latex = [f"<header>\n<h1>{TITLE}</h1>\n</header>"], [], []
    for number, (family, group) in enumerate(families(found).items()):
        body += [f"<h2>{escape(family)}</h2>"]
        body += [picture(file, text) for file, text in _pictures(group, out, number)]
        table, origin = results_table(group), origins(group)
        body += [scroll(table), remark(escape(note(group))), scroll(origin)]
        markdown += [f"**{family}**\n\n{table.markdown()}\n{note(group)}\n\n{origin.markdown()}"]
        latex += [f"% {family}\n{table.latex()}\n% {note(group)}\n{origin.latex()}"]
    write_text(out / "table.md", "\n".join(markdown))
    write_text(out / "table.tex", "\n".join(latex))
    template = Template(files("fewstep.lab.report").joinpath("page.html").read_text(encoding="utf-8"))
    write_text(out / "index.html", template.substitute(title=TITLE, body="\n".join(body)))
    return out / "index.html"


def results_table(group: Sequence[Measured]) -> Table:
    """A row for every set of samples, with KID if any has one; the lowest FID of a measurement in bold on the page."""
    kid = ["KID"] if any(point.kid is not None for one in group for point in one.points) else []
    header = ("run", "sampler", "steps", "NFE", "w", "FID", *kid, "IS", "per image", "samples")
    rows: list[list[str]] = []
    groups, marks = set[int](), dict[tuple[int, int], str]()
    for one in group:
        groups.add(len(rows))
        known = [point.fid for point in one.points if point.fid is not None]
        for point in one.points:
            if known and point.fid == min(known):
                marks[len(rows), 5] = "good"
            rows.append([
                one.name, point.name, str(point.steps or DASH), str(point.nfe or DASH), f"{point.w:g}",
                fixed(point.fid, 2) + (MARK if point.few else ""), *(fixed(point.kid, 4) for _ in kid),
                fixed(point.score, 2),
                DASH if point.seconds is None else seconds(point.seconds), f"{point.samples:,}",
            ])  # fmt: skip
    return Table(header, rows, text_columns=2, groups=frozenset(groups), marks=marks)


def origins(group: Sequence[Measured]) -> Table:
    """Where the figures come from."""
    return Table(("run", *group[0].facts), [[one.name, *one.facts.values()] for one in group], text_columns=9)


def note(group: Sequence[Measured]) -> str:
    """What the table's columns are."""
    text = (
        "NFE: network evaluations per image. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). Per "
        "image: seconds of sampling alone, on the hardware below. FID and IS depend on the number of samples: compare "
        "rows of equally many."
    )
    few = sorted({point.few for one in group for point in one.points if point.few})
    return text + "".join(f" {MARK} {each}." for each in few)


def _pictures(group: Sequence[Measured], out: Path, number: int) -> Iterator[tuple[str, str]]:
    """Each as a PNG and a PDF; (PNG, caption)."""
    drawn = [("cost", cost(group), "<b>FID and IS by cost.</b> Where several w were measured, that of the lowest FID.")]
    if over_w(group):
        drawn.append(("pareto", pareto(group), "<b>FID against IS over w.</b> A curve for each model and its steps."))
    for index, together in enumerate(same_noise(group)):
        drawn.append((f"samples{index}", samples(together), "<b>Samples.</b> The same noise down a column."))
    with style():
        for name, figure, caption in drawn:
            for suffix in ("pdf", "png"):
                figure.savefig(out / f"{name}_{number}.{suffix}")
            yield f"{name}_{number}.png", caption


def best(points: Sequence[Point]) -> list[Point]:
    """Of every number of steps the w of the lowest FID, the cheapest first."""
    found: dict[int, Point] = {}
    for point in points:
        if point.fid is not None and point.nfe and (
            point.steps not in found or point.fid < (found[point.steps].fid or 0.0)
        ):  # fmt: skip
            found[point.steps] = point
    return sorted(found.values(), key=lambda point: point.nfe)


def cost(group: Sequence[Measured]) -> Figure:
    """FID and IS against NFE and seconds per image: a colour for each model and sampler, a dash for each run."""
    figure = Figure((9.6, 6.0))
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    found = curves(group)
    runs, names = (list(dict.fromkeys(key[i] for key in found)) for i in range(2))
    for (run, name), points in found.items():
        colour, marker = STYLES[names.index(name) % len(STYLES)]
        look = {"color": colour, "marker": marker, "ms": 4.5, "mec": "white", "mew": 0.5, "lw": 1.2,
                "ls": DASHES[runs.index(run) % len(DASHES)], "label": f"{run}: {name}"}  # fmt: skip
        line = best(points)
        for row, measure in zip(panels, ("fid", "score"), strict=True):
            for axes, by in zip(row, ("nfe", "seconds"), strict=True):
                known = [p for p in line if getattr(p, by) is not None and getattr(p, measure) is not None]
                axes.plot([getattr(p, by) for p in known], [getattr(p, measure) for p in known], **look)
    for axes in panels.flat:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(True, axis="both")
    plain_log(panels[0][0])
    for row, text in zip(panels, ("FID (lower is better)", "inception score (higher is better)"), strict=True):
        row[0].set_ylabel(text)
    for axes, text in zip(panels[1], ("network evaluations per image", "seconds per image"), strict=True):
        axes.set_xlabel(text)
    figure.tight_layout()
    _legend(figure, *panels[0][0].get_legend_handles_labels())
    return figure


def over_w(group: Sequence[Measured]) -> dict[str, dict[int, list[Point]]]:
    """For each model and sampler of which several w were measured, its points by w for each number of steps."""
    found = {}
    for (run, name), points in curves(group).items():
        known = sorted((p for p in points if p.fid is not None and p.score is not None), key=lambda point: point.w)
        lines = {steps: [p for p in known if p.steps == steps] for steps in sorted({p.steps for p in known})[::-1]}
        several = {steps: line for steps, line in lines.items() if len({p.w for p in line}) > 1}
        if several:
            found[f"{run}: {name}"] = several
    return found


def pareto(group: Sequence[Measured]) -> Figure:
    """FID against IS: a panel for each model and sampler, a curve for each number of steps, a point for each w."""
    shown = over_w(group)
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure((3.1 * columns + 0.9, 2.6 * lines + 0.5))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    handles: dict[int, Artist] = {}
    for axes, (name, by_steps) in zip(panels.flat, shown.items(), strict=False):
        for steps, points in by_steps.items():
            colour, marker = step_style(steps)
            handles[steps], *_ = axes.plot(
                [p.score for p in points], [p.fid for p in points], color=colour, marker=marker, ms=4, lw=1.1,
                mec="white", mew=0.5,
            )  # fmt: skip
        axes.set_title(name, fontsize=9)
        plain_log(axes)
        axes.grid(True, axis="both")
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("inception score (higher is better)", fontsize=10)
    figure.supylabel("FID (lower is better)", fontsize=10)
    figure.tight_layout()
    steps_shown = sorted(handles, reverse=True)
    _legend(figure, [handles[n] for n in steps_shown], [count_steps(n) for n in steps_shown])
    return figure


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    figure.legend(list(handles), list(labels), loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def same_noise(group: Sequence[Measured]) -> list[list[Measured]]:
    """Those whose images are from the same noises: of one seed, one size and as many classes."""
    found: dict[tuple[object, ...], list[Measured]] = {}
    for one in group:
        if one.grids:
            shape = next(iter(one.grids.values())).shape
            found.setdefault((one.seed, *shape[1:], one.classes), []).append(one)
    return list(found.values())


def samples(together: Sequence[Measured]) -> Figure:
    """Rows: what each run shows; columns: the same noise."""
    rows = [(f"{one.name}: {name}", one.grids[name]) for one in together for name in sorted(one.grids, key=_by_number)]
    fewest = min(len(images) for _, images in rows)
    classes = together[0].classes if together[0].classes <= fewest else 1
    canvas, centres, _ = sheet([(name, images[:fewest]) for name, images in rows], MOST // classes, classes, apart=0)
    figure = Figure((8.2, 0.36 * len(rows) + 0.4))
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest", aspect="equal")
    axes.set_yticks(centres, [name for name, _ in rows])
    axes.set_xticks([])
    axes.tick_params(length=0, pad=4)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def _by_number(name: str) -> list[tuple[int, str]]:
    """Numbers by their value, the largest first: 16 steps before 8."""
    return [(-int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
