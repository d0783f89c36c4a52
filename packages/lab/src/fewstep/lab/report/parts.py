"""What the pages of the reports share: figures with captions, tables, verdicts, provenance."""

from __future__ import annotations

import re
from html import escape

from fewstep.lab.report import tables
from fewstep.lab.report.model import Material
from fewstep.lab.report.tables import Table, seconds


def verdicts(material: Material) -> list[str]:
    """The targets and whether they were reached; nothing where none were asked for."""
    return ["<h2>Targets</h2>", scroll(tables.targets(material))] if material.results["targets"] else []


def provenance(material: Material, config: str) -> list[str]:
    """How, when and where the figures were made. config: as YAML, shown."""
    results = material.results
    found, settings, data = results["circumstances"], results["settings"], results["data"]
    facts = {
        "commit": found["commit"],
        "finished": found["finished"],
        "hardware": f"{found['device']}: {found['cpu']}, {found['threads']} threads",
        "software": f"Python {found['python']}, torch {found['torch']}",
        "memory": f"evaluation: {_gigabytes(found['peak_memory_bytes'])}, and in each of {found['workers']} workers "
        f"{_gigabytes(found['peak_memory_worker_bytes'])} at most",
        "seeds": f"{found['seed']} (training), {settings['seed']} (sampling)",
        "data": f"{data['name']}, {data['train']:,} images for training, {data['heldout']:,} held out",
        "features": results["features"],
        "sampling": f"clip=None, images clamped to [−1, 1] at the end, chunks of {settings['chunk']}",
        "time, all calls": ", ".join(f"{name} {seconds(value)}" for name, value in results["stage_seconds"].items()),
    }
    entries = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    shown = f"<details><summary>configuration</summary><pre>{escape(config)}</pre></details>" if config else ""
    return ["<h2>Provenance</h2>", f"<dl>\n{entries}\n</dl>", shown]


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:.2f} GB"


def picture(file: str, caption: str) -> str:
    """A figure with its caption, whose first sentence stands for it where it cannot be seen."""
    alt = re.sub("<[^>]*>", "", caption).split(".")[0]
    return f'<figure><img src="{escape(file)}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


def remark(text: str) -> str:
    """A line in small print."""
    return f'<p class="note">{text}</p>'


def scroll(table: Table) -> str:
    """A table that may be wider than the page."""
    return f'<div class="wide">{table.html()}</div>'
