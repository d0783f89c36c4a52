"""Two processes train as one does."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import lab_processes
import pytest
import torch
from lab_configs import DIGITS, MOMENTS, altered, digits, moments

from fewstep.lab.checkpoint import checkpoints, write_tensors
from fewstep.lab.classifier import Classifier, save_classifier
from fewstep.lab.cli import main
from fewstep.lab.config import ConfigError, TeacherConfig
from fewstep.lab.train import parts_of
from fewstep.lab.validate import validate
from fewstep.models import load

# No evaluation, and a teacher and a guide of a few updates: what is shared between processes is the training.
SHORT = [
    "~stages.classifier", "~stages.halve", "~stages.evaluate", "~stages.report",
    "stages.teacher.log_every=1", "stages.guide.log_every=1", "stages.teacher.updates=9", "stages.guide.updates=9",
    "stages.guide.accumulate=2",
]  # fmt: skip


def arguments(out: Path, *more: str) -> list[str]:
    return ["run", str(DIGITS), "preset=debug", f"out={out}", *SHORT, *more]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def torchrun(processes: int, *arguments: str, program: tuple[str, ...] = ("-m", "fewstep.lab")) -> list[str]:
    """What `torchrun --nproc-per-node` does, without its seconds of start-up: the environment, and one port.

    Returns what each process said.
    """
    everyone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, *program, *arguments],
            env={**os.environ, **everyone, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(processes)
    ]
    everything = [process.communicate(timeout=600)[0] for process in started]
    for process, said in zip(started, everything, strict=True):
        assert process.returncode == 0, said
    return everything


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Each its share of samples and of reference: a figure must not depend on how many made it, nor be of a part."""
    torch.manual_seed(0)
    save_classifier(Classifier(3, 4, width=8), tmp_path / "judge")
    for name, count in (("samples", 45), ("reference", 60)):
        write_tensors(tmp_path / f"{name}.safetensors", {"images": torch.rand(count, 3, 8, 8) * 2 - 1})
    shared = ["measure", "--samples", str(tmp_path / "samples.safetensors"), "--chunk", "20", "--device", "cpu",
              "--reference", str(tmp_path / "reference.safetensors"), "--features",
              str(tmp_path / "judge")]  # fmt: skip
    assert main([*shared, "--out", str(tmp_path / "one")]) == 0
    said = torchrun(2, *shared, "--out", str(tmp_path / "two"))
    for words, shares in zip(said, (("40 images", "25 images"), ("20 images", "20 images")), strict=True):
        assert re.findall(r"^\d+ images", words, re.MULTILINE) == list(shares)
    rows = [json.loads((tmp_path / out / "results.json").read_text())["rows"][0] for out in ("one", "two")]
    for name in ("fid", "is", "kid", "precision", "recall", "samples"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-6)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_make_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    # Broken: more GPUs train on repeated images or noise, or the embedding of w gets no gradient behind DDP
    # (diffusers #6278); either shows in the losses and weights.
    assert main(arguments(tmp_path / "one")) == 0
    torchrun(2, *arguments(tmp_path / "two"))
    for stage in ("teacher", "guide"):
        one, two = losses(tmp_path / "one" / stage), losses(tmp_path / "two" / stage)
        assert two == pytest.approx(one, rel=2e-4)
        ours, theirs = (load(tmp_path / name / stage / "model").state_dict() for name in ("one", "two"))
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-2, atol=2e-4)
    assert json.loads((tmp_path / "two/guide/run.json").read_text())[0]["world_size"] == 2


MATCHING = [
    "run", str(MOMENTS), "preset=debug", "stages.teacher.updates=4", "stages.moments.steps=[2]",
    *(f"~stages.{name}" for name in ("classifier", "sweep", "guide", "halve", "compare", "report")),
    *(f"stages.{name}.{key}" for name in ("moments", "instant") for key in ("updates=4", "log_every=1", "warmup=0")),
]  # fmt: skip


@pytest.mark.slow
def test_moment_matching_on_two_processes_is_that_on_one(tmp_path: Path) -> None:
    # Broken: two networks in turns hang or drift behind DDP; the instant form's gradient by the teacher, which DDP's
    # hooks never see, is each process's own, so that the student is matched to half the batch.
    assert main([*MATCHING, f"out={tmp_path / 'one'}"]) == 0
    torchrun(2, *MATCHING, f"out={tmp_path / 'two'}")
    for stage in ("moments", "instant"):
        one, two = (losses(tmp_path / name / stage / "steps_2") for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-2)
        assert len(one) == 4


@pytest.mark.slow
def test_networks_in_shards_train_as_whole_ones_and_go_on_in_any_number_of_processes(tmp_path: Path) -> None:
    # Broken: FSDP2 trains another network than one process does, or one that its own samplers cannot load; a run that
    # comes back on more or fewer GPUs starts anew, or without its optimiser's state.
    lab_processes.train(tmp_path / "one", lab_processes.teacher())
    lab_processes.train(tmp_path / "low1", lab_processes.teacher(), lab_processes.LOW)
    lab_processes.interrupted(tmp_path / "back")
    lab_processes.train(tmp_path / "moments1", lab_processes.moments(), lab_processes.moments_options())
    torchrun(2, str(tmp_path), program=(lab_processes.__file__,))
    parts = checkpoints(tmp_path / "there" / "checkpoints")
    assert [path.name for path in parts] == ["00000008.parts"]
    assert sorted(path.name for path in parts[0].iterdir()) == [
        "00000-of-00002.safetensors", "00001-of-00002.safetensors", "index.json",
    ]  # fmt: skip
    assert [path.name for path in checkpoints(tmp_path / "two" / "checkpoints")] == ["00000012.parts", "00000010.parts"]
    lab_processes.train(tmp_path / "there", lab_processes.teacher())
    for name in ("two", "there", "back"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4), name
        assert_close(tmp_path / name / "denoiser", tmp_path / "one" / "denoiser")
    assert losses(tmp_path / "low2") == pytest.approx(losses(tmp_path / "low1"), rel=1e-2)
    assert losses(tmp_path / "low1") != pytest.approx(losses(tmp_path / "one"), rel=1e-5)  # it is bfloat16
    assert losses(tmp_path / "moments2") == pytest.approx(losses(tmp_path / "moments1"), rel=1e-2)
    for network in ("student", "auxiliary"):
        assert_close(tmp_path / "moments2" / network, tmp_path / "moments1" / network)


def assert_close(ours: Path, theirs: Path) -> None:
    found, right = load(ours).state_dict(), load(theirs).state_dict()
    assert found.keys() == right.keys()
    for name, weight in right.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("stages.teacher.parallel", "zero3", "must be one of ddp, fsdp"),
        ("stages.teacher.precision", "fp16", "must be fp32 or bf16 with parallel=fsdp"),
        ("stages.teacher.compile", True, "must be false with parallel=fsdp"),
        ("stages.teacher.micro_batch", 0, "must be 1 or more, or null"),
    ],
)
def test_what_shards_cannot_do_is_refused_before_any_compute(key: str, value: object, right: str) -> None:
    config = altered(digits(), "stages.teacher.parallel", "fsdp")
    with pytest.raises(ConfigError, match=f"{key}={str(value).lower()}: {right}"):
        validate(altered(config, key, value))


def test_the_instant_form_refuses_shards_by_name() -> None:
    with pytest.raises(ConfigError, match=r"stages.instant.parallel=fsdp: must be ddp: .*FSDP2"):
        validate(altered(moments(), "stages.instant.parallel", "fsdp"))


@pytest.mark.parametrize(
    ("world", "accumulate", "micro_batch", "even", "parts"),
    [
        (1, 1, None, 1, 1), (8, 1, None, 1, 1), (2, 3, None, 1, 3),
        (1, 1, 8, 1, 6), (2, 1, 8, 1, 3), (4, 1, 8, 1, 2), (8, 1, 8, 1, 1),  # 48, 24, 12, 6 images at most 8 at a time
        (1, 2, 100, 1, 2), (1, 1, 5, 1, 12), (1, 1, 3, 2, 24), (1, 1, 1, 1, 48),
    ],
)  # fmt: skip
def test_parts_keep_the_batch_whatever_the_number_of_gpus(
    world: int, accumulate: int, micro_batch: int | None, even: int, parts: int
) -> None:
    # Broken: a run that moves to fewer GPUs runs out of memory, or trains with another batch.
    options = TeacherConfig(batch_size=48, accumulate=accumulate, micro_batch=micro_batch)
    assert parts_of(options, world, even=even) == parts


def test_a_share_that_has_no_two_halves_is_refused() -> None:
    options = TeacherConfig(batch_size=6)
    with pytest.raises(ConfigError, match=r"stages.instant.batch_size=6: the share of each of 2 processes, 3, must be"):
        parts_of(options, 2, "stages.instant", even=2)
