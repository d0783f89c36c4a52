"""Editing and inpainting by prompt on captioned shapes: what is asked, how it is done, and whether it was.

One object of a held-out scene gets another colour or shape: as an edit of the whole picture, and painted anew in the
box that hid it. The checker reads back whether the prompt holds and every object is where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.lab.captioned import CAPTION_STREAM
from fewstep.lab.config import EditsConfig
from fewstep.lab.evaluation.alignment import share_of
from fewstep.lab.evaluation.rows import Row, select
from fewstep.lab.evaluation.zoo import Model, with_guidance
from fewstep.lab.inpainting import as_generator, remake
from fewstep.lab.latents import autoencoder_of
from fewstep.lab.metrics import Target
from fewstep.lab.sampling import SAMPLERS, knowingly, nfe_of
from fewstep.lab.shapes import Found, Thing, World, caption, parse, read, render, sample_scenes, score
from fewstep.lab.shapes.captions import DRAWS
from fewstep.lab.shapes.scene import HELDOUT, SIDE, Scene
from fewstep.lab.shards import Shard, ShardCache
from fewstep.lab.text import encoder_of
from fewstep.lab.validate_edits import is_whole
from fewstep.models import Network
from fewstep.samplers import paste
from fewstep.schedules import sample_seeds, seeded_noise, seeded_uniform

CHANGE_STREAM = 2  # of a scene's seed; scenes and captions are drawn from 0 and 1
EDIT, INPAINT = "edit", "inpaint"
# Methods: the picture as it was; a sample of the prompt that never saw it; an edit; inpainting by a model that is told
# at every step what is known; by one that was trained with masks.
SOURCE, NOISE, EDITED, TOLD, TRAINED = "source", "noise", "edited", "told", "trained"


@dataclass(frozen=True)
class Change:
    """A scene, the same with object `place` of another colour or shape, and what is said of the latter."""

    before: Scene
    after: Scene
    place: int
    prompt: str


@dataclass(frozen=True)
class Questions:
    """What is asked: question i is a function of i alone.

    seed: of the data. margin: pixels hidden around an object's bounding box. noises: seed of the noise.
    """

    world: World
    seed: int
    margin: float
    noises: int

    def changes(self, start: int, stop: int) -> list[Change]:
        """Held-out scenes start, ..., stop - 1, their captions' phrasing kept, each with one change."""
        indices = torch.arange(start, stop)
        scenes = sample_scenes(self.world, self.seed, HELDOUT, indices)
        seeds = sample_seeds(self.seed, HELDOUT, indices)
        words = seeded_uniform(seeds, (DRAWS,), stream=CAPTION_STREAM).tolist()
        draws = seeded_uniform(seeds, (2,), stream=CHANGE_STREAM).tolist()
        return [changed(self.world, *each) for each in zip(scenes, words, draws, strict=True)]

    def masks(self, asked: Sequence[Change]) -> Tensor:
        """1 where the picture is to be painted anew: the box of the changed object. Shape: (N, 1, SIDE, SIDE)."""
        return torch.stack([box(change.before[change.place], self.margin) for change in asked])

    def noise(self, start: int, stop: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Noise (N, C, H, W) of these questions, and its seeds (N,)."""
        seeds = sample_seeds(self.noises, 0, torch.arange(start, stop))
        return seeded_noise(seeds, shape), seeds


def changed(world: World, scene: Scene, words: Sequence[float], draw: Sequence[float]) -> Change:
    """The change that two numbers in [0, 1) choose: which object, and what of those kinds that no other object is."""
    place = int(draw[0] * len(scene))
    old, others = scene[place], [(thing.colour, thing.shape) for i, thing in enumerate(scene) if i != place]
    kinds = [kind for kind in world.kinds_beside((old.colour, old.shape)) if kind not in others]
    colour, shape = kinds[int(draw[1] * len(kinds))]
    after = (*scene[:place], replace(old, colour=colour, shape=shape), *scene[place + 1 :])
    return Change(scene, after, place, caption(after, words)[0])


def box(thing: Thing, margin: float) -> Tensor:
    """1 in the object's bounding box with a margin, to whole pixels outwards. Shape: -> (1, SIDE, SIDE)."""
    mask = torch.zeros(1, SIDE, SIDE)
    reach = thing.half_width + margin, thing.radius + margin
    (left, right), (top, bottom) = (
        (max(math.floor(centre - each), 0), min(math.ceil(centre + each), SIDE))
        for centre, each in zip((thing.x, thing.y), reach, strict=True)
    )
    mask[:, top:bottom, left:right] = 1
    return mask


@dataclass(frozen=True)
class Way:
    """How pictures are made: by which model and sampler in how many steps of the whole way, from which strength.

    method: EDITED, TOLD or TRAINED; NOISE is an edit of strength 1, which keeps nothing.
    """

    method: str
    model: str
    sampler: str
    steps: int
    strength: float

    @property
    def task(self) -> str:
        """What it is a way to do."""
        return EDIT if self.method in (EDITED, NOISE) else INPAINT

    @property
    def taken(self) -> int:
        """Steps that are taken."""
        return round(self.strength * self.steps)

    @property
    def label(self) -> str:
        """For progress."""
        return f"{self.model} {self.method} {self.strength:g}"


@dataclass(frozen=True)
class Samplers:
    """The models of a measurement by their names, and what they are sampled with.

    teacher: its name. students: names by steps.
    """

    models: dict[str, Model]
    teacher: str
    students: dict[int, str]
    sampler: str

    def ways(self, options: EditsConfig) -> Iterator[Way]:
        """Every way that is measured: the teacher's of its many steps, then the students'."""
        reference = options.reference
        yield from self._ways(options, self.teacher, reference.sampler, reference.steps)
        for steps in options.steps:
            yield from self._ways(options, self.students[steps], self.sampler, steps)
            yield Way(NOISE, self.students[steps], self.sampler, steps, 1.0)

    def _ways(self, options: EditsConfig, model: str, sampler: str, steps: int) -> Iterator[Way]:
        for strength in options.strengths:
            if is_whole(steps, strength):
                yield Way(EDITED, model, sampler, steps, strength)
        yield Way(TOLD, model, sampler, steps, 1.0)
        if self.models[model].network.takes_mask:
            yield Way(TRAINED, model, sampler, steps, 1.0)


def make(model: Model, way: Way, questions: Questions, w: float, start: int, stop: int) -> Tensor:
    """The pictures (N, C, H, W) that a way makes of questions start, ..., stop - 1, on the CPU, not clamped.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    asked, network = questions.changes(start, stop), model.network
    autoencoder = autoencoder_of(model.folder, model.device)
    assert isinstance(network.network, Network)  # as `fewstep.models.load` builds it
    noise, seeds = questions.noise(start, stop, network.network.input_shape)
    with torch.inference_mode(), knowingly():
        denoiser = with_guidance(network, w)
        cond = encoder_of(network).encode([change.prompt for change in asked])
        return remake(
            denoiser if way.method == TRAINED else as_generator(denoiser, autoencoder),
            render([change.before for change in asked]), noise.to(model.device), way.steps, way.strength, cond, w,
            mask=questions.masks(asked) if way.task == INPAINT else None, autoencoder=autoencoder,
            sampler=SAMPLERS[way.sampler], seeds=seeds,
        )  # fmt: skip


def key_of(model: Model, way: Way, questions: Questions, w: float) -> dict[str, Any]:
    """What determines a way's pictures."""
    autoencoder = autoencoder_of(model.folder, model.device)
    asked = json.dumps(asdict(questions), sort_keys=True)
    return {
        "format": 1, "questions": hashlib.sha256(asked.encode()).hexdigest(), **asdict(way), "model": model.digest,
        "autoencoder": autoencoder and autoencoder.digest, "device": model.device.type, "w": w,
    }  # fmt: skip


def make_shard(
    model: Model, way: Way, questions: Questions, w: float, start: int, stop: int, key: dict[str, Any],
    cache: ShardCache,
) -> float:  # fmt: skip
    """`make`, kept in the cache; returns the seconds that it took."""
    began = time.perf_counter()
    images = make(model, way, questions, w, start, stop)
    shard = Shard(images, time.perf_counter() - began)
    cache.put(key, start, stop, shard)
    return shard.seconds


@dataclass(frozen=True)
class Verdict:
    """What of a question was done.

    prompt: what it says holds, as the checker reads the picture. changed: an object of the new kind stands where the
    old one stood. kept: every other object stands where it stood. known: all pixels outside the mask are what they
    were, bit for bit (of inpainting).
    """

    prompt: bool
    changed: bool
    kept: bool
    known: bool = True

    @property
    def success(self) -> bool:
        """All of it."""
        return self.prompt and self.changed and self.kept and self.known


def judge(change: Change, found: Sequence[Found], reach: float, known: bool = True) -> Verdict:
    """Whether the objects that were found are those asked for, each within `reach` pixels of its place."""
    there = [any(_is(thing, each, reach) for each in found) for thing in change.after]
    kept = all(holds for i, holds in enumerate(there) if i != change.place)
    return Verdict(score(parse(change.prompt), found).all, there[change.place], kept, known)


def _is(thing: Thing, found: Found, reach: float) -> bool:
    alike = (thing.colour, thing.shape) == (found.colour, found.shape)
    return alike and math.hypot(thing.x - found.x, thing.y - found.y) <= reach


def judged(questions: Questions, images: Tensor, reach: float, task: str, start: int = 0) -> list[Verdict]:
    """Verdicts on the answers (N, C, H, W) to questions start, ...; those to INPAINT may only differ under the mask."""
    asked = questions.changes(start, start + len(images))
    same = torch.ones(len(images), dtype=torch.bool)
    if task == INPAINT:
        scenes, hidden = render([change.before for change in asked]), questions.masks(asked).bool()
        same = ((images == scenes) | hidden).flatten(1).all(1)
    found = zip(asked, read(images), same.tolist(), strict=True)
    return [judge(change, things, reach, known) for change, things, known in found]


def pasted(questions: Questions, images: Tensor, start: int = 0) -> Tensor:
    """The pictures that were asked about, with `images` under the mask alone. Shape: (N, C, H, W) -> the same."""
    asked = questions.changes(start, start + len(images))
    return paste(images, render([change.before for change in asked]), questions.masks(asked).bool())


def row_of(task: str, method: str, verdicts: Sequence[Verdict], **more: Any) -> Row:
    """A row of the table: what it is, and shares with their intervals (Wilson, 95 %)."""
    parts = ("success", "prompt", "changed", "kept", "known")
    shares = {part: share_of([getattr(verdict, part) for verdict in verdicts]) for part in parts}
    return {"task": task, "method": method, **more, **shares}


def about(way: Way, samplers: Samplers, w: float) -> dict[str, Any]:
    """What a row says of its way besides task and method."""
    return {
        "model": way.model, "teacher": way.model == samplers.teacher, "sampler": way.sampler, "steps": way.steps,
        "strength": way.strength, "nfe": nfe_of(way.sampler, way.taken, w, samplers.models[way.model].two_branches),
    }  # fmt: skip


NOTHING = {"model": "", "teacher": False, "sampler": "", "steps": 0, "strength": 0.0, "nfe": 0}  # of no edit


def verdicts(rows: list[Row], options: EditsConfig) -> Iterator[Target]:
    """The headline's student against the teacher, against no edit and against a sample that never saw the picture.

    Where models were trained with masks, being told what is known is an aim beside that.
    """
    if options.points is None:
        return
    methods = [method for method in (TRAINED, TOLD) if select(rows, method=method)]
    yield from _verdicts(rows, options, EDIT, EDITED, options.headline_strength, aim=False)
    for method in methods:
        yield from _verdicts(rows, options, INPAINT, method, 1.0, aim=method != methods[0])


def _verdicts(
    rows: list[Row], options: EditsConfig, task: str, method: str, strength: float, *, aim: bool
) -> Iterator[Target]:
    assert options.points is not None  # `verdicts` asked
    (teacher,) = select(rows, task=task, method=method, strength=strength, teacher=True)
    (student,) = select(rows, task=task, method=method, strength=strength, teacher=False, steps=options.headline)
    what = f"{task} ({method}), {options.headline} steps"
    behind = teacher["success"]["share"] - student["success"]["share"]
    yield Target(f"{what}: success below the teacher's of {teacher['steps']} steps", behind, options.points, aim=aim)
    for name, place in ((SOURCE, {}), (NOISE, {"steps": options.headline})):
        (other,) = select(rows, task=task, method=name, **place)
        ahead = student["success"]["low"] - other["success"]["high"]
        yield Target(f"{what}: interval above that of {name}", ahead, 0.0, "at_least", aim)
