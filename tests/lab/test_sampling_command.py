"""`fewstep sample`: what it writes, and what it refuses before it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import small_dit
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fewstep.lab.cli import main
from fewstep.models import GuidedDenoiser, NetworkDenoiser, load, save, with_guidance_input
from fewstep.samplers import ddim
from fewstep.schedules import Cosine, Trained, sample_seeds, seeded_noise


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of 4 steps for w in [0, 2], an unconditional model; of random weights."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    teacher = NetworkDenoiser(small_dit(), Cosine(), "v", trained=Trained("teacher"))
    student = with_guidance_input(teacher, w_range=(0.0, 2.0))
    with torch.no_grad():  # a fresh w path is zero: give it something to say
        for weight in student.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    student.trained = Trained("deterministic", 4, (0.0, 2.0))
    save(teacher, root / "teacher")
    save(student, root / "student")
    save(NetworkDenoiser(small_dit(num_classes=None), Cosine(), "v"), root / "unconditional")
    return root


def run(models: Path, name: str, out: Path, *options: str) -> int:
    return main(["sample", "--model", str(models / name), "--out", str(out), "--device", "cpu", *options])


def noise(count: int, seed: int = 0) -> Tensor:
    return seeded_noise(sample_seeds(seed, 0, torch.arange(count)), (1, 8, 8))


def test_samples_are_those_of_the_sampler(models: Path, tmp_path: Path) -> None:
    """Images, classes in turn and seeds as said: a person must be able to make the same images in a notebook."""
    options = ["--w", "1", "--num", "7", "--classes", "2-3,9", "--chunk", "4", "--seed", "5"]
    assert run(models, "student", tmp_path, *options) == 0
    found = load_file(tmp_path / "samples.safetensors")
    classes = torch.tensor([2, 3, 9, 2, 3, 9, 2])
    assert found["classes"].tolist() == classes.tolist()
    assert torch.equal(found["seeds"], sample_seeds(5, 0, torch.arange(7)))
    expected = ddim(load(models / "student"), noise(7, seed=5), 4, classes, 1.0).clamp(-1, 1)
    torch.testing.assert_close(found["images"], expected, atol=1e-4, rtol=0)


def test_the_first_samples_do_not_depend_on_how_many(models: Path, tmp_path: Path) -> None:
    """Sample i is a function of seed and i: asking for more must not change those that one has."""
    for count in ("4", "9"):
        assert run(models, "student", tmp_path / count, "--num", count, "--chunk", "4") == 0
    few, many = (load_file(tmp_path / count / "samples.safetensors")["images"] for count in ("4", "9"))
    assert torch.equal(many[:4], few)


def test_a_teacher_is_guided(models: Path, tmp_path: Path) -> None:
    """w on a teacher means classifier-free guidance with its own null class, not a silently dropped option."""
    assert run(models, "teacher", tmp_path, "--w", "2", "--steps", "3", "--num", "4") == 0
    teacher = load(models / "teacher")
    classes = torch.arange(4)
    guided = ddim(GuidedDenoiser(teacher, teacher.null_cond), noise(4), 3, classes, 2.0).clamp(-1, 1)
    found = load_file(tmp_path / "samples.safetensors")["images"]
    torch.testing.assert_close(found, guided, atol=1e-4, rtol=0)
    assert (found - ddim(teacher, noise(4), 3, classes).clamp(-1, 1)).abs().max() > 0.05


def test_grid_has_a_column_per_class(models: Path, tmp_path: Path) -> None:
    """Image i stands in row i // classes, enlarged pixel by pixel; --png writes each at its own size."""
    assert run(models, "student", tmp_path, "--num", "6", "--classes", "0-2", "--png") == 0
    image = load_file(tmp_path / "samples.safetensors")["images"][4, 0]
    expected = ((image + 1) * 127.5).round().numpy().astype(np.uint8)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 52 + 4, 2 * 52 + 4)
        cell = np.asarray(grid)[56:104:6, 56:104:6, 0]
    np.testing.assert_array_equal(cell, expected)
    with Image.open(tmp_path / "images" / "00004.png") as alone:
        np.testing.assert_array_equal(np.asarray(alone)[..., 0], expected)


def test_use_that_was_not_trained_is_said(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sampling goes on, but nobody should wonder why the images are poor."""
    assert run(models, "student", tmp_path, "--w", "3", "--num", "2") == 0
    assert "[0, 2]" in " ".join(capsys.readouterr().out.split())


def test_a_stage_one_model_takes_any_steps(models: Path, tmp_path: Path) -> None:
    """It was trained at every time: refusing steps would take away what it is for. It cannot guess them, though."""
    guided = load(models / "student")
    guided.trained = Trained("guided", None, (0.0, 2.0))
    save(guided, tmp_path / "guided")
    for steps in ("2", "5"):
        assert run(tmp_path, "guided", tmp_path / steps, "--steps", steps, "--num", "2", "--strict") == 0
    assert run(tmp_path, "guided", tmp_path / "none", "--num", "2") == 2


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("student", ["--classes", "0-10"], "within 0-9: this model has no class 10"),
        ("student", ["--classes", "3-1"], "a list such as 0-9 or 3,5,7"),
        ("student", ["--classes", "one"], "a list such as 0-9 or 3,5,7"),
        ("student", ["--w", "-1"], "--w -1.0: must be 0 (no guidance) or more"),
        ("student", ["--w", "nan"], "--w nan"),
        ("student", ["--num", "0"], "--num 0: must be 1 or more"),
        ("student", ["--shards", "0"], "--shards 0: must be 1 or more"),
        ("student", ["--shards", "4"], "--shards 4: must be 1 with cluster=local"),
        ("student", ["--sampler", "euler"], "one of ddim, stochastic, dpmpp_2m, heun, ancestral"),
        ("student", ["--steps", "0"], "--steps 0: must be 1 or more"),
        ("student", ["--steps", "2"], "--steps 2: must be 4 or left out: "),
        ("student", ["--steps", "2", "--strict"], "was trained for 4 steps"),
        ("student", ["--w", "3", "--strict"], "[0, 2]"),
        ("student", ["--w", "3", "--strict", "cluster=slurm"], "[0, 2]"),  # before anything is sent
        ("teacher", [], "teacher needs it; only a student of a few steps knows its number"),
        ("unconditional", ["--steps", "2", "--w", "1"], "only w=0 works"),
        ("unconditional", ["--steps", "2", "--w", "0", "--classes", "1"], "unconditional"),
        ("nowhere", [], "nowhere"),
    ],
)
def test_refusals(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, options: list[str], said: str
) -> None:
    """One line on stderr that names the value and what would be right, exit code 2, and nothing written."""
    out = tmp_path / "out"
    assert run(models, name, out, *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_damaged_models_are_refused(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated file or a pickle is an error before compute, never executed."""
    folder = tmp_path / "broken"
    save(load(models / "student"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert run(tmp_path, "broken", tmp_path / "out") == 2
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    assert run(tmp_path, "model.pt", tmp_path / "out") == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "damaged" in first
    assert "no pickle" in second
