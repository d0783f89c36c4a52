"""Folders remember the config that made them; another one is refused by the name of the key."""

from pathlib import Path

import pytest
import torch
from lab_configs import altered
from omegaconf import OmegaConf
from rich.console import Console

from fewstep.lab import record, runner
from fewstep.lab.config import Config, ConfigError
from fewstep.lab.context import Interrupted, StageContext
from fewstep.lab.evaluation.circumstances import stage_seconds


@pytest.mark.parametrize(
    ("key", "value", "stage", "words"),
    [
        ("stages.guide.lr", 0.25, "guide", "stages.guide.lr=0.25"),
        ("stages.teacher.updates", 99, "guide", "stages.teacher.updates=99"),
        ("network.overrides", {"channels": 24}, "teacher", "network.overrides.channels=24"),
        ("seed", 8, "classifier", "seed=8"),
        ("schedule", {"type": "Karras"}, "teacher", "schedule.type=Karras"),
        ("stages.guide.grad_clip", None, "guide", "stages.guide.grad_clip=null"),
    ],
)
def test_changed_result_is_refused_with_old_and_new_value(
    debug_config: Config, tmp_path: Path, key: str, value: object, stage: str, words: str
) -> None:
    # Broken: a table mixes two settings and nobody can tell.
    record.begin(debug_config, stage, tmp_path)
    record.refuse_mixing(debug_config, stage, tmp_path)
    with pytest.raises(ConfigError) as caught:
        record.refuse_mixing(altered(debug_config, key, value), stage, tmp_path)
    assert words in str(caught.value)
    assert "was made with" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "stage"),
    [
        ("progress", False, "guide"),
        ("tensorboard", True, "guide"),
        ("stages.guide.log_every", 3, "guide"),
        ("stages.guide.checkpoint_seconds", 3.0, "guide"),
        ("out", "elsewhere", "guide"),
        ("stages.halve.updates", 77, "guide"),  # guide does not rest on what comes after it
        ("stages.evaluate.num_samples", 77, "halve"),
    ],
)
def test_what_changes_no_result_of_the_stage_may_change(
    debug_config: Config, tmp_path: Path, key: str, value: object, stage: str
) -> None:
    # Broken: turning off a progress bar costs the user a day of training.
    record.begin(debug_config, stage, tmp_path)
    record.refuse_mixing(altered(debug_config, key, value), stage, tmp_path)


def test_folder_older_than_a_part_of_the_config_that_changes_no_result_is_taken(
    debug_config: Config, tmp_path: Path
) -> None:
    # Broken: after an update of fewstep every finished run is refused for a key that its folder could not know.
    record.begin(debug_config, "guide", tmp_path)
    path = tmp_path / "config.yaml"
    found = OmegaConf.load(path)
    del found["cluster"]
    OmegaConf.save(found, path)
    record.refuse_mixing(debug_config, "guide", tmp_path)
    del found["schedule"]
    OmegaConf.save(found, path)
    with pytest.raises(ConfigError, match=r"schedule\.type=Cosine"):
        record.refuse_mixing(debug_config, "guide", tmp_path)


def test_other_threads_are_noticed(debug_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.begin(debug_config, "guide", tmp_path)
    assert record.other_circumstances(tmp_path) is None
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    assert "threads" in str(record.other_circumstances(tmp_path))


def test_commit_of_the_code_is_written(debug_config: Config, tmp_path: Path) -> None:
    record.begin(debug_config, "guide", tmp_path)
    (call,) = record.read_calls(tmp_path)
    assert call["commit"] == record.commit()
    record.begin(debug_config, "guide", tmp_path)
    assert len(record.read_calls(tmp_path)) == 2


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"- [a\n: b", b"17", b"\xff\xfe", b"${", b"a: ${b:", b"[1]"])
def test_damaged_files_are_named_with_what_to_do(
    debug_config: Config, tmp_path: Path, name: str, content: bytes
) -> None:
    # Broken: pages of a YAML parser, or "Expecting value: line 1" of nobody knows which file.
    record.begin(debug_config, "guide", tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        record.refuse_mixing(debug_config, "guide", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name} is damaged: restore it, or delete {tmp_path} ")
    assert "\n" not in str(caught.value)


def test_time_of_a_stage_is_that_of_all_its_calls(debug_config: Config, tmp_path: Path) -> None:
    # Broken: a training that was stopped in its last minute is reported to take a minute, or not at all.
    record.begin(debug_config, "teacher", tmp_path / "teacher")
    record.finish(tmp_path / "teacher", 1.0)
    guide = tmp_path / "guide"
    for seconds in (100.0, 20.0):
        record.begin(debug_config, "guide", guide)
        record.interrupt(guide, seconds)
    record.begin(debug_config, "guide", guide)  # killed: nobody knows how long it worked
    record.begin(debug_config, "guide", guide)
    record.finish(guide, 3.5)
    ctx = StageContext(debug_config, debug_config.stages["halve"], {}, tmp_path / "halve", torch.device("cpu"))
    assert stage_seconds(ctx) == {"teacher": 1.0, "guide": 123.5}  # halve needs guide, guide the teacher


def test_a_call_that_was_stopped_says_how_long_it_worked(
    debug_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: StageContext) -> None:
        raise Interrupted("stopped")

    monkeypatch.setattr("fewstep.lab.stages.classifier.run", stop)
    config = altered(debug_config, "out", str(tmp_path))
    assert runner.run_experiment(config, until="classifier", console=Console(quiet=True)) == 128 + 15
    (call,) = record.read_calls(tmp_path / "classifier")
    assert 0 <= call["seconds"] < 600
