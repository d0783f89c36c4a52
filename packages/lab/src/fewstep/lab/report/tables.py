"""Tables of the report, once, as rows of cells; as HTML and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from fewstep.lab.report.model import Material, Row
from fewstep.lab.report.style import SAMPLER_NAMES, count_steps

DASH = "–"


@dataclass(frozen=True)
class Table:
    """Text cells. text_columns: how many columns at the left are words. groups: indices of rows that begin a group.
    marks: (row, column) -> a class of the page's style.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    groups: frozenset[int] = frozenset()
    marks: dict[tuple[int, int], str] = field(default_factory=dict)

    def html(self) -> str:
        """The table as HTML."""
        head = "".join(f"<th{self._class(-1, i)}>{_rich(cell)}</th>" for i, cell in enumerate(self.header))
        lines = [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
        for index, row in enumerate(self.rows):
            begins = ' class="group"' if index in self.groups and index else ""
            cells = "".join(f"<td{self._class(index, i)}>{_rich(cell)}</td>" for i, cell in enumerate(row))
            lines.append(f"<tr{begins}>{cells}</tr>")
        return "<table>\n" + "\n".join(lines) + "\n</tbody>\n</table>"

    def markdown(self) -> str:
        """The table as GitHub Markdown."""
        rule = [":--" if i < self.text_columns else "--:" for i in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"

    def latex(self) -> str:
        """The table as LaTeX, with the rules of the package booktabs."""
        columns = "".join("l" if i < self.text_columns else "r" for i in range(len(self.header)))
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _tex_row(self.header), r"\midrule"]
        for index, row in enumerate(self.rows):
            lines += [r"\midrule"] if index in self.groups and index else []
            lines.append(_tex_row(row))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def _class(self, row: int, column: int) -> str:
        names = [*(["number"] if column >= self.text_columns else []), self.marks.get((row, column), "")]
        text = " ".join(name for name in names if name)
        return f' class="{text}"' if text else ""


TEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_"}, "±": r"$\pm$", "×": r"$\times$", "−": "$-$", "–": "--",
    "†": r"$\dagger$", "≤": r"$\le$", "≥": r"$\ge$", "µ": r"$\mu$",
})  # fmt: skip


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join("$w$" if cell == "w" else cell.translate(TEX) for cell in cells) + r" \\"


def _rich(text: str) -> str:
    """Escaped, with the guidance weight in italics as in the figures."""
    return "<i>w</i>" if text == "w" else escape(text).replace("w = ", "<i>w</i>&nbsp;=&nbsp;")


def number(value: float | None, digits: int = 3) -> str:
    """A value with that many significant digits and no exponent; a dash for None."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:,.{max(places, 0)}f}"


def fixed(value: float | None, places: int) -> str:
    """A value with that many decimals, for columns that are compared; a dash for None."""
    return DASH if value is None else f"{value:,.{places}f}"


def spread(mean: float, std: float) -> str:
    """A mean with its standard deviation, both to three decimals and with a true minus sign."""
    return f"{mean:.3f} ± {std:.3f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share in [0, 1] as a percentage."""
    return DASH if value is None else f"{100 * value:.1f}%"


def seconds(value: float) -> str:
    """A time with its unit."""
    if value < 1:
        return f"{number(1000 * value)} ms"
    return f"{number(value)} s" if value < 600 else f"{value / 60:.0f} min"


def to_teacher(material: Material) -> Table:
    """How near samples come to the teacher's, students beside the best undistilled sampler at equal cost."""
    header = (
        "w", "sampler", "NFE", "paired error", "best undistilled", "ratio", "distance to teacher", "best undistilled",
        "ratio",
    )  # fmt: skip

    def teacher(row: Row) -> list[str]:
        return [str(row["nfe"]), DASH, DASH, DASH, fixed(row["floor"], 3), DASH, DASH]

    def student(row: Row) -> list[str]:
        same = {"w": row["w"], "steps": row["steps"]} if row["role"] == "student" else {}
        pair, distance = (
            material.row(section, **same) if same else {} for section in ("paired_ratios", "distance_ratios")
        )
        return [
            str(row["nfe"]), fixed(row["paired_error"], 3), fixed(pair.get("baseline"), 3), times(pair.get("ratio")),
            fixed(row["teacher_distance"], 3), fixed(distance.get("baseline"), 3), times(distance.get("ratio")),
        ]  # fmt: skip

    return _by_weight(material, header, teacher, student)


def to_data(material: Material) -> Table:
    """How near samples come to the data, and whether they are what they should be; last, training images as samples."""
    header = ("w", "sampler", "FID held-out", "FID train", "KID", "IS", "precision", "recall", "accuracy")

    def cells(row: Row) -> list[str]:
        return [
            fixed(row["fid_heldout"], 2), fixed(row["fid_train"], 2), spread(row["kid"], row["kid_std"]),
            fixed(row["is"], 2), percent(row["precision"]), percent(row["recall"]), percent(row["accuracy"]),
        ]  # fmt: skip

    table = _by_weight(material, header, cells, cells)
    if material.results["teacher_data"] is None:
        return table
    ideal = cells(material.results["teacher_data"]["training_images"])
    ideal[1] = DASH  # to themselves
    rows = [*table.rows, [DASH, "training images", *ideal]]
    return Table(header, rows, text_columns=2, groups=table.groups | {len(table.rows)})


Cells = Callable[[Row], list[str]]


def _by_weight(material: Material, header: Sequence[str], teacher: Cells, student: Cells) -> Table:
    """A group of rows for each w: the teacher, the students, other students."""
    rows: list[list[str]] = []
    groups = set()
    for w in material.weights:
        groups.add(len(rows))
        first = material.row("teacher", w=w)
        rows.append([f"{w:g}", f"teacher, {named(first)}", *teacher(first)])
        judged = [material.row(role="student", w=w, steps=steps) for steps in material.steps]
        for row in judged + material.rows(role="other", w=w):
            name = "student" if row["role"] == "student" else row["stage"]
            rows.append(["", f"{name}, {count_steps(row['steps'])}", *student(row)])
    return Table(header, rows, text_columns=2, groups=frozenset(groups))


def times(ratio: float | None) -> str:
    """A ratio as "0.76×"; a dash for None."""
    return DASH if ratio is None else f"{fixed(ratio, 2)}×"


def named(row: Row) -> str:
    """A sampler and its steps in words."""
    return f"{SAMPLER_NAMES.get(row['sampler'], row['sampler'])} {row['steps']}"


def targets(material: Material) -> Table:
    """Every figure that was asked for, and whether it was reached."""
    signs = {"at_most": "≤", "at_least": "≥", "within": "1 ±"}
    rows, marks = [], {}
    for index, target in enumerate(material.results["targets"]):
        verdict = "reached" if target["pass"] else ("aim, not reached" if target["aim"] else "missed")
        marks[index, 3] = "good" if target["pass"] else ("aim" if target["aim"] else "bad")
        limit = f"{signs[target['kind']]} {target['limit']:g}"
        rows.append([target["name"], number(target["value"]), limit, verdict])
    return Table(("figure", "measured", "asked", "verdict"), rows, marks=marks)


def speed(material: Material) -> Table:
    """Seconds per batch and speed-up over the many-step guided teacher, beside the ideals."""
    timing = material.results["timing"]
    header = ["sampler", "NFE"]
    for row in timing:
        header += [f"batch {row['batch']}", "speed-up"]
    header += ["ideal by calls", "by NFE"]
    teacher = timing[0]["teacher"]
    rows = [[f"teacher, {named(teacher)}", f"{teacher['nfe']:,}"]]
    for row in timing:
        rows[0] += [seconds(row["teacher"]["seconds"]), "1×"]
    rows[0] += [DASH, DASH]
    for steps in material.steps:
        found = [next(s for s in row["students"] if s["steps"] == steps) for row in timing]
        cells = [count_steps(steps), str(found[0]["nfe"])]
        for student in found:
            cells += [seconds(student["seconds"]), f"{student['speed_up']:,.0f}×"]
        rows.append([*cells, f"{found[0]['ideal_by_calls']:,.0f}×", f"{found[0]['ideal_by_nfe']:,.0f}×"])
    return Table(header, rows)


def stages(material: Material) -> Table:
    """What each stage adds to the paired error."""
    header = ["stage"]
    for w in material.weights:
        header += [f"own, w = {w:g}", "to teacher", "share"]
    chains = [material.rows("stage_shares", w=w) for w in material.weights]
    rows = []
    for place in zip(*chains, strict=True):
        cells = [stage_name(place[0])]
        for row in place:
            cells += [fixed(row["own"], 3), fixed(row["accumulated"], 3), percent(row["share"])]
        rows.append(cells)
    return Table(header, rows)


def stage_name(row: Row) -> str:
    """A stage in words."""
    if row["stage"] == "stage one":
        return f"stage one, DPM-Solver++(2M) {row['steps']}"
    return f"stage one, DDIM {row['steps']}" if row["stage"] == "fewer steps" else count_steps(row["steps"])


def responses(material: Material) -> Table:
    """How far guidance moves samples, students beside the teacher."""
    rows = [
        [count_steps(row["steps"]), fixed(row["student"], 3), fixed(row["teacher"], 3), times(row["ratio"])]
        for row in material.rows("guidance_response")
    ]
    return Table(("student", "moves by", "teacher", "ratio"), rows)


def beside(material: Material) -> Table:
    """What else was trained, at the steps that targets are about, beside the main student: size, time, paired error."""
    headline, timing = material.results["settings"]["headline"], material.results["timing"][-1]
    students = material.rows(role="student", steps=headline)
    others = material.rows(role="other", steps=headline)
    times = {row["stage"]: row["seconds"] for row in timing["others"]}
    (times[students[0]["stage"]],) = (row["seconds"] for row in timing["students"] if row["steps"] == headline)
    rows = []
    for row in students + others:
        size = material.results["networks"][row["model"]]
        rows.append(
            [
                row["stage"], f"{row['w']:g}", f"{size['parameters']:,}", f"{size['bytes'] / 1e6:.2f} MB",
                seconds(times[row["stage"]]), fixed(row["paired_error"], 3), fixed(row["teacher_distance"], 3),
            ]
        )  # fmt: skip
    groups = frozenset({len(students)})
    header = ("students of", "w", "parameters", "on disk", f"batch of {timing['batch']}", "paired error", "distance")
    return Table(header, rows if others else [], groups=groups)


def networks(material: Material) -> Table:
    """Parameters and bytes of every network."""
    rows = [
        [name, f"{size['parameters']:,}", f"{size['bytes'] / 1e6:.2f} MB"]
        for name, size in material.results["networks"].items()
    ]
    return Table(("network", "parameters", "weights on disk"), rows)
