"""`fewstep profile kernels`: what it shows is what the file holds, and it measures here too."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from profile_results import MADE, results_file

from fewstep.kernels.benchmark.results import KEY, Results, read
from fewstep.kernels.benchmark.summary import geometric_mean, lines
from fewstep.lab.cli import main
from fewstep.lab.profile import figures, tables

FIGURES = ("roofline", "networks", *(f"{kind}_{op}" for kind in ("ratio", "against") for op in (
    "group_norm_silu", "attention", "attention_qkv", "guided_update", "layer_norm_modulate")))  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as a GPU run leaves it."""
    return results_file(tmp_path_factory.mktemp("source") / "an_example_gpu.json")


def row(op: str, backend: str, us: float, name: str = "forward", **more: Any) -> dict[str, Any]:
    return {
        "op": op, "pass": name, "shape": "a/b 1x2", "dtype": "bf16", "layout": "l", "backend": backend, "us": us,
        "spread": 0.0, "bytes": 4_000_000, "flops": 0, **MADE, **more,
    }  # fmt: skip


def test_speed_ups_by_hand() -> None:
    """The figure of the README: ours is what auto picks, held against the fastest of PyTorch's."""
    rows = [row("x", "triton", 10.0), row("x", "cuda", 8.0), row("x", "eager", 40.0), row("x", "compile", 16.0)]
    (line,) = lines(rows)
    assert line.speed_up() == 2.0
    assert line.speed_up("eager") == 5.0
    assert line.speed_up("flash") is None
    picked = {**row("x", "auto", 0.0), "picked": "triton"}
    del picked["us"]
    (line,) = lines([*rows, picked])
    assert line.ours is not None
    assert line.ours["backend"] == "triton"
    assert line.speed_up() == 1.6
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None


def test_a_pick_holds_for_both_passes() -> None:
    """Dispatch is asked once, before the forward pass; the backward pass runs on the same backend."""
    pick = {**row("x", "auto", 0.0), "picked": "triton"}
    del pick["us"]
    times = {"triton": 10.0, "cuda": 8.0, "eager": 20.0}
    (line,) = lines([pick, *(row("x", name, us, "backward") for name, us in times.items())])
    assert line.speed_up() == 2.0


def test_where_pytorchs_attention_is_picked_its_time_is_ours_and_our_kernels_are_told_apart() -> None:
    """After dispatch nothing is slower than PyTorch; what our kernels alone would give must not hide behind that."""
    pick = {**row("attention", "auto", 0.0), "picked": "triton"}
    trained = {**row("attention", "auto", 0.0, "backward"), "picked": "reference"}
    del pick["us"], trained["us"]
    times = {"triton": 10.0, "eager": 8.0, "cudnn": 6.0}
    rows = [row("attention", name, us, way) for name, us in times.items() for way in ("forward", "backward")]
    forward, backward = lines([pick, trained, *rows])
    assert forward.speed_up() == forward.own_speed_up() == pytest.approx(0.6)
    assert backward.speed_up() == pytest.approx(0.75)
    assert backward.own_speed_up() == pytest.approx(0.6)
    cells = tables.comparison([pick, trained, *rows]).rows
    assert ["attention", "backward", "own kernels alone, 0 of 1 won", *[""] * 8, "0.60×"] in cells


@pytest.mark.parametrize("width", ["60", "80", "200"])
def test_no_figure_is_folded_or_cut(
    width: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into a file or a narrow window: a column of three characters shows nothing that anybody can read."""
    monkeypatch.setenv("COLUMNS", width)
    command = ["profile", "kernels", "--from", str(source), "--op", "layer_norm_modulate", "--out", str(tmp_path)]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    wanted = tables.backends([row for row in read(source)["rows"] if row["op"] == "layer_norm_modulate"])
    assert wanted.rows
    for cells in wanted.rows:
        assert " ".join(cells[6:]) in shown, cells


def test_graphs_are_compared_with_graphs() -> None:
    """A replayed graph beside single launches would claim the graph's gain for the kernels."""
    times = {"eager": 40.0, "eager+graph": 20.0, "auto": 30.0, "auto+graph": 10.0}
    rows = [row("unet_sample_4_steps", name, us, "step", per_second=1.0) for name, us in times.items()]
    table = tables.networks(rows)
    over = {cells[3]: cells[8] for cells in table.rows}
    assert over == {"eager": "–", "eager+graph": "–", "auto": "1.33×", "auto+graph": "2.00×"}


def test_wrong_results_are_named_and_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fast kernel with a wrong result must not appear as a success, nor a rival's inexactness as our failure."""
    results = Results(tmp_path / "r.json", MADE)
    results.add(row("x", "eager", 8.0, rel_err=0.5, limit=1e-2))
    assert main(["profile", "kernels", "--from", str(tmp_path / "r.json"), "--out", str(tmp_path / "o")]) == 0
    results.add(row("x", "triton", 1.0, rel_err=float("nan"), limit=1e-2))
    assert main(["profile", "kernels", "--from", str(tmp_path / "r.json"), "--out", str(tmp_path / "o")]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "wrong: x forward a/b 1x2 bf16 l triton: relative error nan" in shown


@pytest.mark.slow
def test_a_file_becomes_tables_and_figures(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured on a lent machine is drawn afterwards, elsewhere, and must be all there."""
    before = source.read_bytes()
    assert main(["profile", "kernels", "--from", str(source), "--out", str(tmp_path)]) == 0
    assert source.read_bytes() == before
    for name in FIGURES:
        picture = Image.open(tmp_path / f"{name}.png").convert("RGB")
        assert min(picture.size) > 200
        assert len(picture.getcolors(1 << 24)) > 20                  # an empty frame has fewer
        assert (tmp_path / f"{name}.pdf").stat().st_size > 5000
    text = (tmp_path / "tables.md").read_text()
    for found in read(source)["rows"]:
        if found["op"] in ("group_norm_silu", "attention") and found["backend"] == "triton":
            assert f"| {tables.number(found['us'])} |" in text
    for part in ("An Example GPU", "torch 2.99", "commit 0123456789", "4,000 GB/s", "800 TFLOP/s", "ended: -11"):
        assert part in text
    assert "An Example GPU" in capsys.readouterr().out


def test_figures_hold_what_was_measured(source: Path) -> None:
    """A point drawn at another place than the row's would be a wrong publication."""
    rows = [r for r in read(source)["rows"] if r["op"] in ("attention", "copy", "product")]
    figure = figures.draw(rows)["ratio_attention"]
    shown = ("triton", "flash")
    points = [p for axes in figure.axes for p in axes.lines if p.get_label() in shown]
    drawn = {round(float(p.get_xdata()[0]), 9) for p in points}
    expected = {round(r["ratio"], 9) for r in rows if r["backend"] in shown}
    assert expected <= drawn
    against = figures.draw(rows)["against_attention"]
    best = [line.speed_up() for line in lines(rows) if line.place[:2] == ("attention", "forward")]
    bars = [patch.get_x() + patch.get_width() for patch in against.axes[0].patches]
    assert bars == pytest.approx(best)
    assert f"{geometric_mean([b for b in best if b]):.2f}×" in against.axes[0].get_title()


def test_rows_without_figures_draw_none() -> None:
    """A run that was cut short must not end in an error of the plotting library."""
    assert figures.draw([]) == {}
    assert isinstance(figures.draw([row("x", "triton", 1.0), row("x", "eager", 2.0)])["against_x"], Figure)
    assert set(figures.draw([row("x", "triton", 1.0)])) == set()


def test_json_goes_through_unchanged(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other programs read it; a progress line among it would break them."""
    command = ["profile", "kernels", "--from", str(source), "--op", "guided_update", "--backend", "triton", "--json"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    kept = [r for r in read(source)["rows"] if (r["op"], r["backend"]) == ("guided_update", "triton")]
    assert [r for r in rows if r["op"] == "guided_update"] == kept
    assert {r["op"] for r in rows} == {"guided_update", "copy", "product"}


@pytest.mark.slow
def test_it_measures_on_this_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU the command must still work, and say what it could not measure."""
    command = ["profile", "kernels", "--device", "cpu", "--tiny", "--op", "guided_update", "--backend", "reference"]
    assert main([*command, "--backend", "eager", "--out", str(tmp_path), "--minutes", "5"]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = [r for r in read(path)["rows"] if r["op"] == "guided_update"]
    assert {r["backend"] for r in rows} == {"reference", "eager"}
    timed = [r for r in rows if "us" in r]
    assert timed
    assert all(set(KEY) <= set(r) and r["us"] > 0 and r["rel_err"] < r["limit"] for r in timed)
    assert "cannot be measured" in " ".join(capsys.readouterr().out.split())
    # a second command starts anew: rows of another day's machine state are not mixed in
    assert main([*command, "--out", str(tmp_path), "--minutes", "5"]) == 0
    assert {r["backend"] for r in read(path)["rows"] if r["op"] == "guided_update"} == {"reference"}


MISTAKES = {
    "--op attn": "--op attn: must be one of group_norm_silu, ",
    "--backend tritn": "--backend tritn: must be one of ",
    "--dtype fp8 --op attention": "--dtype fp8: must be one of ",
    "--op attention --shape adm128": "--shape adm128: must be one of .*dit-xl/256.* with --op attention",
    "--device tpu9": "device=tpu9: must be auto, cpu, cuda",
    "--minutes 0": "--minutes 0: must be more than 0",
    "--from nowhere.json": "nowhere.json",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_that_names_what_there_is(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typing error must not end in a traceback, nor in a run that measures nothing."""
    arguments = mistake.split() if "--device" in mistake else [*mistake.split(), "--device", "cpu"]
    assert main(["profile", "kernels", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(MISTAKES[mistake], error)
    assert list(tmp_path.iterdir()) == []


def test_a_filter_that_a_file_lacks_names_what_the_file_has(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --from the known names are the file's, not this machine's."""
    assert main(["profile", "kernels", "--from", str(source), "--backend", "reference"]) == 2
    assert "must be one of triton, cuda, eager, compile, flash, cudnn, efficient" in capsys.readouterr().err
