"""Writes the run's report from what the evaluate stage measured."""

from __future__ import annotations

from fewstep.lab.context import StageContext
from fewstep.lab.journal import read_metrics
from fewstep.lab.report import Material, read_grids, read_results, write_comparison, write_report
from fewstep.lab.report.style import count_steps
from fewstep.lab.validate_moments import STUDENTS


def run(ctx: StageContext) -> None:
    """Write `index.html`, its pictures, `table.md` and `readme.png`; raises Interrupted when asked to stop."""
    write, kind = (write_comparison, "compare") if ctx.inputs_of_kind("compare") else (write_report, "evaluate")
    folder, *_ = ctx.inputs_of_kind(kind).values()
    title = ctx.stage.title or f"Few-step samplers for {ctx.config.data.name}"
    material = Material(title, read_results(folder), read_grids(folder), training_curves(ctx))
    config = ctx.out / "config.yaml"
    path = write(material, ctx.out, config.read_text() if config.is_file() else "", ctx.stopping)
    ctx.console.print(f"{ctx.stage.name}  {path}", highlight=False)


def training_curves(ctx: StageContext) -> dict[str, list[dict[str, float]]]:
    """Lines of every `metrics.jsonl` of the stages that the report needs; a student's under "halve, 4 steps"."""
    found = {}
    for name, folder in ctx.inputs.items():
        found[name] = read_metrics(folder / "metrics.jsonl")
        steps = ctx.config.stages[name].steps if ctx.config.stages[name].kind in STUDENTS else []
        for count in steps:
            found[f"{name}, {count_steps(count)}"] = read_metrics(folder / f"steps_{count}" / "metrics.jsonl")
    return {name: lines for name, lines in found.items() if lines}
