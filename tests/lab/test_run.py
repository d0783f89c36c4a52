"""`fewstep run` from the command line to the last student, on a debug-size run."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_configs import DIGITS

from fewstep.lab.cli import main
from fewstep.models import load

TRAINED = ("classifier", "teacher", "guide", "halve")
MODELS = ("teacher/model", "guide/model", "halve/steps_4/model", "halve/steps_2/model", "halve/steps_1/model")
# Small enough that a test can afford several runs; still every stage, several checkpoints in each.
SHORT = ["stages.classifier.updates=4", "stages.halve.steps=[2,1]", "~stages.evaluate", "~stages.report"]


def arguments(out: Path, *more: str) -> list[str]:
    return ["run", str(DIGITS), "preset=debug", f"out={out}", *more]


def weights(out: Path) -> dict[str, bytes]:
    """Every saved weight file by its path below the run's folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("**/model/model.safetensors"))}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with SHORT."""
    out = tmp_path_factory.mktemp("runs") / "short"
    assert main(arguments(out, *SHORT)) == 0
    return out


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """preset=debug up to the students."""
    out = tmp_path_factory.mktemp("runs") / "debug"
    assert main(arguments(out, "--until", "halve")) == 0
    return out


def test_every_stage_leaves_its_models_and_what_they_are_for(debug_run: Path) -> None:
    # Broken: a model has to be told its own schedule, steps or range of w by whoever loads it.
    for name in TRAINED:
        assert (debug_run / name / "DONE").is_file()
        assert json.loads((debug_run / name / "run.json").read_text())[0]["commit"]
    trained = [load(debug_run / name).trained for name in MODELS]
    assert [entry.kind for entry in trained if entry] == ["teacher", "guided", *["deterministic"] * 3]
    assert [entry.steps for entry in trained if entry] == [None, None, 4, 2, 1]
    assert [entry.w_range for entry in trained if entry] == [None, *[(0.0, 4.0)] * 4]
    assert not (debug_run / "evaluate").exists()
    steps = [json.loads(line)["step"] for line in (debug_run / "halve/steps_1/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 12  # updates_at


def distance(student: Path, teacher: Path) -> float:
    """The largest difference of a weight of the teacher's from the student's of that name."""
    found, expected = (load(folder).state_dict() for folder in (student, teacher))
    return max(float((found[name] - weight).abs().max()) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("given", "until", "student", "teacher"),
    [
        (["teacher"], "guide", "guide", "teacher"),
        (["guide"], "halve", "halve/steps_4", "guide"),
        (["guide", "halve/steps_4"], "halve", "halve/steps_2", "halve/steps_4"),
        (["guide", "halve/steps_4", "halve/steps_2"], "halve", "halve/steps_1", "halve/steps_2"),
    ],
)
def test_each_student_starts_from_its_teacher_and_moves(
    debug_run: Path, tmp_path: Path, given: list[str], until: str, student: str, teacher: str
) -> None:
    # Broken: a student starts from fresh weights or from another's than its teacher, or does not learn.
    for name in {"teacher", *given}:
        shutil.copytree(debug_run / name, tmp_path / name)
    still = [f"stages.{name}.{key}" for name in ("guide", "halve") for key in ("lr=1e-12", "updates=1")]
    if "guide" in given:  # made as the debug run made it
        still = still[2:]
    more = ["stages.halve.updates_at.1=1", "~stages.classifier", "~stages.evaluate", "~stages.report"]
    assert main(arguments(tmp_path, *still, *more, "--until", until)) == 0
    assert distance(tmp_path / student / "model", tmp_path / teacher / "model") < 1e-7
    assert distance(debug_run / student / "model", debug_run / teacher / "model") > 1e-4


def test_running_again_touches_nothing(debug_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in debug_run.glob("*/**/*") if path.is_file()}
    assert main(arguments(debug_run, "--until", "halve", "tensorboard=true", "stages.guide.log_every=3")) == 0
    after = {path: path.stat().st_mtime_ns for path in debug_run.glob("*/**/*") if path.is_file()}
    assert before == after
    assert capsys.readouterr().out.count("done before") == len(TRAINED)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.teacher.lr=0.5", "stages.teacher.lr=0.5: "),
        ("seed=3", "seed=3: "),
        ("stages.halve.steps=[2,1]", "stages.halve.steps=[2, 1]: "),
    ],
)
def test_changed_config_is_refused_before_anything_is_touched(
    debug_run: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    before = weights(debug_run)
    assert main(arguments(debug_run, override, "~stages.evaluate", "~stages.report")) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"fewstep: {words}")
    assert "was made with" in message
    assert message.count("\n") == 1
    assert weights(debug_run) == before


def test_another_seed_is_another_run(short_run: Path, tmp_path: Path) -> None:
    assert main(arguments(tmp_path, *SHORT, "seed=1", "--until", "teacher")) == 0
    other = weights(tmp_path)
    assert len(other) == 2
    assert all(weights(short_run)[name] != content for name, content in other.items())


def test_each_stage_is_the_same_whatever_its_process_did_before(short_run: Path, tmp_path: Path) -> None:
    # Broken: a run that was interrupted between two stages initialises the next one's new weights otherwise.
    for name in ("classifier", "teacher", "halve"):
        shutil.copytree(short_run / name, tmp_path / name)
    (tmp_path / "halve/DONE").unlink()
    shutil.rmtree(tmp_path / "halve/steps_1")
    torch.manual_seed(999)
    assert main(arguments(tmp_path, *SHORT)) == 0
    assert weights(tmp_path) == weights(short_run)


def test_killed_between_the_last_update_and_done_it_writes_the_same_model(short_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(short_run, out)
    for name in ("classifier", "guide", "halve", "halve/steps_1"):
        (out / name / "DONE").unlink()
        shutil.rmtree(out / name / "model", ignore_errors=True)
    assert main(arguments(out, *SHORT)) == 0
    assert weights(out) == weights(short_run)


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fewstep.lab", *arguments(out, *SHORT, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_stopped_and_killed_again_and_again_it_ends_in_the_same_weights(short_run: Path, tmp_path: Path) -> None:
    # Broken: preemption, Ctrl-C or a crash costs more than the work since the last checkpoint, or changes the result.
    out = tmp_path / "run"
    for number, moment in (
        (signal.SIGKILL, "teacher/checkpoints/00000010.safetensors"),
        (signal.SIGTERM, "guide/checkpoints/00000010.safetensors"),
        (signal.SIGINT, "halve/steps_2/checkpoints/00000005.safetensors"),
    ):
        process = start(out)
        wait_for(out / moment, process)
        process.send_signal(number)
        said, complaint = process.communicate(timeout=600)
        if number != signal.SIGKILL:
            assert process.returncode == 128 + number, (said, complaint)
            assert "the same command goes on from there" in said
            assert "Traceback" not in complaint
    assert not (out / "halve" / "DONE").exists()
    assert main(arguments(out, *SHORT)) == 0
    assert weights(out) == weights(short_run)


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(arguments(tmp_path, *SHORT)) == 2
    assert "another run is at work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["stages.teacher.updats=3"], "did you mean stages.teacher.updates?"),
        (["stages.halve.steps=[16,6]"], "not reached from 16 by halving"),
        (["device=cuda:7"], "device=cuda:7"),
        (["device=gpu"], "device=gpu: must be auto, cpu, cuda or cuda:N"),
        (["--until", "gude"], "--until gude: no such stage"),
        (["network.overrides.channel=24"], "channel"),
        (["network.overrides.image_size=16"], "network.overrides.image_size=16: digits has 8"),
        (["network.preset=digit"], "network.preset=digit: UNet has debug, digits"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2_before_compute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert main(arguments(tmp_path / "run", *more)) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("fewstep: ")
    assert message.count("\n") == 1
    assert not list(tmp_path.glob("run/*/*"))


@pytest.mark.parametrize("more", [["stages.evaluate.weights=[0,9]"], ["stages.guide.w_range=[0,2]"]])
def test_weights_outside_the_students_range_are_said_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    # Broken: an hour of training, and then --strict refuses to evaluate it.
    assert main(arguments(tmp_path / "run", *more, "--strict")) == 2
    message = capsys.readouterr().err
    assert "lie outside the range [0, " in message
    assert "(--strict)" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    # Without --strict a warning; here the first stage is refused right after it.
    (tmp_path / "run/classifier").mkdir(parents=True)
    (tmp_path / "run/classifier/run.json").write_text("{")
    assert main(arguments(tmp_path / "run", *more)) == 2
    captured = capsys.readouterr()
    assert "lie outside the range [0, " in " ".join(captured.out.split())
    assert "run.json is damaged" in captured.err


def test_what_must_be_given_is_said_without_what_may_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: experiment\n")


def test_damaged_teacher_is_refused_by_name(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(short_run / "teacher", out / "teacher")
    path = out / "teacher/model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert main(arguments(out, *SHORT, "~stages.classifier")) == 2
    message = capsys.readouterr().err
    assert "teacher/model" in message
    assert message.count("\n") == 1


def test_smaller_student_and_baseline_at_one_w_are_entries_of_the_same_stages(tmp_path: Path) -> None:
    # Broken: the README's rows for half the parameters and for the fixed w cannot be made from a config.
    more = [
        "+stage@stages.small=guide", "stages.small.needs=[teacher]", "stages.small.updates=3",
        "stages.small.student.network.overrides.channels=8",
        "+stage@stages.small_halve=halve", "stages.small_halve.needs=[small]", "stages.small_halve.steps=[1]",
        "stages.small_halve.updates=3",
        "+stage@stages.one_w=guide", "stages.one_w.needs=[teacher]", "stages.one_w.w_range=[1,1]",
        "stages.one_w.updates=3", "stages.teacher.updates=3", "stages.guide.updates=3",
        "stages.halve.student.network.overrides.blocks=2", "stages.halve.updates=3", "stages.halve.updates_at=null",
    ]  # fmt: skip
    assert main(arguments(tmp_path, *SHORT, *more[:-1])) == 0

    def size(name: str) -> int:
        return sum(weight.numel() for weight in load(tmp_path / name / "model").parameters())

    assert size("small") < 0.5 * size("guide")
    assert size("small_halve/steps_1") == size("small")
    assert size("halve/steps_2") == size("halve/steps_1") > size("guide")
    trained = load(tmp_path / "one_w/model").trained
    assert trained is not None
    assert trained.w_range == (1.0, 1.0)


def test_compiled_networks_train_as_they_are_and_save_under_their_own_names(
    short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken: `compile=true` saves `_orig_mod.` names that nothing loads, or trains another network than it saves.
    # The tracing is what can break; generating code for it is the compiler's own affair and takes a minute.
    compiled = []
    real = torch.compile

    def traced(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append(function)
        return real(function, **{**options, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", traced)
    more = ["stages.guide.compile=true", "--until", "guide"]
    shutil.copytree(short_run / "teacher", tmp_path / "teacher")
    assert main(arguments(tmp_path, *SHORT, "~stages.classifier", *more)) == 0
    assert len(compiled) == 2  # the teacher and the student
    theirs, ours = (load(out / "guide/model").state_dict() for out in (short_run, tmp_path))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5)
