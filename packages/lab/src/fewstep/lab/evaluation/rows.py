"""Students and undistilled samplers at equal cost, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fewstep.lab.evaluation.distances import Reference, data_row, teacher_distance
from fewstep.lab.evaluation.pairs import error_to_teacher
from fewstep.lab.evaluation.plan import Draw, Plan
from fewstep.lab.evaluation.samples import Samples

Row = dict[str, Any]


def row(samples: Samples, plan: Plan, reference: Reference, draw: Draw, role: str, stage: str, steps: int) -> Row:
    """Everything measured of one set of samples. student_steps: the student's that it is, or is held against."""
    return {
        "role": role,
        "stage": stage,
        "student_steps": steps,
        **data_row(samples, draw, plan.options.num_samples, reference),
        **error_to_teacher(samples, plan, draw),
        "teacher_distance": teacher_distance(samples, plan, draw, plan.options.num_samples),
    }


def all_rows(samples: Samples, plan: Plan, reference: Reference) -> list[Row]:
    """A row for each student ("student"), each undistilled sampler at its cost ("baseline"), each other student."""
    rows = []
    for w in plan.options.weights:
        for steps in plan.options.steps:
            student = plan.student(steps, w)
            rows.append(row(samples, plan, reference, student, "student", plan.students.name, steps))
            for draw in plan.baselines(steps, w):
                rows.append(row(samples, plan, reference, draw, "baseline", plan.teacher, steps))
    for other, steps, w in plan.others_draws():
        rows.append(row(samples, plan, reference, plan.student(steps, w, other), "other", other.name, steps))
    return rows


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def against_best(rows: list[Row], measure: str) -> list[Row]:
    """Each student's `measure` over that of the better undistilled sampler at equal NFE (lower is better)."""
    found = []
    for student in select(rows, role="student"):
        same = {"student_steps": student["student_steps"], "w": student["w"]}
        best = min(select(rows, role="baseline", **same), key=lambda row: float(row[measure]))
        found.append(
            {
                "w": student["w"], "steps": student["steps"], "nfe": student["nfe"], "student": student[measure],
                "baseline": best[measure], "baseline_sampler": best["sampler"], "baseline_steps": best["steps"],
                "baseline_nfe": best["nfe"], "ratio": student[measure] / best[measure],
            }
        )  # fmt: skip
    return found
