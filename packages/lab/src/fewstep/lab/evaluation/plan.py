"""Which samples an evaluation needs: of which model, by which sampler, from which noises, how many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fewstep.lab.config import EvaluateConfig

# Samples of one set share their noise index by index, so they are paired; the two sets are independent.
PAIRED, OTHER = 0, 1
BASELINES = ("ddim", "dpmpp_2m")


@dataclass(frozen=True)
class Draw:
    """One set of samples; noise_level is that of ancestral sampling, prompts the name of a set of them (or none).

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """

    model: str
    sampler: str
    steps: int
    w: float
    noises: int = PAIRED
    noise_level: float = 0.0
    prompts: str = ""

    @property
    def label(self) -> str:
        """For progress and messages."""
        return f"{self.model} {self.sampler} {self.steps} w={self.w:g}"


def equal_calls(nfe: int, w: float) -> int:
    """Denoiser calls that an undistilled sampler gets at a student's NFE.

    A guided call counts two network evaluations, so for w > 0 half as many, at least one; for w = 0 as many.
    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    return nfe if w == 0 else max(1, nfe // 2)


@dataclass(frozen=True)
class Students:
    """The students of one stage: names of models by their steps, the w that they were trained for, their sampler."""

    name: str
    models: dict[int, str]
    w_range: tuple[float, float]
    sampler: str = "ddim"

    def weights(self, asked: list[float]) -> list[float]:
        """Those of the `asked` w that the students were trained for."""
        low, high = self.w_range
        return [w for w in asked if low <= w <= high]


@dataclass(frozen=True)
class Plan:
    """The sets of samples of an evaluation, named by what they are for.

    teacher, guide: names of models. students: those that are judged; others: rows beside them. training_images: how
    many there are, and so how many teacher samples the distance to data is measured on.
    """

    options: EvaluateConfig
    teacher: str
    guide: str
    students: Students
    others: tuple[Students, ...]
    training_images: int

    @property
    def check_weights(self) -> list[float]:
        """The w at which the reference sampler is held against the many-step one."""
        return self.options.check_weights or self.options.weights

    @property
    def curve_samples(self) -> int:
        """Samples per point of the FID-IS curve."""
        return self.options.curve_samples or self.options.num_samples

    @property
    def teacher_samples(self) -> int:
        """Teacher samples per w that are paired with others': all of them if the sampling floor is asked for."""
        return max(self.options.paired_noises, self.options.num_samples if self.options.floor else 0)

    def reference(self, w: float, noises: int = PAIRED) -> Draw:
        """The teacher as paired errors and distances take it for the truth."""
        return Draw(self.teacher, self.options.reference.sampler, self.options.reference.steps, w, noises)

    def truth(self, w: float) -> Draw:
        """The teacher by the many-step sampler."""
        return Draw(self.teacher, self.options.truth.sampler, self.options.truth.steps, w)

    def curve_teacher(self, w: float) -> Draw:
        """The teacher as it stands in the FID-IS curve."""
        return Draw(self.teacher, self.options.curve_reference.sampler, self.options.curve_reference.steps, w, OTHER)

    def checked(self, w: float) -> Draw:
        """What is held against `truth`: the reference or, where that is the truth itself, the curve's sampler."""
        if self.reference(w) != self.truth(w):
            return self.reference(w)
        return Draw(self.teacher, self.options.curve_reference.sampler, self.options.curve_reference.steps, w)

    def student(self, steps: int, w: float, students: Students | None = None) -> Draw:
        """A student by the sampler that it was distilled for."""
        chosen = students or self.students
        return Draw(chosen.models[steps], chosen.sampler, steps, w)

    def own_teacher(self, steps: int, w: float) -> Draw:
        """What the student of `steps` was taught: twice as many steps of the student before, or of stage one."""
        return Draw(self.students.models.get(2 * steps, self.guide), self.students.sampler, 2 * steps, w)

    def stage_one(self, w: float, sampler: str) -> Draw:
        """Stage one alone, at enough steps for its error to be that of the network."""
        return Draw(self.guide, sampler, self.options.guide_steps, w)

    def baselines(self, steps: int, w: float) -> tuple[Draw, ...]:
        """Undistilled samplers on the guided teacher at the NFE of the student of `steps`."""
        return tuple(Draw(self.teacher, sampler, equal_calls(steps, w), w) for sampler in BASELINES)

    def others_draws(self) -> Iterator[tuple[Students, int, float]]:
        """(stage, steps, w) of the rows beside the judged students."""
        for other in self.others:
            for w in other.weights(self.options.weights):
                yield from ((other, steps, w) for steps in self.options.steps if steps in other.models)

    def some_w(self, students: Students) -> float:
        """A w that these students were trained for: the largest that is measured, else the end of their range."""
        return max(students.weights(self.options.weights), default=students.w_range[1])

    def requests(self) -> dict[Draw, int]:
        """Every set with the number of samples that it needs, the check of the reference first."""
        needed: dict[Draw, int] = {}
        for draw, count in self._requests():
            needed[draw] = max(count, needed.get(draw, 0))
        return needed

    def _requests(self) -> Iterator[tuple[Draw, int]]:
        options = self.options
        for w in self.check_weights:
            yield self.truth(w), options.check_noises
            yield self.checked(w), options.check_noises
        for w in options.weights:
            yield self.reference(w), self.teacher_samples
            yield self.reference(w, OTHER), max(options.num_samples, self.training_images if w == 0 else 0)
            for sampler in BASELINES:
                yield self.stage_one(w, sampler), options.paired_noises
            for steps in options.steps:
                yield self.own_teacher(steps, w), options.paired_noises
                yield self.student(steps, w), options.num_samples
                yield from ((draw, options.num_samples) for draw in self.baselines(steps, w))
        for other, steps, w in self.others_draws():
            yield self.student(steps, w, other), options.num_samples
        for w in options.curve_weights:
            yield self.curve_teacher(w), self.curve_samples
            yield from ((self.student(steps, w), self.curve_samples) for steps in options.steps)
