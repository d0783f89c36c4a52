"""Trainings that have seconds: their number of updates is settled by their speed, once, and then is what it is."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lab_configs import digits, moments

from fewstep.distill import DenoiserTraining
from fewstep.lab import budget
from fewstep.lab.cluster.monitor import trainings
from fewstep.lab.config import ConfigError, TeacherConfig
from fewstep.lab.context import Interrupted
from fewstep.lab.data import Split
from fewstep.lab.ema import max_decay
from fewstep.lab.evaluation.comparison import training_of
from fewstep.lab.train import Trainer, learning_rate
from fewstep.models import NetworkDenoiser, UNet
from fewstep.schedules import Cosine

SLOW, EACH = 30.0, 2.0  # seconds of the first update, and of every other
OPTIONS = TeacherConfig(
    updates=1000, seconds=62.0, batch_size=4, anneal="linear", log_every=1, ema_half_life=0.5, checkpoint_seconds=0.0
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that only updates move; 2 of them warm up, 4 are timed."""
    clock = SimpleNamespace(now=0.0, each=EACH)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(budget, "WARM", 2)
    monkeypatch.setattr(budget, "TIMED", 4)
    update = Trainer.update

    def timed(self: Trainer) -> None:
        clock.now += clock.each if self.state.step else SLOW
        update(self)

    monkeypatch.setattr(Trainer, "update", timed)
    return clock


def trainer(out: Path, stop_after: int = 10**6, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    network = NetworkDenoiser(UNet.from_preset("debug", channels=8, attention=()), Cosine(), "v")
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = Trainer(
        DenoiserTraining(network, network.null_cond), Split(images, torch.arange(12) % 10), replace(OPTIONS, **changes),
        updates=replace(OPTIONS, **changes).updates, seed=1, out=out, device=torch.device("cpu"), bar=False,
        stopping=lambda: made.state.step >= stop_after,
    )  # fmt: skip
    return made


# After 6 updates 40 of the 62 seconds are gone; in the other 22 there is room for 11.
RIGHT = 17


@pytest.mark.usefixtures("clock")
def test_what_fits_is_done_and_rate_and_average_go_by_it(tmp_path: Path) -> None:
    """Slow first updates (compiling) taken for the speed would leave most of the time unused."""
    made = trainer(tmp_path)
    assert made.run().step == RIGHT
    assert json.loads((tmp_path / "updates.json").read_text())["updates"] == RIGHT
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == RIGHT
    assert lines[-1]["lr"] == pytest.approx(OPTIONS.lr / RIGHT)
    assert learning_rate(OPTIONS, RIGHT, RIGHT) == 0
    assert made.state.ema is not None
    assert made.state.ema.decay == max_decay(RIGHT, 0.5)


@pytest.mark.usefixtures("clock")
def test_never_more_than_asked_nor_undone(tmp_path: Path) -> None:
    assert trainer(tmp_path / "few", updates=9).run().step == 9
    assert trainer(tmp_path / "late", seconds=1.0).run().step == 6
    assert trainer(tmp_path / "tiny", updates=3).run().step == 3
    assert not (tmp_path / "tiny" / "updates.json").exists()


def test_what_was_settled_stays_and_gives_the_same_bits(tmp_path: Path, clock: SimpleNamespace) -> None:
    """A resumed run that settled anew would train with another learning rate than it began with."""
    whole, torn = trainer(tmp_path / "whole"), trainer(tmp_path / "torn", stop_after=9)
    whole.run()
    clock.now = 0.0
    with pytest.raises(Interrupted, match="9 of 17"):
        torn.run()
    clock.each = 20 * EACH
    torn = trainer(tmp_path / "torn")
    assert torn.run().step == RIGHT
    for each in (whole, torn):
        each.finish()
    (one,), (other,) = (each.method.networks.values() for each in (whole, torn))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_tables_and_progress_say_what_was_settled(tmp_path: Path) -> None:
    stage, folder = moments().stages["moments"], tmp_path / "steps_2"
    folder.mkdir()
    (folder / "DONE").write_text('{"seconds": 3}')
    assert training_of(folder, stage, 2)["updates"] == stage.updates
    budget.write_updates(folder, 6, stage)
    assert training_of(folder, stage, 2) == {"updates": 6, "student_updates": 3, "seconds": 3}
    assert dict(trainings(stage, tmp_path))[folder] == 6


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stages.teacher.seconds", "0", "stages.teacher.seconds=0.0: must be more than 0, or null"),
        ("weights", "fp16", "weights=fp16: must be bf16, or null"),
    ],
)
def test_wrong_values_are_named(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits(f"{key}={value}")
