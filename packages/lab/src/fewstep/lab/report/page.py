"""The report's HTML page: light, without scripts, its pictures beside it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template

from fewstep.lab.report import tables
from fewstep.lab.report.model import Material
from fewstep.lab.report.parts import picture, provenance, remark, scroll, verdicts
from fewstep.lab.report.style import SAMPLER_NAMES
from fewstep.lab.report.tables import number, percent, seconds

W = "<i>w</i>"
W_IS = "<i>w</i>&nbsp;=&nbsp;"


def html(material: Material, pictures: Mapping[str, str], config: str = "") -> str:
    """The page. pictures: name of a figure ("quality", "samples 1", ...) -> file beside it. config: as YAML, shown."""
    parts = [
        _opening(material),
        *_samples(material, pictures),
        *verdicts(material),
        *_quality(material, pictures),
        *_beside(material),
        *_responses(material),
        *_stages(material, pictures),
        *_curve(material, pictures),
        *_speed(material, pictures),
        *_training(pictures),
        *provenance(material, config),
    ]
    template = Template(files("fewstep.lab.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(material.title), body="\n".join(parts))


def _opening(material: Material) -> str:
    results, headline = material.results, material.results["settings"]["headline"]
    timing = results["timing"][-1]
    teacher, batch = timing["teacher"], timing["batch"]
    (fast,) = (row for row in timing["students"] if row["steps"] == headline)
    paired = material.rows("paired_ratios", steps=headline)
    ratios = _join([f"{number(row['ratio'], 2)} at {W_IS}{row['w']:g}" for row in paired])
    experiment, commit = escape(str(results["experiment"])), escape(str(results["circumstances"]["commit"])[:10])
    students = ", ".join(str(steps) for steps in material.steps)
    made_in = (
        f"{seconds(fast['seconds'])}, {fast['speed_up']:,.0f} times as fast as that teacher, whose "
        f"{seconds(teacher['seconds'])} are extrapolated from {teacher['timed_steps']} of its {teacher['steps']} steps"
    )
    return (
        f"<header>\n<h1>{escape(material.title)}</h1>\n"
        f'<p class="by">experiment {experiment}, commit {commit}</p>\n</header>\n'
        f"<p>A classifier-free-guided teacher, sampled with {_steps(teacher)} ({teacher['nfe']:,} network evaluations "
        f"where {W}&nbsp;&gt;&nbsp;0), is distilled into students of {students} steps that take the guidance weight "
        f"{W} as an input: one student per number of steps serves every {W}. {W_IS}0 is no guidance; what Stable "
        f"Diffusion calls guidance scale is 1&nbsp;+&nbsp;{W}.</p>\n"
        f"<p>The student of {headline} steps makes a batch of {batch} images in {made_in} "
        f"({W_IS}{timing['w']:g}). Its error to the teacher’s "
        "images from the same noise, over that of the better undistilled sampler at as many network evaluations, is "
        f"{ratios}.</p>"
    )


def _samples(material: Material, pictures: Mapping[str, str]) -> list[str]:
    settings = material.results["settings"]
    shown = [w for w in material.weights if f"samples {w:g}" in pictures]
    caption = (
        "Columns are classes; the images of a column start from the same noise. From above: the teacher "
        f"({_steps(settings['reference'])}), the students, and the better undistilled sampler at the network "
        f"evaluations of the student of {settings['headline']} steps."
    )
    figures = [picture(pictures[f"samples {w:g}"], f"<b>{_guidance(w)}.</b> {caption}") for w in shown]
    return ["<h2>Samples</h2>", *figures] if figures else []


def _quality(material: Material, pictures: Mapping[str, str]) -> list[str]:
    results, settings = material.results, material.results["settings"]
    caption = (
        "<b>Students against undistilled samplers at equal cost.</b> Paired error: root mean square difference of "
        f"pixels in [−1, 1] to the teacher’s image from the same noise, class and {W} ({settings['paired_noises']:,} "
        f"noises). Fréchet distance to the teacher’s samples of the same {W} from other noises; the line of the "
        "floor there is the distance between two sets of the teacher’s own samples, where it was measured. A guided "
        "call of an undistilled sampler counts two network evaluations; hollow: its one call costs two where the "
        f"student’s costs one. FID, IS, Fréchet distance: {_features(material)}."
    )
    data = results["data"]
    workers = results["circumstances"]["workers"]
    note = (
        f"{settings['num_samples']:,} samples per row; {_features(material)}. FID against {data['heldout']:,} held-out "
        f"and {data['train']:,} training images apart; KID (mean ± standard deviation over "
        f"{settings['kid_subsets']} subsets, features standardised by the held-out images’ mean and deviation; "
        "unbiased, so it may be negative), precision and recall against held-out images. Training images as samples "
        "are the ideal. “Best undistilled”: the better of DDIM and DPM-Solver++(2M) at the same number of network "
        f"evaluations ({W}&nbsp;&gt;&nbsp;0: half as many guided calls, at least one). The teacher is sampled with "
        f"{_steps(settings['reference'])}; its distance to itself is between two independent sets. Images/s: of each "
        f"of {workers} processes."
    )
    both = [scroll(tables.to_teacher(material)), scroll(tables.to_data(material))]
    figure = picture(pictures["quality"], caption)
    return ["<h2>Quality against steps</h2>", figure, *both, remark(note), *_checks(material)]


def _checks(material: Material) -> list[str]:
    """How far the reference may be trusted, and the teacher as a model of the data."""
    rows = material.results["reference_check"]
    found = _join([f"{number(row['paired_error'], 2)} at {W_IS}{row['w']:g}" for row in rows])
    one = rows[0]
    notes = [
        f"RMSE of {_named(one['sampler'])} to {_named(one['against'])}, on {one['paired_noises']} noises: {found}."
    ]
    if material.results["teacher_data"] is not None:
        teacher, ideal = (material.results["teacher_data"][name] for name in ("teacher", "training_images"))
        notes.append(
            f"On {teacher['samples']:,} samples, as many as there are training images, the teacher at {W_IS}0 has FID "
            f"{number(teacher['fid_heldout'])} to held-out and {number(teacher['fid_train'])} to training images; the "
            f"training images themselves have {number(ideal['fid_heldout'])} to held-out ones (ratio "
            f"{number(material.results['teacher_data']['ratio'])})."
        )
    judge = material.results["judge"]["accuracy_heldout"]
    return [remark(text) for text in [*notes, f"The judge recognises {percent(judge)} of the held-out images."]]


def _beside(material: Material) -> list[str]:
    table = tables.beside(material)
    if not table.rows:
        return []
    text = (
        f"<p>Students of {material.results['settings']['headline']} steps: the main one, which serves every {W}, and "
        f"those of other trainings. Distance: Fréchet, to the teacher’s samples of the same {W}; "
        f"{_features(material)}.</p>"
    )
    return ["<h2>Other students</h2>", text, scroll(table)]


def _responses(material: Material) -> list[str]:
    rows = material.results["guidance_response"]
    if not rows:
        return []
    text = (
        f"<p>How far samples move between {W_IS}{rows[0]['w_none']:g} and {W_IS}{rows[0]['w']:g} when the noise stays: "
        f"the mean over {rows[0]['noises']:,} noises of the root mean square difference of pixels. A student that "
        f"ignores {W} does not move.</p>"
    )
    return ["<h2>Guidance response</h2>", text, scroll(tables.responses(material))]


def _stages(material: Material, pictures: Mapping[str, str]) -> list[str]:
    caption = (
        "<b>Each stage’s own error and what has added up.</b> Bars: paired error to the samples that the stage was "
        "taught by. Line: paired error to the teacher. Grey: stage one, then the same network at the fewer DDIM steps "
        "that the first student halves."
    )
    note = "Share: what the squared error to the teacher grew by in this stage, of that of the last student. "
    note += "It is negative where the stage came nearer to the teacher than what it was taught by: errors may cancel."
    table = scroll(tables.stages(material))
    return ["<h2>Where the error comes from</h2>", picture(pictures["stages"], caption), table, remark(note)]


def _curve(material: Material, pictures: Mapping[str, str]) -> list[str]:
    caption = (
        f"<b>One curve per number of steps, one point per {W}.</b> All points of a curve come from one student. "
        f"Teacher: {_steps(material.results['settings']['curve_reference'])}. "
        f"{material.results['curve'][0]['samples']:,} samples per point; {_features(material)}. FID and IS depend on "
        f"the number of samples: those of the tables are of {material.results['settings']['num_samples']:,}."
    )
    return ["<h2>FID and IS over guidance</h2>", picture(pictures["fid_is"], caption)]


def _speed(material: Material, pictures: Mapping[str, str]) -> list[str]:
    row = material.results["timing"][0]
    teacher = row["teacher"]
    caption = (
        f"<b>Speed-up over the guided teacher at {_steps(teacher)}.</b> By calls: as if a guided call cost as much "
        "as a student’s. By NFE: as if it cost twice as much."
    )
    note = (
        f"Seconds per batch at {W_IS}{row['w']:g}, medians of {row['repeats']} interleaved runs. The teacher was timed "
        f"for {teacher['timed_steps']} of its {teacher['steps']} steps and scaled."
    )
    both = [scroll(tables.speed(material)), remark(note), scroll(tables.networks(material))]
    return ["<h2>Cost</h2>", picture(pictures["speed"], caption), *both]


def _training(pictures: Mapping[str, str]) -> list[str]:
    if "training" not in pictures:
        return []
    return ["<h2>Training</h2>", picture(pictures["training"], "<b>Loss of every training.</b>")]


def _features(material: Material) -> str:
    """Whose features FID and the like are measured in: said wherever such a number stands."""
    return escape(str(material.results["features"]))


def _guidance(w: float) -> str:
    return f"{W_IS}{w:g} (no guidance)" if w == 0 else f"{W_IS}{w:g}"


def _steps(sampler: Mapping[str, object]) -> str:
    """A sampler of the results in words."""
    return _named(f"{sampler['sampler']} {sampler['steps']}")


def _named(sampler_and_steps: str) -> str:
    """ "dpmpp_2m 64" as "64 DPM-Solver++(2M) steps"."""
    sampler, _, steps = sampler_and_steps.partition(" ")
    return escape(f"{steps} {SAMPLER_NAMES.get(sampler, sampler)} steps")


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
