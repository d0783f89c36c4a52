"""tools/gpu_bundle.py and tools/run_leg.py: legs run one after another from what was brought and left."""

import importlib.metadata as metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lab_configs import EXPERIMENTS
from safetensors.torch import load_file, save_file

from fewstep.lab import runner
from fewstep.lab.compose import compose
from fewstep.lab.networks import build_denoiser, guided_student
from fewstep.lab.signals import stop_on_signals
from fewstep.lab.stages.fit import round_weights
from fewstep.models import save

TOOLS = Path(__file__).parents[2] / "tools"
CIFAR10 = EXPERIMENTS / "cifar10"
TINY = [
    "preset=debug", "weights=bf16", "stages.classifier.updates=20", "stages.teacher.updates=8",
    "stages.guide.updates=6", "stages.sweep.noise_levels=[0]", "stages.sweep.steps=2", "stages.halve.steps=[2,1]",
    "stages.halve.updates_at={2: 4, 1: 4}", "stages.grid.steps=[2,1]", "stages.grid.weights=[4]",
    "stages.moments.steps=[2]", "stages.moments.updates=4", "stages.compare.sampling_seeds=1",
]  # fmt: skip
# What the machine has; scikit-learn for the digits that stand in for CIFAR-10 alone.
DISTRIBUTIONS = ["torch", "torchvision", "numpy", "scipy", "pillow", "safetensors", "matplotlib", "PyYAML"]
IMAGES = {"cifar10_jpegq75_train.npz": 15_143_500, "cifar10_jpegq75_test.npz": 3_031_911}  # bytes
LEGS = (
    {"teacher", "guide"},
    {"halve.steps_2", "halve.steps_1"},
    {"moments.steps_2"},
)  # models that each leaves


@pytest.fixture(scope="module")
def tools() -> SimpleNamespace:
    sys.path.insert(0, str(TOOLS))
    try:
        import gpu_bundle
        import leg_files
        import run_leg
    finally:
        sys.path.remove(str(TOOLS))
    return SimpleNamespace(bundle=gpu_bundle, files=leg_files, leg=run_leg)


def bundle(tools: SimpleNamespace, leg: int, out: Path, legs: list[Path], **changes: object) -> Path:
    options = {"leg": leg, "overrides": TINY, "data": None, "legs": legs, "experiment": CIFAR10, "out": out, **changes}
    tools.bundle.make(Namespace(**options))
    return out


def link(names: set[str], site: Path) -> Path:
    """A folder in which these distributions of the test environment, and no others, can be imported."""
    site.mkdir()
    for name in names:
        for top in {file.parts[0] for file in metadata.files(name) or ()} - {"..", "__pycache__"}:
            original = Path(sysconfig.get_path("purelib")) / top
            if original.exists() and not top.endswith(".pth") and not (site / top).exists():
                (site / top).symlink_to(original)
    return site


@pytest.fixture(scope="module")
def legs(tools: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three legs, each in a fresh folder of a python that has DISTRIBUTIONS, from the files of those before."""
    home = tmp_path_factory.mktemp("legs")
    site = link(tools.bundle.closure([*DISTRIBUTIONS, "scikit-learn"]), home / "site")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "FEWSTEP_TRACEBACK": "1"}
    for leg in (1, 2, 3):
        there = home / f"machine{leg}"
        files = [home / f"files{n}" for n in range(1, leg)]
        made = bundle(tools, leg, there / "gpu_bundle", files)
        command = [sys.executable, "-S", made / "tools/run_leg.py", str(leg), *TINY, "out=run"]
        done = subprocess.run(
            [*command, "--out", home / f"files{leg}"],
            cwd=there, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"leg {leg}: done" in done.stdout
    return home


@pytest.mark.slow
@pytest.mark.packaging
def test_each_leg_leaves_its_models_and_the_records_of_all(legs: Path) -> None:
    """The machine is bare again after each leg: what is not brought back is lost."""
    for number, models in enumerate(LEGS, 1):
        files = {path.name for path in (legs / f"files{number}").iterdir()}
        assert files == {"run.zip", *(f"{name}.safetensors" for name in models)}
    with zipfile.ZipFile(legs / "files3/run.zip") as archive:
        names = set(archive.namelist())
        compared = json.loads(archive.read("compare/results.json"))
    stages = ("classifier", "teacher", "guide", "sweep", "halve", "grid", "moments", "compare", "report")
    assert {f"{stage}/DONE" for stage in stages} <= names
    assert {"grid/heat_map.png", "report/index.html", "teacher/metrics.jsonl"} <= names
    assert "not Inception" in compared["features"]
    assert compared["circumstances"]["commit"] != "unknown"


@pytest.mark.slow
@pytest.mark.packaging
def test_models_are_the_same_bits_on_every_machine(legs: Path) -> None:
    """A leg must distil and measure exactly what the one before trained."""
    one, three = (legs / f"machine{n}/run/teacher/model/model.safetensors" for n in (1, 3))
    assert one.read_bytes() == three.read_bytes()
    weights, halves = load_file(one), load_file(legs / "files1/teacher.safetensors")
    assert {w.dtype for w in halves.values()} == {torch.bfloat16}
    assert all(torch.equal(weights[name], half.float()) for name, half in halves.items())


@pytest.mark.slow
@pytest.mark.packaging
def test_a_leg_is_brought_what_it_reads_alone(legs: Path) -> None:
    """64 MiB travel: the students of a leg are as much as its data."""
    brought = {n: {path.stem for path in (legs / f"machine{n}").rglob("legs/*/*.safetensors")} for n in (1, 2, 3)}
    assert brought == {1: set(), 2: {"teacher", "guide"}, 3: {"teacher", "halve.steps_2", "halve.steps_1"}}
    restored = legs / "machine3/run/guide/model"
    assert not (restored / "model.safetensors").exists()
    assert (restored / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.packaging
def test_files_of_a_leg_that_are_missing_or_others_are_named(
    legs: Path, tools: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(tools.files.LegError, match=r"leg 2 needs .*guide.* of an earlier leg: give its"):
        bundle(tools, 2, tmp_path / "b", [])
    with pytest.raises(tools.files.LegError, match=r"run\.zip: missing or damaged"):
        bundle(tools, 2, tmp_path / "b", [tmp_path])
    files = tmp_path / "files"
    shutil.copytree(legs / "files1", files)
    shutil.copy(files / "guide.safetensors", files / "teacher.safetensors")
    with pytest.raises(tools.files.LegError, match=r"teacher\.safetensors: not the weights that run\.zip tells of"):
        tools.files.restore(files, tmp_path / "run")
    (files / "teacher.safetensors").unlink()
    with pytest.raises(tools.files.LegError, match=r"--legs: none has teacher\.safetensors"):
        bundle(tools, 2, tmp_path / "b", [files])


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of preset=small whose teacher and stage one were trained for no time."""
    run = tmp_path_factory.mktemp("small")
    config = compose(CIFAR10, ["preset=small", f"data.files.path={run}"])
    teacher = build_denoiser(config, config.network)
    models = {"teacher": teacher, "guide": guided_student(teacher, None, "normalized", (0.0, 4.0))}
    for name, model in models.items():
        round_weights(model)
        save(model, run / name / "model")
        (run / name / "DONE").write_text("{}")
    return run


def test_the_small_preset_fits(small_models: Path, tools: SimpleNamespace, tmp_path: Path) -> None:
    """At most 7 M parameters, files that come back, and a bundle for leg 2 (the largest) that travels."""
    made = {path.name: path for path in tools.files.pack(small_models, tmp_path / "files", set())}
    assert set(made) == {"teacher.safetensors", "guide.safetensors", "run.zip"}
    for name in ("teacher", "guide"):
        weights = load_file(made[f"{name}.safetensors"]).values()
        assert sum(weight.numel() for weight in weights) <= 7_000_000
        assert made[f"{name}.safetensors"].stat().st_size < 15 * 2**20
    data = tmp_path / "data"
    data.mkdir()
    for name, size in IMAGES.items():
        with (data / name).open("wb") as file:
            file.truncate(size)
    out = bundle(tools, 1, tmp_path / "bundle", [], overrides=[], data=data)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert size + sum(path.stat().st_size for path in made.values()) <= tools.bundle.MOST_BYTES


def test_every_stage_of_the_small_preset_is_in_a_leg(tools: SimpleNamespace, tmp_path: Path) -> None:
    """And its trainings leave time in the 8 minutes for the rest."""
    config = compose(CIFAR10, ["preset=small", f"data.files.path={tmp_path}"])
    assert sorted(config.stages) == sorted(name for leg in tools.leg.LEGS.values() for name in leg)
    for leg in tools.leg.LEGS.values():
        trained = [config.stages[name] for name in leg if hasattr(config.stages[name], "seconds")]
        assert sum(stage.seconds * len(getattr(stage, "steps", [0])) for stage in trained) <= 400


def test_a_leg_that_was_cut_short_leaves_what_is_finished(
    small_models: Path, tools: SimpleNamespace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for name in ("halve/steps_8", "halve/steps_4"):
        shutil.copytree(small_models / "guide", run / name)
    shutil.copytree(small_models / "teacher", run / "teacher")
    (run / "halve/steps_4/DONE").unlink()
    made = tools.files.pack(run, tmp_path / "files", {"teacher"})
    assert {path.name for path in made} == {"halve.steps_8.safetensors", "run.zip"}
    done, models = tools.files.recorded(tmp_path / "files")
    assert done == {"teacher"}
    assert models == {"teacher", "halve.steps_8"}


def test_weights_that_bfloat16_does_not_hold_are_refused(
    small_models: Path, tools: SimpleNamespace, tmp_path: Path
) -> None:
    """Files of rounded weights would not be what was measured."""
    shutil.copytree(small_models, tmp_path / "run")
    path = tmp_path / "run/teacher/model/model.safetensors"
    weights = load_file(path)
    save_file({name: weight + 1e-5 for name, weight in weights.items()}, path)
    with pytest.raises(tools.files.LegError, match="legs need weights=bf16"):
        tools.files.pack(tmp_path / "run", tmp_path / "files", set())


def test_images_that_are_not_there_are_named(tools: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(tools.files.LegError, match=r"--data .*: has no cifar10_jpegq75_train\.npz"):
        bundle(tools, 1, tmp_path / "bundle", [], data=tmp_path)


@pytest.mark.parametrize("minutes", [-1.0, 0.01])
def test_the_clock_stops_a_leg(
    tools: SimpleNamespace, minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the time is over before anything heeds the signal, which would end the process and all it has."""

    def waits(config: object, console: object) -> int:
        time.sleep(0.5)
        with stop_on_signals() as stop:
            while not stop():
                time.sleep(0.02)
        return 128 + (stop.number or 0)

    monkeypatch.setattr(runner, "run_experiment", waits)
    assert tools.leg.run(None, time.monotonic() + 60 * minutes) == 143
