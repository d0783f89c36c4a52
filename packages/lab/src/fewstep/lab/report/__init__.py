"""The report of a run: one HTML page with its pictures, a table and a picture for a README."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.figure import Figure

from fewstep.lab.checkpoint import write_text
from fewstep.lab.context import Interrupted
from fewstep.lab.report import grids, page, summary
from fewstep.lab.report.figures import FIGURES
from fewstep.lab.report.model import Material, read_grids, read_results
from fewstep.lab.report.style import style

__all__ = ["Material", "read_grids", "read_results", "write_report"]


def write_report(material: Material, out: Path, config: str = "", stopping: Callable[[], bool] = lambda: False) -> Path:
    """Write `out/index.html`, its PNGs, `table.md` and, where there are samples to show, `readme.png`.

    config: the configuration as YAML, shown on the page. Returns the page's path; it is written last.

    Raises:
        Interrupted: `stopping` said so, between two pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    with style():
        for name, figure in _figures(material):
            if stopping():
                raise Interrupted(f"report: stopped before {name}")
            file = f"{name.replace(' ', '_')}.png"
            figure.savefig(out / file)
            pictures[name] = file
    write_text(out / "table.md", summary.markdown(material))
    write_text(out / "index.html", page.html(material, pictures, config))
    return out / "index.html"


def _figures(material: Material) -> Iterator[tuple[str, Figure]]:
    yield from ((name, draw(material)) for name, draw in FIGURES.items() if name != "training" or material.curves)
    shown = [w for w in material.weights if grids.grid_rows(material, w)]
    yield from ((f"samples {w:g}", grids.samples(material, w)) for w in shown)
    if shown:
        yield "readme", grids.banner(material, 1.0 if 1.0 in shown else shown[-1])
