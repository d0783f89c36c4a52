"""The report of a comparison as an HTML page, and its table for a README."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template

from fewstep.lab.report import comparison
from fewstep.lab.report.model import Material
from fewstep.lab.report.parts import picture, provenance, remark, scroll, verdicts
from fewstep.lab.report.tables import fixed, percent

W = "<i>w</i>"


def html(material: Material, pictures: Mapping[str, str], config: str = "") -> str:
    """The page. pictures: name of a figure ("quality", "sweep", ...) -> file beside it. config: as YAML, shown."""
    results = material.results
    experiment, commit = escape(str(results["experiment"])), escape(str(results["circumstances"]["commit"])[:10])
    parts = [
        f"<header>\n<h1>{escape(material.title)}</h1>",
        f'<p class="by">experiment {experiment}, commit {commit}</p>\n</header>',
        f"<p>{_opening(material)}</p>",
        *_shown("Samples", "samples", pictures, "<b>The same noise down a column, two images of each class.</b>"),
        *verdicts(material),
        *_shown("Quality against steps", "quality", pictures, _quality(material)),
        scroll(comparison.table(material)),
        remark(escape(note(material))),
        *_shown("The teacher at its best", "sweep", pictures, _sweep(material)),
        *_shown("Training", "training", pictures, "<b>What each training logged.</b> Updates count all its networks."),
        *provenance(material, config),
    ]
    template = Template(files("fewstep.lab.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(material.title), body="\n".join(parts))


def markdown(material: Material) -> str:
    """What `table.md` holds."""
    features = material.results["features"]
    return f"FID, IS, precision, recall: **{features}**.\n\n{comparison.table(material).markdown()}\n{note(material)}\n"


def note(material: Material) -> str:
    """What the table's columns are."""
    settings, data, ideal = (material.results[key] for key in ("settings", "data", "training_images"))
    return (
        f"Means ± standard deviations over {settings['sampling_seeds']} sampling seeds of {settings['num_samples']:,} "
        f"samples each, against the {data['heldout']:,} held-out images; {material.results['features']}. FID depends "
        "on the number of samples. Spread: variance of features within a class over that of the held-out images. w = 0 "
        "is no guidance. The teacher's noise level and w are those of the lowest FID in its sweep, measured anew here. "
        f"Training images as samples: FID {fixed(ideal['fid_heldout'], 3)}, recall {fixed(ideal['recall'], 3)}, "
        f"precision {fixed(ideal['precision'], 3)}. Training: seconds of the call that finished it; student updates "
        "leave out those of an auxiliary network."
    )


def _opening(material: Material) -> str:
    best, names = comparison.teacher(material), comparison.stages(material)
    return (
        f"Students of {', '.join(names)} against the many-step teacher at its best: {best['steps']} ancestral steps "
        f"with noise level {best['noise_level']:g} and guidance weight {W}&nbsp;=&nbsp;{best['w']:g}, chosen by FID "
        f"from a sweep of {len(material.results['sweep'])}. {W}&nbsp;=&nbsp;0 is no guidance; what Stable Diffusion "
        f"calls guidance scale is 1&nbsp;+&nbsp;{W}. The judge recognises "
        f"{percent(material.results['judge']['accuracy_heldout'])} of the held-out images."
    )


def _quality(material: Material) -> str:
    return (
        "<b>Students by the number of their steps.</b> Bars and the band: one standard deviation over "
        f"{material.results['settings']['sampling_seeds']} sampling seeds. Dashed: the teacher at its best. Where a "
        f"stage has several {W}, the one of the lowest FID."
    )


def _sweep(material: Material) -> str:
    best = comparison.teacher(material)
    return (
        f"<b>The teacher by {best['steps']} ancestral steps.</b> Noise level: the exponent that mixes the variance of "
        "the posterior (0) with that of the forward step (1). Bold: the lowest FID."
    )


def _shown(title: str, name: str, pictures: Mapping[str, str], caption: str) -> list[str]:
    return [f"<h2>{title}</h2>", picture(pictures[name], caption)] if name in pictures else []
