"""The report says what the results say."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_results import STEPS, WEIGHTS, curves, grids, results
from matplotlib.figure import Figure
from PIL import Image

from fewstep.lab.config import ConfigError
from fewstep.lab.context import Interrupted
from fewstep.lab.report import Material, figures, page, read_grids, read_results, summary, tables, write_report
from fewstep.lab.report.grids import FACTOR, banner, by_class, grid_rows, sheet
from fewstep.lab.report.style import SETTINGS, STEP_STYLES, Few, step_style
from fewstep.lab.report.tables import Table, number, seconds


class Reader(HTMLParser):
    """Every table as rows of texts; files of images; tags met."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True
        elif tag == "img":
            self.images.append(str(dict(attrs)["src"]))

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data.strip("\n").replace("\xa0", " ")

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the only table whose header begins so."""
        (found,) = (rows for rows in self.tables if tuple(rows[0][: len(header)]) == header)
        return found[1:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "savefig.dpi", 50)  # a quarter: the time goes into pixels
        write_report(Material("A title & more", results(), grids(), curves()), out, "name: <digits>\n")
    return out


@pytest.fixture(scope="module")
def reader(written: Path) -> Reader:
    return Reader((written / "index.html").read_text())


def student(w: float, steps: int) -> dict[str, float]:
    return next(r for r in results()["rows"] if (r["role"], r["w"], r["steps"]) == ("student", w, steps))


def ratio(section: str, w: float, steps: int) -> dict[str, float]:
    return next(r for r in results()[section] if (r["w"], r["steps"]) == (w, steps))


def test_distances_to_the_teacher_are_the_results(reader: Reader) -> None:
    """Every number of the table is that of its own w and steps; two swapped rows would be a false claim."""
    rows = iter(reader.table("w", "sampler", "NFE"))
    for w in WEIGHTS:
        first = next(rows)
        assert first[0] == f"{w:g}"
        assert first[2] == str(64 if w == 0 else 128)
        assert first[6] == f"{0.021 + 0.004 * w:.3f}"
        for steps in STEPS:
            pair, distance = (ratio(section, w, steps) for section in ("paired_ratios", "distance_ratios"))
            row = student(w, steps)
            assert next(rows)[2:9] == [
                str(steps), f"{row['paired_error']:.3f}", f"{pair['baseline']:.3f}", f"{pair['ratio']:.2f}×",
                f"{row['teacher_distance']:.3f}", f"{distance['baseline']:.3f}", f"{distance['ratio']:.2f}×",
            ]  # fmt: skip
        if w == 1:
            assert next(rows)[1:5] == ["halve_small, 4 steps", "4", "0.117", "–"]
    assert list(rows) == []


def test_distances_to_the_data_are_the_results(reader: Reader) -> None:
    rows = [row for row in reader.table("w", "sampler", "FID held-out") if row[1].startswith("student")]
    for row, (w, steps) in zip(rows, [(w, steps) for w in WEIGHTS for steps in STEPS], strict=True):
        found = student(w, steps)
        assert row[2:] == [
            f"{found['fid_heldout']:.2f}", f"{found['fid_train']:.2f}", f"{found['kid']:.3f} ± {found['kid_std']:.3f}",
            f"{found['is']:.2f}",
            f"{100 * found['precision']:.1f}%", f"{100 * found['recall']:.1f}%", f"{100 * found['accuracy']:.1f}%",
        ]  # fmt: skip


def test_speed_table_is_the_timing(reader: Reader) -> None:
    rows = reader.table("sampler", "NFE", "batch 1")
    assert rows[0][:2] == ["teacher, DDIM 512", "1,024"]
    for row, steps in zip(rows[1:], STEPS, strict=True):
        for column, timing in zip((2, 4, 6), results()["timing"], strict=True):
            (found,) = (s for s in timing["students"] if s["steps"] == steps)
            assert row[column] == seconds(found["seconds"])
            assert row[column + 1] == f"{found['speed_up']:,.0f}×"
        assert row[-2:] == [f"{512 / steps:,.0f}×", f"{1024 / steps:,.0f}×"]


def test_targets_keep_their_verdicts(reader: Reader) -> None:
    """A missed target that reads as reached is the worst that a report can do; an unmeasured one is missed."""
    assert [(row[1], row[2], row[3]) for row in reader.table("figure", "measured", "asked")] == [
        ("0.310", "≤ 0.45", "reached"), ("0.987", "≥ 0.99", "missed"), ("0.0700", "≤ 0.06", "aim, not reached"),
        ("0.960", "1 ± 0.15", "reached"), ("–", "≤ 1.5", "missed"),
    ]  # fmt: skip


def test_other_students_stand_beside_the_main_one(reader: Reader) -> None:
    """A student of half the size: its parameters, bytes, time and error, each its own and not its neighbour's."""
    rows = reader.table("students of")
    main = [row for row in rows if row[0] == "halve"]
    assert [row[1] for row in main] == ["0", "1", "3"]
    assert [row[5] for row in main] == [f"{student(w, 4)['paired_error']:.3f}" for w in WEIGHTS]
    (fast,) = (s for s in results()["timing"][-1]["students"] if s["steps"] == 4)
    assert main[0][2:5] == ["541,000", "2.17 MB", seconds(fast["seconds"])]
    other = results()["timing"][-1]["others"][0]["seconds"]
    assert rows[-1] == ["halve_small", "1", "262,000", "1.05 MB", seconds(other), "0.117", "0.310"]


def test_stage_table(reader: Reader) -> None:
    """Stage by stage, three columns per w."""
    rows = reader.table("stage")
    for index, row in enumerate(rows):
        for place, w in enumerate(WEIGHTS):
            found = [r for r in results()["stage_shares"] if r["w"] == w][index]
            expected = [f"{found['own']:.3f}", f"{found['accumulated']:.3f}", f"{100 * found['share']:.1f}%"]
            assert row[1 + 3 * place : 4 + 3 * place] == expected


def test_readme_table_equals_the_page(written: Path) -> None:
    """The table that goes into the README is of the same numbers."""
    text = (written / "table.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    for line, steps in zip(lines[4:], STEPS, strict=True):
        for place, w in enumerate(WEIGHTS):
            row = student(w, steps)
            error = f"{row['paired_error']:.3f} ({ratio('paired_ratios', w, steps)['ratio']:.2f}×)"
            assert line[4 + 2 * place : 6 + 2 * place] == [error, f"{row['fid_heldout']:.2f} / {row['is']:.2f}"]


def test_readme_table_names_the_sampler_of_every_figure() -> None:
    """One row "DDIM 512, NFE 1,024" with the FID of another sampler, and for w = 0 twice its evaluations, is untrue."""
    rows = summary.table(Material("t", results())).rows
    assert rows[0][:2] == ["teacher, DDIM 512", "1,024 (w = 0: 512)"]
    assert "extrapolated" in rows[0][2]
    assert set(rows[0][4:]) == {"–"}
    assert rows[1][:4] == ["teacher, DPM-Solver++(2M) 64", "128 (w = 0: 64)", "–", "–"]
    assert rows[1][5] == "1.31 / 8.40"
    changed = copy.deepcopy(results())
    changed["settings"]["reference"] = changed["settings"]["truth"]
    (first, second, *_) = summary.table(Material("t", changed)).rows
    assert (first[0], first[5], second[0]) == ("teacher, DDIM 512", "1.31 / 8.40", "16 steps")


def test_readme_table_explains_itself(written: Path) -> None:
    """Standing in a README alone: brackets, features, sample counts and that 8 of 512 steps were timed."""
    text = (written / "table.md").read_text()
    assert text.startswith("FID and IS: **digit-classifier features, not Inception**.\n")
    for part in ("in brackets, its ratio", "1,000 samples", "512 steps are extrapolated from 8 timed ones"):
        assert part in text


def test_headline_says_that_the_teachers_seconds_are_extrapolated(written: Path) -> None:
    opening = (written / "index.html").read_text().split("<h2>")[0]
    assert "extrapolated from 8 of its 512 steps" in opening


def test_negative_shares_are_explained(written: Path) -> None:
    """A stage that took -12% of the error away reads like a mistake."""
    assert "It is negative where the stage came nearer" in (written / "index.html").read_text()


def test_training_images_stand_below_as_the_ideal(reader: Reader) -> None:
    """A KID of samples says nothing without that of perfect samples."""
    last = reader.table("w", "sampler", "FID held-out")[-1]
    assert last[1:5] == ["training images", "1.17", "–", "0.011 ± 0.002"]
    assert tables.spread(-0.018, 0.0185) == "−0.018 ± 0.018"


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends or [figure.axes[-1].get_legend()]
    return [text.get_text() for text in found.get_texts()]


def test_figures_say_what_their_axes_are() -> None:
    """A picture travels without its page: features, sample counts, and what "teacher" is where it is the floor."""
    material = Material("t", results(), grids())
    drawn = figures.quality(material)
    assert sum("not Inception" in axes.get_ylabel() for axes in drawn.axes) == 3
    assert {"teacher", "teacher against itself (floor)", figures.DEAR} <= set(legend(drawn))
    curve = figures.fid_is(material).axes[0]
    assert "not Inception" in curve.get_ylabel()
    assert "not Inception; 1,000 samples per point" in curve.get_xlabel()


def test_readme_picture_marks_baselines_that_cost_more() -> None:
    """At x = 1 and w > 0 the undistilled samplers' one guided call costs two evaluations; at w = 0 none is dearer."""
    material = Material("t", results(), grids())
    drawn = banner(material, 1.0)
    assert drawn.axes[1].get_xlabel() == "network evaluations of the student"
    hollow = [line for line in drawn.axes[1].lines if line.get_label() == figures.DEAR]
    assert [list(line.get_xdata()) for line in hollow] == [[1], [1]]
    assert figures.DEAR in legend(drawn)
    assert figures.DEAR not in legend(banner(material, 0.0))


def test_report_stops_between_pictures(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped before quality"):
        write_report(Material("t", results()), tmp_path, stopping=lambda: True)
    assert list(tmp_path.iterdir()) == []


def test_page_stands_alone_beside_its_pictures(written: Path, reader: Reader) -> None:
    """It must open from a disk without a network: no script, no address, every picture there and whole."""
    html = (written / "index.html").read_text()
    assert reader.tags.isdisjoint({"script", "link", "iframe"})
    assert "http" not in html
    assert sorted(reader.images) == sorted([f"samples_{w:g}.png" for w in WEIGHTS] + [
        "quality.png", "stages.png", "fid_is.png", "speed.png", "training.png"])  # fmt: skip
    for name in (*reader.images, "readme.png"):
        with Image.open(written / name) as picture:
            picture.load()
            assert min(picture.size) > 100
        assert (written / name).with_suffix(".pdf").read_bytes()[-6:].strip() == b"%%EOF"
    assert "A title &amp; more" in html
    assert "name: &lt;digits&gt;" in html


def test_features_are_named_wherever_fid_stands(written: Path) -> None:
    """Digit-classifier FID must not be taken for Inception FID: in every section and caption that has one."""
    html = (written / "index.html").read_text()
    for section in re.split("<h2>", html)[1:]:
        if "FID" in section and not section.startswith("Targets"):
            assert "digit-classifier features, not Inception" in section, section[:60]


def test_a_report_without_samples_curves_or_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed results alone still give a report, with what is missing left out and not zero."""
    changed = copy.deepcopy(results())
    for row in changed["teacher"]:
        row["floor"] = None
    changed["teacher_data"], changed["guidance_response"] = None, []
    monkeypatch.setitem(SETTINGS, "savefig.dpi", 20)
    write_report(Material("Title", changed), tmp_path)
    reader = Reader((tmp_path / "index.html").read_text())
    assert sorted(reader.images) == ["fid_is.png", "quality.png", "speed.png", "stages.png"]
    assert reader.table("w", "sampler", "NFE")[0][6] == "–"
    assert not (tmp_path / "readme.png").exists()


def test_grid_pixels_are_the_samples() -> None:
    """Enlarged pixel by pixel and in place: row 4 of class 7 is that student's image of class 7, unsmoothed."""
    material = Material("t", results(), grids())
    rows = grid_rows(material, 1.0)
    assert [label for label, _ in rows] == [
        "teacher, 64 steps", "16 steps", "8 steps", "4 steps", "2 steps", "1 step",
        "undistilled DPM-Solver++(2M), NFE 4",
    ]  # fmt: skip
    canvas, centres, middles = sheet(rows, per_class=1, classes=10)
    cell = 8 * FACTOR
    top, left = int(centres[3] - cell / 2), int(middles[7] - cell / 2)
    found = canvas[top : top + cell, left : left + cell, 0][::FACTOR, ::FACTOR]
    expected = ((grids()["1/student 4"][7, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    np.testing.assert_array_equal(found, expected)
    blocks = canvas[top : top + cell, left : left + cell, 0].reshape(8, FACTOR, 8, FACTOR)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_two_images_of_a_class_stand_side_by_side() -> None:
    """Samples come as classes 0..9, 0..9; shown they are 0 0 1 1 ..., so that a column pair is one class."""
    images = torch.arange(20).view(20, 1, 1, 1)
    assert by_class(images, 10, 2).flatten().tolist()[:6] == [0, 10, 1, 11, 2, 12]
    assert by_class(images[:10], 10, 2).flatten().tolist() == list(range(10))


def test_step_counts_look_different_from_each_other() -> None:
    """Colour and marker each tell the step counts apart, for readers who see no colour."""
    assert len({colour for colour, _ in STEP_STYLES.values()}) == len(STEP_STYLES)
    assert len({marker for _, marker in STEP_STYLES.values()}) == len(STEP_STYLES)
    assert step_style(32) not in STEP_STYLES.values()


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.018, 0.5, {0.02, 0.05, 0.1, 0.2, 0.5}),
        (1.2, 3.3, {1.5, 2.0, 2.5, 3.0}),
        (0.06, 0.45, {0.07, 0.1, 0.2, 0.3}),
        (0.01, 20.0, {0.01, 0.1, 1.0, 10.0}),
    ],
)
def test_logarithmic_axes_have_numbers_to_read(low: float, high: float, shown: set[float]) -> None:
    """Powers of ten alone leave an axis from 1.2 to 3.3 without a single number."""
    ticks = [tick for tick in Few().tick_values(low, high) if low <= tick <= high]
    assert set(np.round(ticks, 6)) == shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.04321, "0.0432"), (1.0, "1.00"), (9.999, "10.0"), (123.4, "123"), (1234.5, "1,234"), (None, "–")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    """No exponents, no more digits than are known."""
    assert number(value) == text


def test_times_have_units() -> None:
    assert [seconds(s) for s in (0.0406, 2.5, 39.5, 3600)] == ["40.6 ms", "2.50 s", "39.5 s", "60 min"]


def test_markdown_escapes_what_would_break_a_table() -> None:
    assert Table(("a|b", "c"), (("x", "1"),)).markdown().splitlines() == ["| a\\|b | c |", "| :-- | --: |", "| x | 1 |"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no results"),
        ('{"format": 2', "no results"),
        ('{"format": 9}', "evaluate again"),
        ('{"format": 1}', "evaluate again"),
    ],
)
def test_bad_results_are_one_line(tmp_path: Path, content: str | None, said: str) -> None:
    """A report of a half-written or foreign file must stop with a line that says what to do."""
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_grids_are_refused(tmp_path: Path) -> None:
    assert read_grids(tmp_path) == {}
    (tmp_path / "grids.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(ConfigError, match="evaluate again"):
        read_grids(tmp_path)


def test_results_without_a_row_say_which() -> None:
    """Not a KeyError from the depth of a figure."""
    changed = copy.deepcopy(results())
    changed["rows"] = [row for row in changed["rows"] if row["steps"] != 4]
    with pytest.raises(ConfigError, match=r"rows has no row with.*'steps': 4"):
        page.html(Material("t", changed), {})
    with pytest.raises(ConfigError, match="rows has no row with"):
        summary.table(Material("t", changed))
