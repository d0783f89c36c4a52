"""The table for a README: what a student costs, how fast it is, how near it comes, and what the figures are."""

from __future__ import annotations

from fewstep.lab.report.model import Material, Row
from fewstep.lab.report.style import count_steps
from fewstep.lab.report.tables import DASH, Table, fixed, named, seconds, times


def markdown(material: Material) -> str:
    """What `table.md` holds: whose features FID and IS are of, the table, and a note on every figure in it."""
    return f"FID and IS: **{material.results['features']}**.\n\n{table(material).markdown()}\n{note(material)}\n"


def table(material: Material) -> Table:
    """The teacher by the sampler that was timed and, where it is another, by the one that was measured; students."""
    timing = material.results["timing"][-1]
    header = ["sampler", "NFE", f"batch of {timing['batch']}", "speed-up"]
    for w in material.weights:
        header += [f"error, w = {w:g}", f"FID / IS, w = {w:g}"]
    rows = _teachers(material)
    for steps in material.steps:
        (student,) = (row for row in timing["students"] if row["steps"] == steps)
        cells = [count_steps(steps), str(steps), seconds(student["seconds"]), f"{student['speed_up']:,.0f}×"]
        for w in material.weights:
            row = material.row(role="student", w=w, steps=steps)
            ratio = material.row("paired_ratios", w=w, steps=steps)["ratio"]
            cells += [f"{fixed(row['paired_error'], 3)} ({times(ratio)})", _fid_is(row)]
        rows.append(cells)
    return Table(header, rows)


def note(material: Material) -> str:
    """What the table's columns are, in Markdown."""
    settings, data = material.results["settings"], material.results["data"]
    timing = material.results["timing"][-1]
    teacher = timing["teacher"]
    reference = named(settings["reference"])
    return (
        f"*Error*: RMSE to the teacher's images by {reference} from the same {settings['paired_noises']:,} noises, "
        "pixels in [-1, 1]; in brackets, its ratio to the error of the better of undistilled DDIM and "
        "DPM-Solver++(2M) at as many network evaluations (below 1×: the student is nearer to the teacher; for w > 0 "
        "one guided call of the teacher counts two evaluations, and it gets at least one call). "
        f"*FID / IS*: {settings['num_samples']:,} samples against the {data['heldout']:,} held-out images; both depend "
        f"on the number of samples; {material.results['features']}. *NFE*: network evaluations per image. *Seconds* "
        f"and *speed-up*: at w = {timing['w']:g}; those of the teacher's {teacher['steps']} steps are extrapolated "
        f"from {teacher['timed_steps']} timed ones."
    )


def _teachers(material: Material) -> list[list[str]]:
    timed, measured = material.results["timing"][-1]["teacher"], material.results["settings"]["reference"]
    cost = [f"{seconds(timed['seconds'])} (extrapolated)", "1×"]
    figures = [cell for w in material.weights for cell in (DASH, _fid_is(material.row("teacher", w=w)))]
    found = [f"teacher, {named(measured)}", _nfe(material, measured["steps"])]
    if named(timed) == named(measured):
        return [[*found, *cost, *figures]]
    first = [f"teacher, {named(timed)}", _nfe(material, timed["steps"]), *cost, *[DASH] * len(figures)]
    return [first, [*found, DASH, DASH, *figures]]


def _nfe(material: Material, steps: int) -> str:
    """Evaluations of the guided teacher in so many steps: two in each, where there is guidance."""
    each = {f"{row['nfe'] // row['steps'] * steps:,}": row["w"] for row in reversed(material.results["teacher"])}
    most, *less = each
    return most + "".join(f" (w = {each[nfe]:g}: {nfe})" for nfe in less)


def _fid_is(row: Row) -> str:
    return f"{fixed(row['fid_heldout'], 2)} / {fixed(row['is'], 2)}"
