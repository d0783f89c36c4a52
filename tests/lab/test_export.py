"""`fewstep export`: what comes out is what `samplers.ddim` makes of the saved model; a mistake is one line."""

import sys
from pathlib import Path

import diffusers
import pytest
import torch
from model_helpers import perturbed

from fewstep.lab.cli import main
from fewstep.models import NetworkDenoiser, UNet, save, with_guidance_input
from fewstep.samplers import ddim
from fewstep.schedules import Cosine, Trained


@pytest.fixture
def student(tmp_path: Path) -> NetworkDenoiser:
    """A four-step student that takes w, saved to `model`."""
    network = UNet.from_preset("debug", channel_mult=(1, 1), groups=4, num_classes=None)
    perturbed(network)
    denoiser = with_guidance_input(NetworkDenoiser(network, Cosine(), "v").eval(), "diffusers")
    perturbed(denoiser)
    denoiser.trained = Trained("deterministic", 4, (0.0, 4.0))
    save(denoiser, tmp_path / "model")
    return denoiser


def test_export_is_a_pipeline(student: NetworkDenoiser, tmp_path: Path) -> None:
    """The command must say what the function is told: the w, the folders."""
    assert main(["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--w", "2"]) == 0
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(2), num_inference_steps=4, output_type="pt").images
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(images, (ddim(student, noise, 4, w=2.0) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "give the w that is to be fixed"), (["--w", "1", "--scheduler", "euler"], "scheduler 'euler'")],
)
def test_mistakes(
    student: NetworkDenoiser, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, nothing written."""
    assert main(["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_diffusers(
    student: NetworkDenoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line must say what to install."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'fewstep-models[diffusers]'" in capsys.readouterr().err
