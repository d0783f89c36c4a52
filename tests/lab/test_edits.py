"""Editing and inpainting by prompt: what is asked, what counts as done, and a whole run at debug size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_configs import EXPERIMENTS
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.lab.cli import main
from fewstep.lab.compose import compose
from fewstep.lab.config import ConfigError, EditsConfig, ReferenceConfig
from fewstep.lab.evaluation.edits import (
    EDIT,
    INPAINT,
    Change,
    Questions,
    Samplers,
    box,
    changed,
    judge,
    judged,
    pasted,
    row_of,
    verdicts,
)
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.latents import autoencoder_of
from fewstep.lab.shapes import Thing, World, parse, read, render, score
from fewstep.models import load
from fewstep.samplers import ddim, edit, inpaint
from fewstep.schedules import sample_seeds, seeded_noise

SHAPES_INPAINT = EXPERIMENTS / "shapes_inpaint"
WORLD = World(held_out=(("red", "triangle"), ("blue", "circle")))
QUESTIONS = Questions(WORLD, seed=0, margin=2.0, noises=4)
ASKED = QUESTIONS.changes(0, 200)
BEFORE, AFTER = (render([getattr(change, side) for change in ASKED]) for side in ("before", "after"))


def shares(verdicts: list[Any]) -> dict[str, float]:
    parts = ("success", "prompt", "changed", "kept", "known")
    return {part: sum(getattr(each, part) for each in verdicts) / len(verdicts) for part in parts}


def test_one_object_changes_in_one_thing() -> None:
    """To what training has met, what no other object is, and what the prompt says: there is one right answer."""
    colours = 0
    for change in ASKED:
        differ = [i for i, (old, new) in enumerate(zip(change.before, change.after, strict=True)) if old != new]
        assert differ == [change.place]
        old, new = change.before[change.place], change.after[change.place]
        assert (old.colour == new.colour) != (old.shape == new.shape)
        assert replace(new, colour=old.colour, shape=old.shape) == old
        assert (new.colour, new.shape) not in WORLD.held_out
        assert len({(thing.colour, thing.shape) for thing in change.after}) == len(change.after)
        colours += old.colour != new.colour
    assert 60 < colours < 160
    holds = [score(parse(change.prompt), found).all for change, found in zip(ASKED, read(AFTER), strict=True)]
    assert sum(holds) >= 199  # what the checker reads of true pictures
    assert QUESTIONS.changes(120, 122) == ASKED[120:122]
    assert len({change.place for change in ASKED}) == 3


def test_the_changed_object_is_drawn_from_all_that_it_may_become() -> None:
    """Not always the first colour: a model that paints nothing else would pass."""
    scene = (Thing("circle", "red", "small", 10, 10, 3.5), Thing("square", "red", "small", 22, 22, 3.5))
    kinds = set()
    for i in range(40):
        new = changed(WORLD, scene, [0.0] * 9, [0.2, i / 40]).after[0]
        kinds.add((new.colour, new.shape))
    assert kinds == {("green", "circle"), ("yellow", "circle")}  # no red triangle, blue circle or second red square


def test_the_box_hides_the_object_and_no_more_than_asked() -> None:
    """What sticks out tells what was there, and a box over the neighbours would ask for them too."""
    for change in ASKED:
        thing = change.before[change.place]
        mask, alone = box(thing, 2.0), render([(thing,)])[0]
        assert (alone[:, mask[0] == 0] == -1).all()
        assert mask.sum() <= (2 * thing.half_width + 6) * (2 * thing.radius + 6)
    assert torch.equal(
        box(Thing("square", "red", "small", 4.5, 16.0, 3.5), 2.0).nonzero().amin(0)[1:], torch.tensor([10, 0])
    )


def test_true_answers_are_right_and_the_picture_as_it_was_is_not() -> None:
    """Both as an edit and as a painting; no edit keeps everything and changes nothing."""
    for task in (EDIT, INPAINT):
        assert shares(judged(QUESTIONS, AFTER, 3.0, task))["success"] >= 0.99
        none = shares(judged(QUESTIONS, BEFORE, 3.0, task))
        assert none["kept"] >= 0.99
        assert (none["success"], none["prompt"], none["changed"]) == (0, 0, 0)


def shifted(change: Change, other: int) -> list[Thing]:
    """The scene that is asked for, with object `other` 4 pixels off its place."""
    return [replace(thing, x=thing.x + 4.0 * (i == other % len(change.after))) for i, thing in enumerate(change.after)]


def test_a_right_picture_of_other_objects_is_no_edit() -> None:
    """A sample of the prompt that never saw the scene must fail, wherever its prompt holds."""
    for change in (each for each in ASKED if len(each.after) > 1):
        for other, said in ((change.place, "changed"), (change.place - 1, "kept")):
            verdict = judge(change, shifted(change, other), reach=3.0)
            assert not verdict.success
            assert not getattr(verdict, said)
            nearer = judge(change, shifted(change, other), reach=4.5)
            assert nearer.changed
            assert nearer.kept
    other = shares(judged(QUESTIONS, AFTER.roll(1, 0), 3.0, EDIT))
    assert other["success"] < 0.02


def test_one_object_too_many_is_no_success() -> None:
    """All that was asked for is there, and something else: the prompt does not hold."""
    change = next(c for c in ASKED if len(c.after) == 1)
    (there,) = change.after
    more = Thing("square", "yellow", "small", 31 - there.x, 31 - there.y, 3.5)
    verdict = judge(change, [there, more], reach=3.0)
    assert verdict.changed
    assert verdict.kept
    assert not verdict.success


def test_inpainting_must_keep_known_pixels_bit_for_bit() -> None:
    """Off by one float is off: it went through a network or a decoder. An edit may move any pixel."""
    images = AFTER.clone()
    known = (QUESTIONS.masks(ASKED) == 0).expand_as(images)
    images[known] = torch.nextafter(images[known], torch.ones(()))
    assert shares(judged(QUESTIONS, images, 3.0, INPAINT))["known"] == 0
    assert shares(judged(QUESTIONS, images, 3.0, EDIT))["success"] >= 0.99
    assert shares(judged(QUESTIONS, pasted(QUESTIONS, images), 3.0, INPAINT))["success"] >= 0.99
    later = judged(QUESTIONS, AFTER[50:60], 3.0, INPAINT, start=50)
    assert all(verdict.known for verdict in later)


class Student:
    """Stands for a model."""

    two_branches = False

    def __init__(self, takes_mask: bool) -> None:
        self.network = type("Network", (), {"takes_mask": takes_mask})


def ways(takes_mask: bool) -> list[tuple[str, str, int, float]]:
    names = {4: "s4", 2: "s2"}
    models: dict[str, Any] = {name: Student(takes_mask) for name in ("teacher", *names.values())}
    options = EditsConfig(strengths=[0.5, 0.75], steps=[4, 2], reference=ReferenceConfig("ddim", 64))
    return [
        (way.method, way.model, way.taken, way.strength)
        for way in Samplers(models, "teacher", names, "ddim").ways(options)
    ]


def test_students_are_edited_at_whole_steps_of_their_own() -> None:
    """0.75 of 2 steps would be 1 of them, another strength than the row says; and only one kind of model sees masks."""
    assert ways(takes_mask=False) == [
        ("edited", "teacher", 32, 0.5), ("edited", "teacher", 48, 0.75), ("told", "teacher", 64, 1.0),
        ("edited", "s4", 2, 0.5), ("edited", "s4", 3, 0.75), ("told", "s4", 4, 1.0), ("noise", "s4", 4, 1.0),
        ("edited", "s2", 1, 0.5), ("told", "s2", 2, 1.0), ("noise", "s2", 2, 1.0),
    ]  # fmt: skip
    more = [way for way in ways(takes_mask=True) if way not in ways(takes_mask=False)]
    assert more == [("trained", "teacher", 64, 1.0), ("trained", "s4", 4, 1.0), ("trained", "s2", 2, 1.0)]


def row(task: str, method: str, successes: int, steps: int = 0, *, teacher: bool = False, strength: float = 1.0) -> Any:
    verdict = judge(ASKED[0], ASKED[0].after, 3.0)
    found = [verdict if i < successes else replace(verdict, kept=False) for i in range(1000)]
    return row_of(task, method, found, steps=steps, teacher=teacher, strength=strength)


def test_verdicts() -> None:
    """Points below the teacher, and intervals apart from what needs no model and from what never saw the picture."""
    rows = [row(task, "source", 0) for task in (EDIT, INPAINT)] + [
        row(task, "noise", 100, 4) for task in (EDIT, INPAINT)
    ]
    rows += [row(EDIT, "edited", n, 64, teacher=True, strength=s) for n, s in ((500, 0.5), (800, 0.75))]
    rows += [row(EDIT, "edited", n, 4, strength=s) for n, s in ((900, 0.5), (740, 0.75))]
    rows += [row(INPAINT, method, 900, 64, teacher=True) for method in ("trained", "told")]
    rows += [row(INPAINT, "trained", 860, 4), row(INPAINT, "told", 100, 4)]
    found = list(verdicts(rows, EditsConfig(points=0.05)))
    values = [0.06, 0.71, 0.59, 0.04, 0.84, 0.72, 0.8, 0.08, -0.04]
    assert [target.value for target in found] == pytest.approx(values, abs=0.03)
    assert [target.value for target in found[::3]] == pytest.approx(values[::3])
    assert [target.reached for target in found] == [False, True, True, True, True, True, False, True, False]
    assert [target.aim for target in found] == [False] * 6 + [True] * 3
    assert not any(
        target.aim for target in verdicts([r for r in rows if r["method"] != "trained"], EditsConfig(points=0.05))
    )
    assert list(verdicts(rows, EditsConfig())) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strengths=[0.3]", "edits.strengths=0.3: must be in .0, 1. and a whole number of the teacher's 8 steps"),
        ("strengths=[1.5]", "edits.strengths=1.5: must be in"),
        ("headline_strength=0.75", "edits.headline_strength=0.75: must be one of 0.5"),
        ("headline=8", "edits.headline=8: must be one of 4, 2"),
        ("steps=[3]", "edits.steps=3: must be one of 4, 2"),
        ("w=5", "edits.w=5.0: must be in .0, 3., for which halve is trained"),
        ("points=5", "edits.points=5.0: must be in"),
        ("margin=-1", "edits.margin=-1.0: must be 0 or more pixels"),
        ("needs=[autoencoder,halve]", "exactly one stage of kind teacher"),
    ],
)
def test_configs_that_cannot_be(override: str, message: str) -> None:
    """Before hours of training, not after them."""
    with pytest.raises(ConfigError, match=message):
        compose(SHAPES_INPAINT, ["preset=debug", f"stages.edits.{override}"])


def test_a_world_without_anything_to_become() -> None:
    """Two objects of one shape and two colours: neither can change."""
    shapes = "data.shapes={colours: [red, green], shapes: [circle], held_out: [], composition: 0, most_objects: 2}"
    with pytest.raises(ConfigError, match="such that a red circle can become 2 others by one change, not 1"):
        compose(SHAPES_INPAINT, ["preset=debug", shapes, "data.num_classes=2"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "shapes_inpaint"
    assert main(["run", str(SHAPES_INPAINT), "preset=debug", f"out={out}"]) == 0
    return out


def kept_images(run: Path) -> list[Tensor]:
    """The first chunk of every way."""
    return [load_file(path)["images"] for path in sorted((run / "edits/cache").glob("*/0000000-*.safetensors"))]


@pytest.mark.slow
def test_the_run_measures_what_a_user_would_get(run: Path, tmp_path: Path) -> None:
    """By the command line and by the public functions: of another picture, mask or noise it would be another figure."""
    question = Questions(World(WORLD.shapes, WORLD.colours, WORLD.sizes, 3, WORLD.held_out), 0, 2.0, 4)
    (change,) = question.changes(0, 1)
    scene, mask = render([change.before]), question.masks([change])
    save_file({"images": scene}, tmp_path / "scene.safetensors")
    Image.fromarray((255 * mask[0, 0]).numpy().astype(np.uint8)).save(tmp_path / "mask.png")
    model = run / "halve/steps_4/model"
    common = ["--model", str(model), "--input", str(tmp_path / "scene.safetensors"), "--prompt", change.prompt]
    common += ["--w", "2", "--seed", "4", "--out", str(tmp_path), "--device", "cpu"]
    made = []
    for command in (["inpaint", "--mask", str(tmp_path / "mask.png")], ["edit", "--strength", "0.5"]):
        assert main([*command, *common]) == 0
        made.append(load_file(tmp_path / "samples.safetensors")["images"][0])
    student, autoencoder = load(model), autoencoder_of(model, torch.device("cpu"))
    assert autoencoder is not None
    assert student.text_encoder is not None
    noise, _ = question.noise(0, 1, (4, 8, 8))
    with torch.no_grad():
        x, text = autoencoder.encode(scene).mean, student.text_encoder.encode([change.prompt])
        seen = autoencoder.encode(torch.where(mask.bool(), 0.0, scene)).mean
        cells = torch.nn.functional.max_pool2d(mask, 4)
        painted = inpaint(student, x, noise, 4, 1.0, text, 2.0, mask=cells, masked_image=seen)
        hidden = {"mask": torch.ones(1, 1, 8, 8), "masked_image": autoencoder.encode(torch.zeros_like(scene)).mean}
        edited = edit(student, x, noise, 4, 0.5, {**text, **hidden}, 2.0)
        expected = torch.where(mask.bool(), autoencoder.decode(painted), scene)[0], autoencoder.decode(edited)[0]
    found = [images[0] for images in kept_images(run)]
    for there, mine in zip(made, expected, strict=True):
        torch.testing.assert_close(there, mine.clamp(-1, 1), rtol=0, atol=1e-4)
        assert min(float((mine - each).abs().max()) for each in found) < 1e-4


@pytest.mark.slow
def test_an_inpainting_model_is_sampled_as_a_generator(run: Path, tmp_path: Path) -> None:
    """By the command and by every measurement alike: everything is hidden, and the prompt says what is there."""
    folder = run / "halve/steps_4/model"
    command = [
        "sample",
        "--model",
        str(folder),
        "--num",
        "2",
        "--prompt",
        "a red circle",
        "--w",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*command, "--out", str(tmp_path)]) == 0
    student, autoencoder = load(folder), autoencoder_of(folder, torch.device("cpu"))
    assert autoencoder is not None
    assert student.text_encoder is not None
    noise = seeded_noise(sample_seeds(0, 0, torch.arange(2)), (4, 8, 8))
    with torch.no_grad():
        text, seen = (
            student.text_encoder.encode(["a red circle"] * 2),
            autoencoder.encode(torch.zeros(2, 3, 32, 32)).mean,
        )
        latents = ddim(student, noise, 4, {**text, "mask": torch.ones(2, 1, 8, 8), "masked_image": seen}, 2.0)
        measured = ddim(Model(folder, torch.device("cpu")).denoiser, noise, 4, text, 2.0)
        expected = autoencoder.decode(latents).clamp(-1, 1)
    torch.testing.assert_close(load_file(tmp_path / "samples.safetensors")["images"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(measured, latents, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_results_table_and_picture(run: Path) -> None:
    """One row per way and task; known pixels of every painting are exact; shares are those of the pictures kept."""
    results = json.loads((run / "edits/results.json").read_text())
    rows = results["rows"]
    assert [(r["task"], r["method"], r["steps"]) for r in rows if not r["teacher"]] == [
        ("edit", "source", 0), ("edit", "edited", 4), ("edit", "noise", 4), ("edit", "edited", 2), ("edit", "noise", 2),
        ("inpaint", "source", 0), ("inpaint", "told", 4), ("inpaint", "trained", 4), ("inpaint", "noise", 4),
        ("inpaint", "told", 2), ("inpaint", "trained", 2), ("inpaint", "noise", 2),
    ]  # fmt: skip
    assert {(r["method"], r["nfe"]) for r in rows if r["teacher"]} == {("edited", 8), ("told", 16), ("trained", 16)}
    for r in rows:
        assert r["success"]["trials"] == 12
        assert r["known"]["share"] == 1.0
    assert {r["kept"]["share"] for r in rows if r["task"] == "inpaint"} == {1.0}
    assert len(results["targets"]) == 9
    table = (run / "edits/table.md").read_text()
    assert "| inpaint | trained with masks | teacher | 8 | 1 | 16 | " in table
    assert "12 held-out scenes" in table
    with Image.open(run / "edits/edits.png") as picture:
        assert math.isclose(picture.height, 13 * 68 + 4, abs_tol=8)


@pytest.mark.slow
def test_a_killed_measurement_goes_on_where_it_was(run: Path, tmp_path: Path) -> None:
    """Only what is missing is made again, to the same bits."""
    before = {path: path.stat().st_mtime_ns for path in (run / "edits/cache").glob("*/*.safetensors")}
    table = (run / "edits/table.md").read_text()
    gone = sorted(before)[0]
    was = load_file(gone)["images"]
    for path in (gone, run / "edits/DONE"):
        path.unlink()
    assert main(["run", str(SHAPES_INPAINT), "preset=debug", f"out={run}"]) == 0
    assert torch.equal(load_file(gone)["images"], was)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != gone)
    assert (run / "edits/table.md").read_text() == table
