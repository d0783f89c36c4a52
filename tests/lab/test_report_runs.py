"""Runs are compared as they were measured: what cannot be compared stands apart, and every figure in its place."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_results import grids, results

from fewstep.lab.checkpoint import write_tensors
from fewstep.lab.cli import main
from fewstep.lab.config import ConfigError
from fewstep.lab.evaluation import FORMAT
from fewstep.lab.metrics import fewer_than_features
from fewstep.lab.report.runs import curves, families, read_runs
from fewstep.lab.report.runs_page import best, cost, over_w, results_table, same_noise, samples
from fewstep.lab.report.tables import Table


def measurement(**changes: Any) -> dict[str, Any]:
    """As `fewstep measure` writes it."""
    row = {"samples": 50_000, "extractor_share": 0.2, "model": "/runs/cifar10/halve/steps_4/model", "sampler": "ddim",
           "steps": 4, "w": 0.3, "nfe": 4, "images_per_second": 200.0, "fid": 3.21, "is": 9.1, "is_std": 0.1,
           "few_samples": None}  # fmt: skip
    found = {
        "format": FORMAT, "kind": "measure", "features": "inception-v3-compat", "weights": "ab" * 16,
        "reference": {"path": "/data/cifar10.npz", "count": 50_000, "resolution": 32}, "spec": {"seed": 7},
        "seconds": {}, "circumstances": results()["circumstances"], "rows": [{**row, **changes}],
    }  # fmt: skip
    return json.loads(json.dumps(found))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs of one experiment, the second of twice the FID, and a measurement."""
    for name, factor in (("first", 1.0), ("second", 2.0)):
        found = copy.deepcopy(results())
        for section in ("teacher", "rows", "curve"):
            for row in found[section]:
                row["fid_heldout"] *= factor
        folder = tmp_path / name / "evaluate"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(found))
        write_tensors(folder / "grids.safetensors", grids())
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "results.json").write_text(json.dumps(measurement()))
    return tmp_path


def table(markdown: str, index: int) -> list[dict[str, str]]:
    """Rows of one of the tables, by their header."""
    blocks = [block for block in markdown.split("\n\n") if block.startswith("|")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in blocks[index].splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_page_and_tables_hold_what_was_measured(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure in another run's row, or of another w, is what a reader cannot notice."""
    folders = [str(runs / name) for name in ("first", "second", "measured")]
    assert main(["report", *folders, "--out", str(runs / "page")]) == 0
    assert capsys.readouterr().out.replace("\n", "") == str(runs / "page" / "index.html")  # lines of 80 columns
    text = (runs / "page" / "table.md").read_text()
    (first,) = (row for row in results()["rows"] if row["role"] == "student" and (row["steps"], row["w"]) == (4, 1.0))
    for run, factor in (("first/evaluate", 1.0), ("second/evaluate", 2.0)):
        place = {"run": run, "sampler": "halve, DDIM", "steps": "4", "w": "1"}
        (found,) = (row for row in table(text, 0) if all(row[key] == value for key, value in place.items()))
        assert found["FID"] == f"{first['fid_heldout'] * factor:,.2f}"
        assert found["IS"] == f"{first['is']:.2f}"
        assert found["NFE"] == "4"
    (found,) = table(text, 2)
    assert (found["sampler"], found["FID"], found["per image"]) == ("halve/steps_4, DDIM", "3.21", "5.00 ms")
    (origin,) = table(text, 3)
    assert (origin["commit"], origin["seeds"]) == ("0123456789", "7 (sampling)")
    assert "inception-v3-compat (weights ababababab), against 50,000 images of 32 x 32, cifar10.npz" in text
    html = (runs / "page" / "index.html").read_text()
    for file in re.findall(r'src="([^"]+)"', html):
        assert (runs / "page" / file).stat().st_size > 5_000
    assert {"cost_0.png", "pareto_0.png", "samples0_0.png", "cost_1.png"} == set(re.findall(r'src="([^"]+)"', html))


def test_latex_has_a_cell_for_every_cell_and_no_bare_signs(runs: Path) -> None:
    """A paper that does not compile, or a % that swallows the rest of a row."""
    group = families(read_runs([runs / "first"]))
    (measured,) = group.values()
    text = results_table(measured).latex()
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in lines} == {9}
    assert len(lines) == len(results_table(measured).rows) + 1
    odd = Table(("w", "a_b"), [["50 %", "1 ± 2 & 3 #{x}†"]], text_columns=1).latex()
    assert r"\begin{tabular}{lr}" in odd
    assert r"$w$ & a\_b \\" in odd
    assert r"50 \% & 1 $\pm$ 2 \& 3 \#\{x\}$\dagger$ \\" in odd


def test_other_features_stand_apart_and_few_samples_are_marked(runs: Path) -> None:
    """FIDs of two extractors, or of 40 samples, in one table are compared by everyone who sees it."""
    found = read_runs([runs / "first", runs / "second", runs / "measured"])
    assert [len(group) for group in families(found).values()] == [2, 1]
    few = results()
    few["features"] += ", fewer samples (10) than features (16): FID means nothing"
    (runs / "first" / "evaluate" / "results.json").write_text(json.dumps(few))
    marked, other = read_runs([runs / "first", runs / "second"])
    assert marked.family == other.family
    assert all(point.few for point in marked.points)
    assert not any(point.few for point in other.points)
    shown = results_table([marked, other])
    assert {row[5][-1] == "†" for row in shown.rows if row[0] == marked.name} == {True}
    without = measurement(fid=None, kid=0.01234, few_samples="fewer; refused")
    (runs / "measured" / "results.json").write_text(json.dumps(without))
    other = measurement()
    other["reference"] |= {"path": "/data/other/cifar10.npz", "digest": "cd" * 32}
    (runs / "other").mkdir()
    (runs / "other" / "results.json").write_text(json.dumps(other))
    assert len(families(read_runs([runs / "measured", runs / "other"]))) == 2
    (refused,) = read_runs([runs / "measured"])
    shown = results_table([refused])
    cells = dict(zip(shown.header, shown.rows[0], strict=True))
    assert (cells["FID"], cells["KID"], cells["IS"]) == ("–†", "0.0123", "9.10")


def test_grids_against_statistics_stand_with_what_was_measured_against_the_same(runs: Path) -> None:
    """Of a grid in Inception's features against a file, a table with held-out images in its title misleads."""
    theirs = measurement()
    row = {**results()["rows"][0], "mean": {"fid_heldout": 4.5}}  # no score: DINOv2 knows no classes
    row = {name: value for name, value in row.items() if name not in ("fid_heldout", "is")}
    lacking = fewer_than_features(40, 2048, 50_000)
    found = {**results(), "teacher": [], "curve": [], "rows": [row], "reference": theirs["reference"],
             "features": f"inception-v3-compat features, {lacking}: FID means nothing",
             "extractor": {"name": "inception-v3-compat", "weights": theirs["weights"]}}  # fmt: skip
    (runs / "first" / "evaluate" / "results.json").write_text(json.dumps(found))
    grid, measured, other = read_runs([runs / "first", runs / "measured", runs / "second"])
    assert grid.family == measured.family != other.family
    assert [(point.fid, point.score) for point in grid.points] == [(4.5, None)]
    assert grid.points[0].few == "fewer samples (40) than features (2,048): FID means nothing"


def test_curves_take_the_w_of_the_lowest_fid_by_cost(runs: Path) -> None:
    """By whatever w came last, a sampler's curve against NFE would be a matter of order."""
    (one,) = read_runs([runs / "first"])
    line = curves([one])["first/evaluate", "halve, DDIM"]
    chosen = best(line)
    assert [point.steps for point in chosen] == sorted({point.steps for point in line})
    for point in chosen:
        assert point.fid == min(p.fid for p in line if p.steps == point.steps and p.fid is not None)


def test_students_measured_one_by_one_lie_on_one_curve(runs: Path) -> None:
    """Each point alone would have neither a curve over NFE nor one over w; another run's belong to neither."""
    for run in ("cifar10", "other/cifar10"):
        for steps, w in ((8, 0.0), (8, 0.3), (4, 0.3), (4, 0.0)):
            folder = runs / "m" / run / f"{steps}_{w:g}"
            folder.mkdir(parents=True)
            model = f"/runs/{run}/halve/steps_{steps}/model"
            found = measurement(model=model, steps=steps, nfe=steps, w=w, fid=steps + w + len(run))
            (folder / "results.json").write_text(json.dumps(found))
    found = read_runs(sorted(path.parent for path in (runs / "m").rglob("results.json")))
    names = [("runs/cifar10", "halve, DDIM"), ("other/cifar10", "halve, DDIM")]
    assert sorted(curves(found)) == sorted(names)
    for name, added in zip(names, (7, 13), strict=True):
        assert [(p.nfe, p.fid) for p in best(curves(found)[name])] == [(4, 4 + added), (8, 8 + added)]
        over = over_w(found)[": ".join(name)]
        assert {steps: [(p.w, p.fid) for p in line] for steps, line in over.items()} == {
            steps: [(0.0, steps + added), (0.3, pytest.approx(steps + 0.3 + added))] for steps in (8, 4)
        }
    assert len(cost(found).axes[0].get_lines()) == 2


def test_samples_are_side_by_side_of_one_noise_only(runs: Path) -> None:
    """Two runs of other sampling seeds in one picture would pass for the same noise."""
    found = read_runs([runs / "first", runs / "second"])
    assert [len(group) for group in same_noise(found)] == [2]
    labels = [label.get_text() for label in samples(found).axes[0].get_yticklabels()]
    assert "first/evaluate: student 4, w = 1" in labels
    assert "second/evaluate: teacher, w = 1" in labels
    other = json.loads((runs / "second" / "evaluate" / "results.json").read_text())
    other["settings"]["seed"] = 9
    (runs / "second" / "evaluate" / "results.json").write_text(json.dumps(other))
    assert [len(group) for group in same_noise(read_runs([runs / "first", runs / "second"]))] == [1, 1]


def test_folders_without_results_are_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of many folders on a line, the one that is wrong must be told."""
    (runs / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: holds no results.json with FID: must be an experiment"):
        read_runs([runs / "first", runs / "empty"])
    with pytest.raises(ConfigError, match="is given twice"):
        read_runs([runs / "first", runs / "first"])
    (runs / "first" / "evaluate" / "results.json").write_text('{"format": ')
    with pytest.raises(ConfigError, match=r"results.json: damaged"):
        read_runs([runs / "first"])
    assert main(["report", str(runs / "second"), str(runs / "measured"), "threads=1"]) == 2
    assert "threads=1: must be left out" in capsys.readouterr().err
    assert torch.isfinite(torch.tensor([p.fid for one in read_runs([runs / "second"]) for p in one.points])).all()
