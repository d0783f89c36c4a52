"""Copy what a run measured into its experiment's folder, and put its picture and table into README.md.

.venv/bin/python tools/readme_results.py runs/digits_full experiments/digits
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SAMPLERS = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)", "heun": "Heun"}


def keep(run: Path, kept: Path) -> None:
    """Copy figures, table, picture and training curves (`training/<stage>.jsonl`) of a finished run."""
    (kept / "training").mkdir(parents=True, exist_ok=True)
    for file in ("evaluate/results.json", "report/table.md", "report/readme.png"):
        shutil.copy(run / file, kept)
    for curve in sorted(run.glob("*/**/metrics.jsonl")):
        shutil.copy(curve, kept / "training" / f"{'_'.join(curve.parent.relative_to(run).parts)}.jsonl")


def caption(results: dict[str, Any]) -> str:
    """Of what the table's seconds are, and how to make its figures again; what they are is in the table's own note."""
    made, timing = results["circumstances"], results["timing"][-1]
    teacher = timing["teacher"]
    hardware = f"{made['cpu']}, {made['threads']} threads" if made["device"] == "cpu" else made["device"]
    return (
        f"Run `{results['experiment']}`, seed {made['seed']}, commit `{str(made['commit'])[:10]}`; seconds of the "
        f"teacher's {teacher['steps']} {SAMPLERS[teacher['sampler']]} steps extrapolated from "
        f"{teacher['timed_steps']}; torch {made['torch']}, {hardware}.\n"
    )


def fill(readme: str, body: str) -> str:
    """`readme` with `body` between the two markers. Raises ValueError if they are not there once each, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and then {END}, once each")
    return f"{readme[: readme.index(BEGIN)]}{BEGIN}\n{body.strip()}\n{readme[readme.index(END) :]}"


def main(run: str, experiment: str) -> None:
    """Update the experiment's `results/` and the README beside its parent folder."""
    kept = Path(experiment) / "results"
    keep(Path(run), kept)
    results = json.loads((kept / "results.json").read_text())
    picture = f"![Samples of the teacher and of its students, from the same noise]({kept.as_posix()}/readme.png)"
    readme = Path("README.md")
    body = "\n\n".join([picture, (kept / "table.md").read_text().strip(), caption(results)])
    readme.write_text(fill(readme.read_text(), body))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: tools/readme_results.py RUN EXPERIMENT, from the repository's root")
    main(*sys.argv[1:])
