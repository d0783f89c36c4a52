"""The report of a run: one HTML page with its pictures, a table and a picture for a README."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.figure import Figure

from fewstep.lab.checkpoint import write_text
from fewstep.lab.context import Interrupted
from fewstep.lab.report import comparison, comparison_page, grids, page, summary
from fewstep.lab.report.figures import FIGURES
from fewstep.lab.report.model import Material, read_grids, read_results
from fewstep.lab.report.runs import read_runs
from fewstep.lab.report.runs_page import write_runs
from fewstep.lab.report.style import style

__all__ = ["Material", "read_grids", "read_results", "read_runs", "write_comparison", "write_report", "write_runs"]


def write_report(material: Material, out: Path, config: str = "", stopping: Callable[[], bool] = lambda: False) -> Path:
    """Write `out/index.html`, its pictures (PNG, PDF), `table.md` and, where there are samples to show, `readme.png`.

    config: the configuration as YAML, shown on the page. Returns the page's path; it is written last.

    Raises:
        Interrupted: `stopping` said so, between two pictures.
    """
    pictures = _write_figures(_figures(material), out, stopping)
    write_text(out / "table.md", summary.markdown(material))
    write_text(out / "index.html", page.html(material, pictures, config))
    return out / "index.html"


def write_comparison(
    material: Material, out: Path, config: str = "", stopping: Callable[[], bool] = lambda: False
) -> Path:
    """The same, without `readme.png`, of the results of a compare stage."""
    wanted = {"samples": material.grids, "training": material.curves}
    shown = ((name, draw(material)) for name, draw in comparison.FIGURES.items() if wanted.get(name, True))
    pictures = _write_figures(shown, out, stopping)
    write_text(out / "table.md", comparison_page.markdown(material))
    write_text(out / "index.html", comparison_page.html(material, pictures, config))
    return out / "index.html"


def _write_figures(figures: Iterator[tuple[str, Figure]], out: Path, stopping: Callable[[], bool]) -> dict[str, str]:
    """Each as a PNG for the page and a PDF for a paper; returns name -> PNG."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    with style():
        for name, figure in figures:
            if stopping():
                raise Interrupted(f"report: stopped before {name}")
            stem = name.replace(" ", "_")
            for suffix in ("pdf", "png"):
                figure.savefig(out / f"{stem}.{suffix}")
            pictures[name] = f"{stem}.png"
    return pictures


def _figures(material: Material) -> Iterator[tuple[str, Figure]]:
    yield from ((name, draw(material)) for name, draw in FIGURES.items() if name != "training" or material.curves)
    shown = [w for w in material.weights if grids.grid_rows(material, w)]
    yield from ((f"samples {w:g}", grids.samples(material, w)) for w in shown)
    if shown:
        yield "readme", grids.banner(material, 1.0 if 1.0 in shown else shown[-1])
