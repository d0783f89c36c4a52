"""Stochastic students and encoders from the command line to the measurement, on debug-size runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_configs import DIGITS
from rich.console import Console

from fewstep.distill import EncoderDistillation, encoder_target
from fewstep.lab.cli import main
from fewstep.lab.compose import compose
from fewstep.lab.config import ConfigError, DataConfig
from fewstep.lab.data import load_data
from fewstep.lab.targets import training_of
from fewstep.models import load
from fewstep.samplers import ddim, encode
from fewstep.schedules import Trained

pytestmark = pytest.mark.slow  # whole runs
SHORT = [
    "preset=debug", "stages.classifier.updates=4", "stages.teacher.updates=6", "stages.guide.updates=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "stochastic"
    more = [
        "stages.halve.steps=[2,1]", "stages.halve.updates=2", "stages.stochastic.steps=[4,2,1]",
        "stages.stochastic.updates=2", "~stages.fixed_guide", "~stages.fixed", "stages.grid.weights=[0]",
        "stages.grid.needs=[classifier,teacher,halve,stochastic]", "stages.grid.targets=[]",
        "stages.grid.num_samples=30",
    ]  # fmt: skip
    experiment = str(DIGITS.parent / "digits_stochastic")
    assert main(["evaluate", experiment, *SHORT, *more, f"out={out}", "--grid"]) == 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder).network.state_dict())


def test_stochastic_students_are_a_chain_of_their_own(stochastic: Path) -> None:
    """Saved as what they are, from stage one and not from the deterministic ones; the last a copy of that before."""
    for steps in (4, 2, 1):
        trained = load(stochastic / "stochastic" / f"steps_{steps}" / "model").trained
        assert trained is not None
        assert (trained.kind, trained.steps, trained.w_range) == ("stochastic", steps, (0.0, 4.0))
    two, one = (weights(stochastic / "stochastic" / f"steps_{n}" / "model") for n in (2, 1))
    assert all(torch.equal(two[name], one[name]) for name in two)
    assert not (stochastic / "stochastic/steps_1/metrics.jsonl").exists()
    other = weights(stochastic / "halve/steps_2/model")
    assert any(not torch.equal(two[name], other[name]) for name in two)


def test_the_grid_of_a_run_says_which_student_was_not_trained(stochastic: Path) -> None:
    """And samples each by the sampler that it is for."""
    results: dict[str, Any] = json.loads((stochastic / "grid" / "results.json").read_text())
    marked = {(row["stage"], row["column"]): row["same_as"] for row in results["rows"] if row["same_as"]}
    assert marked == {("stochastic", 1): 2}
    students = [row for row in results["rows"] if row["kind"] in ("deterministic", "stochastic")]
    assert {row["stage"]: row["sampler"] for row in students} == {"halve": "ddim", "stochastic": "stochastic"}
    assert "(= 2 steps)" in (stochastic / "grid" / "table.md").read_text()


def test_encoders_are_trained_saved_and_measured(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The figures of `invert` can be made again from the saved models by the public functions alone."""
    out = tmp_path_factory.mktemp("runs") / "transfer"
    more = [
        "stages.decoder.updates=2", "stages.encoder.updates=2", "stages.invert.steps=[4]", "stages.invert.weights=[1]",
        "stages.decoder.steps=[4]", "stages.encoder.steps=[4]",
    ]  # fmt: skip
    assert main(["run", str(DIGITS.parent / "digits_transfer"), *SHORT, *more, f"out={out}"]) == 0
    encoder, decoder = (load(out / name / "steps_4" / "model") for name in ("encoder", "decoder"))
    assert encoder.trained is not None
    assert (encoder.trained.kind, encoder.trained.steps) == ("encoder", 4)
    held = load_data(DataConfig()).heldout
    x, labels = held.images[:20], held.labels[:20]
    back = ddim(decoder, None, 4, labels, 1.0, z=encode(encoder, x, 4, labels, 1.0))
    rows = json.loads((out / "invert" / "results.json").read_text())["rows"]
    (row,) = (row for row in rows if row["method"] == "distilled")
    assert row["round_trip_rmse"] == pytest.approx(float((back - x).square().mean().sqrt()), rel=1e-3)
    assert (out / "invert" / "transfer.png").is_file()
    losses = [json.loads(line)["loss"] for line in (out / "encoder/steps_4/metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 10 for loss in losses)


def test_a_teacher_beside_the_guide_gives_the_first_halving_its_targets(tmp_path: Path) -> None:
    """Under classifier-free guidance, not stage one; the students after the first follow the one before."""
    experiment = str(DIGITS.parent / "digits_transfer")
    chain = ["stages.encoder.needs=[guide,teacher]", "stages.encoder.steps=[8,4]", "~stages.invert"]
    more = [*SHORT, *chain, f"out={tmp_path}"]
    assert main(["run", experiment, *more, "--until", "guide"]) == 0
    config = compose(experiment, more)
    method, _ = training_of(config, "encoder", Console(quiet=True))
    held = load_data(config.data).heldout
    z, y, t, w = held.images[:6], held.labels[:6], torch.arange(1, 7) / 8, torch.linspace(0, 1, 6)
    teacher = load(tmp_path / "teacher/model")
    assert teacher.null_cond is not None
    null = teacher.null_cond.expand(6)

    class ByHand:
        schedule = teacher.schedule

        def __call__(self, z: torch.Tensor, t: torch.Tensor, cond: object = None, w: object = None) -> torch.Tensor:
            scale = torch.linspace(0, 1, 6).view(-1, 1, 1, 1)
            return (1 + scale) * teacher(z, t, y) - scale * teacher(z, t, null)

    batch = method.draw(z, y, torch.arange(6), 0)
    batch = dataclasses.replace(batch, z=z, t=t, w=w, cond=y)
    torch.testing.assert_close(method.targets(batch), encoder_target(ByHand(), z, t, 8, y, w), atol=1e-4, rtol=1e-4)
    assert main(["run", experiment, *more, "stages.encoder.updates=2", "--until", "encoder"]) == 0
    longer = compose(experiment, [*more, "stages.encoder.steps=[8,4,2]"])
    method, _ = training_of(longer, "encoder", Console(quiet=True))
    assert isinstance(method, EncoderDistillation)
    assert method.teacher.trained == Trained("encoder", 4, (0.0, 1.0))


def test_two_teachers_beside_the_guide_are_refused() -> None:
    """Which of them is guided could only be guessed."""
    with pytest.raises(ConfigError, match=r"stages.encoder.needs=.*exactly one stage of kind teacher or pretrained"):
        compose(
            str(DIGITS.parent / "digits_transfer"),
            ["+stage@stages.other=teacher", "stages.encoder.needs=[guide,teacher,other]"],
        )
