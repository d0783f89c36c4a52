"""Experiments of the papers' size: debug forms walk every stage, papers' forms are valid, pages can be followed."""

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lab_configs import EXPERIMENTS
from rich.console import Console

from fewstep.lab.classifier import Classifier, save_classifier
from fewstep.lab.cli import _arguments, _parser, main
from fewstep.lab.compose import compose, compose_grid
from fewstep.lab.config import Config, ConfigError
from fewstep.lab.evaluation import samples
from fewstep.lab.grid_array import Sets
from fewstep.lab.metrics import Statistics
from fewstep.lab.progress import unheard
from fewstep.lab.report import read_runs
from fewstep.lab.sampling import SAMPLERS, own_sampler
from fewstep.lab.validate import stage_order
from fewstep.models import load
from fewstep.schedules import schedule_from_config, seeded_noise

DIGITS = ["data=digits", "+data.files=null"]
DIGITS16 = ["data=digits16", "+data.files=null"]
SHAPES = ["data=captioned_shapes", "data.image_size=32", "+data.files=null"]
SMALL = {  # data on which the papers' forms are valid too
    "imagenet64": DIGITS,
    "imagenet64_moments": DIGITS,
    "imagenet128_moments": DIGITS16,
    "text512_pixel_moments": SHAPES,
    "imagenet256_latent": DIGITS16,
    "laion_text": SHAPES,
}
LARGE = list(SMALL)
ALL = [*LARGE, "cifar10"]  # whose debug form walks every stage in tests/tools/test_legs.py
CHECKPOINTS = {"imagenet256_latent": "dit", "laion_text": "stable-diffusion"}  # as tools/tiny_checkpoint.py has them
NO_DATA = ["data.files.path=nowhere", "data.heldout=1"]
PAGES = {name: (EXPERIMENTS / name / "README.md").read_text() for name in ALL}
COMMANDS = [
    pytest.param(name, line, id=f"{name}-{i}")
    for name, page in PAGES.items()
    for i, line in enumerate(re.findall(r"^(fewstep .*)$", page, re.MULTILINE))
]
KINDS = {"teacher": "teacher", "pretrained": "teacher", "convert": "teacher", "guide": "guided", "moments": "moments"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By experiment, what says where the checkpoint is that it distils; [] of those that train their teacher."""
    sys.path.insert(0, str(EXPERIMENTS.parent / "tools"))
    try:
        import tiny_checkpoint
    finally:
        sys.path.pop(0)
    found: dict[str, list[str]] = {name: [] for name in LARGE}
    for name, kind in CHECKPOINTS.items():
        folder = tmp_path_factory.mktemp("models") / kind
        tiny_checkpoint.checkpoint(kind, folder)
        found[name] = [f"stages.teacher.path={folder}"]
    return found


def stages(config: Config) -> dict[str, tuple[str, list[str]]]:
    """Kind and needs of each."""
    return {name: (stage.kind, stage.needs) for name, stage in config.stages.items()}


def made_by(config: Config, out: Path) -> dict[Path, tuple[str, int | None]]:
    """Model folders that a run leaves, with the kind and steps that are to be written in them."""
    found: dict[Path, tuple[str, int | None]] = {}
    for name, stage in config.stages.items():
        kind = KINDS.get(stage.kind) or getattr(stage, "students", None)
        for steps in getattr(stage, "steps", [None]) if kind else ():
            found[out / name / (f"steps_{steps}" if steps else "") / "model"] = (kind, steps)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_debug_form_walks_every_stage(name: str, teachers: dict[str, list[str]], tmp_path: Path) -> None:
    """The same graph of stages as the paper's form, to students that sample as they were trained to."""
    changes = ["preset=debug", *teachers[name]]
    debug = compose(EXPERIMENTS / name, changes)
    paper = compose(EXPERIMENTS / name, [*NO_DATA, *teachers[name]], check=False)
    assert stages(debug) == stages(paper)
    assert main(["run", str(EXPERIMENTS / name), *changes, f"out={tmp_path}"]) == 0
    for stage in stage_order(debug):
        assert (tmp_path / stage / "DONE").is_file()
    for folder, (kind, steps) in made_by(debug, tmp_path).items():
        model = load(folder)
        assert model.trained is not None
        assert (model.trained.kind, model.trained.steps) == (kind, steps)
        read = debug.stages[folder.relative_to(tmp_path).parts[0]].kind == "pretrained"
        assert model.prediction == ("eps" if read else "v")
        if steps:
            seeds, w = torch.arange(2), 1.0 if model.takes_guidance else None
            noise = seeded_noise(seeds, model.network.input_shape)
            cond = model.text_encoder.encode(["one", "two"]) if model.text_encoder is not None else seeds
            x = SAMPLERS[own_sampler(model.trained)](model, noise, steps, cond, w, seeds=seeds)
            assert x.isfinite().all()


@pytest.mark.slow
def test_a_grid_is_measured_by_any_extractor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate --grid` of an experiment without a judge of its own, FID against statistics, samples not kept.

    Made by three jobs, the sets are each made once, and come to the same figures.
    """
    torch.manual_seed(0)
    save_classifier(Classifier(1, 10, width=8), tmp_path / "judge")
    experiment, out = str(EXPERIMENTS / "imagenet64"), tmp_path / "run"
    settings = [f"out={out}", "preset=debug", f"stages.grid.features={tmp_path / 'judge'}"]
    judge, statistics = f"--features={tmp_path / 'judge'}", f"--out={tmp_path / 'a.npz'}"
    assert main(["stats", experiment, "preset=debug", judge, statistics]) == 0
    sizes = ["num_samples=24", "paired_noises=8", "chunk=8", "sampling_seeds=1", "weights=[0,1]", "keep_samples=false",
             "workers=1", f"statistics={tmp_path / 'a.npz'}"]  # fmt: skip
    grid = [f"stages.grid.{size}" for size in sizes]
    assert main(["evaluate", experiment, "--grid", *settings, *grid]) == 0
    results = json.loads((out / "grid" / "results.json").read_text())
    digest = Statistics.load(tmp_path / "a.npz").digest
    assert results["reference"] == {"path": str(tmp_path / "a.npz"), "count": 1347, "resolution": 8, "digest": digest}
    (shown,) = read_runs([out])
    assert f"against 1,347 images of 8 x 8, a.npz ({digest[:10]})" in shown.family
    assert {row["stage"] for row in results["rows"]} == {"teacher", "halve", "halve_stochastic"}
    assert all(row["mean"]["fid_heldout"] > 0 for row in results["rows"])
    names = {path.name for path in (out / "grid" / "cache").rglob("*.safetensors")}
    assert names == {"0000000-0000008.safetensors"}
    assert "FID to a.npz" in (out / "grid" / "table.md").read_text()
    shutil.rmtree(out / "grid")
    config = compose_grid(experiment, [*settings, *grid])
    made: list[set[Path]] = []
    for shard in (2, 0, 1):
        before = set((out / "grid").rglob("*.safetensors"))
        assert Sets("grid").make(config, shard, 3, lambda: False, Console(quiet=True), unheard)
        made.append({path.parent for path in (out / "grid" / "features").rglob("*.safetensors") if path not in before})
    assert all(made)
    assert not (made[0] & made[1] | made[1] & made[2] | made[0] & made[2])
    monkeypatch.setattr(samples, "_make_chunk", lambda *_: pytest.fail("a set was in nobody's share"))
    assert main(["evaluate", experiment, "--grid", *settings, *grid]) == 0
    again = json.loads((out / "grid" / "results.json").read_text())
    assert [row["seeds"] for row in again["rows"]] == [row["seeds"] for row in results["rows"]]


def test_data_that_are_not_given_are_asked_for() -> None:
    """The first thing that anybody meets who runs an experiment of this size."""
    with pytest.raises(ConfigError, match=r"^data.files.path: must be given, data.files.path=\.\.\.$"):
        compose(EXPERIMENTS / "imagenet64")


@pytest.mark.parametrize("name", ALL)
def test_the_papers_form_is_valid_on_any_data(name: str, teachers: dict[str, list[str]]) -> None:
    """Chains of halvings, warm-ups, weights, needs: a mistake there would be met after the data were copied."""
    compose(EXPERIMENTS / name, [*SMALL.get(name, DIGITS), *teachers.get(name, [])])


@pytest.mark.parametrize("name", ["imagenet128_moments", "text512_pixel_moments"])
def test_all_log_snrs_of_moment_matching_are_shifted_with_the_resolution(name: str) -> None:
    """As arXiv 2406.04103 has it; one left as it is at 64x64 trains where the images have hardly any noise."""
    config = compose(EXPERIMENTS / name, NO_DATA, check=False)
    shift = -2 * math.log(config.data.image_size / 64)
    small = compose(EXPERIMENTS / "imagenet64_moments", NO_DATA, check=False)
    assert config.schedule["shift"] - small.schedule["shift"] == pytest.approx(shift, abs=1e-4)
    t = torch.linspace(0, 1, 5)
    for stage in ("moments", "instant"):
        one, other = config.stages[stage], small.stages[stage]
        shifted = schedule_from_config(one.schedule).log_snr(t) - schedule_from_config(other.schedule).log_snr(t)
        torch.testing.assert_close(shifted, torch.full_like(shifted, shift), atol=1e-3, rtol=0)
        assert one.weight_shift - other.weight_shift == pytest.approx(shift, abs=1e-4)


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_commands_of_the_pages_can_be_typed(name: str, line: str) -> None:
    """Options and keys that were renamed would cost their reader a job in the queue."""
    words = shlex.split(line)[1:]
    args = _arguments(_parser(), words)
    if words[1].startswith("experiments/"):
        read = compose_grid if getattr(args, "grid", False) else compose
        config = read(EXPERIMENTS.parent / words[1], [word for word in args.overrides if "=" in word], check=False)
        assert config.name.startswith(name)
    if words[0] in ("measure", "sample", "export"):
        given = ["stages.teacher.path=nowhere"] if name in CHECKPOINTS else []
        paper = compose(EXPERIMENTS / name, [*NO_DATA, *given], check=False)
        assert Path(args.model) in {Path("runs") / name / model for model in made_by(paper, Path())}
