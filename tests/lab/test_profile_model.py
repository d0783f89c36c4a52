"""`fewstep profile model`: the right work under the right name, traces that can be opened."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fewstep.kernels import attention_qkv, backend, group_norm_silu, use_backend
from fewstep.lab.cli import main
from fewstep.lab.profile import end_to_end, model
from fewstep.lab.profile.end_to_end import JOBS, subject
from fewstep.models import DiT, NetworkDenoiser, UNet, save, with_guidance_input
from fewstep.schedules import Cosine

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """Nearly all of its time goes into one kind of work, which the test chooses."""

    def __init__(self, heavy: str) -> None:
        super().__init__()
        width = 512 if heavy == "linear" else 8
        self.linear = nn.Linear(width, width)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.heavy, self.width = heavy, width

    def forward(self) -> torch.Tensor:
        rows = torch.randn(2048 if self.heavy == "linear" else 4, self.width, requires_grad=True)
        side = 128 if self.heavy == "convolution" else 4
        images = torch.randn(4, 8, side, side, requires_grad=True)
        tokens = 400 if self.heavy == "attention" else 4
        qkv = torch.randn(2, tokens, 3 * 32, requires_grad=True)
        large = 256 if self.heavy == "normalisation" else 4
        weight = torch.ones(8)
        x = torch.randn(4, 8, large, large, requires_grad=True)
        normed = group_norm_silu(x, 2, weight, weight)
        return self.linear(rows).sum() + self.conv(images).sum() + attention_qkv(qkv, 1).sum() + normed.sum()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("heavy", ["linear", "convolution", "attention", "normalisation"])
def test_work_is_counted_under_its_kind(heavy: str, backward: bool) -> None:
    """A share under the wrong name sends the reader to optimise the wrong thing; backward work is most of training."""
    network = Mixed(heavy)
    loss = network()
    loss.backward()
    with use_backend("reference"), model.marked():
        if backward:
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                network().backward()
        else:
            with profile(activities=[ProfilerActivity.CPU]) as recorded, torch.no_grad():
                network()
    shares = model.by_kind(recorded.events(), gpu=False)
    known = {kind: us for kind, us in shares.items() if kind != model.OTHER}
    assert max(known, key=lambda kind: known[kind]) == heavy
    total = sum(event.self_cpu_time_total for event in recorded.events())
    assert sum(shares.values()) == pytest.approx(total)


def test_marks_go_again() -> None:
    """Operations and modules must run as before once the profiler is gone."""
    before = {op: dict(found) for op, found in backend._implementations.items()}
    with pytest.raises(ZeroDivisionError), model.marked():
        raise ZeroDivisionError
    assert {op: dict(found) for op, found in backend._implementations.items()} == before
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        nn.Linear(2, 2)(torch.ones(1, 2))
    assert not any(event.name.startswith(model.MARK) for event in recorded.events())


@pytest.mark.parametrize("network", [UNet, DiT])
@pytest.mark.parametrize("job", JOBS)
def test_both_ways_compute_the_same(network: type[UNet] | type[DiT], job: str) -> None:
    """Times of two ways are comparable only if they do the same work."""
    torch.manual_seed(0)
    s = subject(NetworkDenoiser(network.from_preset("debug"), Cosine(), "v"), 2, "fp32", CPU)
    found = []
    for name in ("eager", "auto"):
        torch.manual_seed(0)
        with end_to_end.way(name):
            found.append(JOBS[job](s, False)())
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_nothing_measured_is_zero() -> None:
    """Products of zeros are faster than any network's: an untrained network starts with many."""
    original = NetworkDenoiser(UNet.from_preset("debug"), Cosine(), "v")
    s = subject(original, 2, "fp32", CPU)
    assert all(p.any() for p in s.denoiser.parameters() if p.ndim > 1)
    assert not all(p.any() for p in original.parameters() if p.ndim > 1)        # and the caller's is left alone


@pytest.mark.slow
def test_a_preset_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command: steps both ways, shares that add up, traces that a viewer can open."""
    command = ["profile", "model", "DiT/debug", "--batch", "2", "--seconds", "0", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "profile.json").read_text())
    assert {(r["op"], r["backend"]) for r in found["rows"]} == {(job, way) for job in JOBS for way in ("eager", "auto")}
    assert all(r["us"] > 0 and r["per_second"] > 0 for r in found["rows"])
    for job in ("train_step", "sample_4_steps"):
        for way in ("eager", "auto"):
            assert {"linear", "attention", "normalisation"} <= set(found["shares_us"][job][way])
            trace = json.loads((tmp_path / f"{job}_{way}.trace.json").read_text())
            names = {event.get("name", "") for event in trace["traceEvents"]}
            assert f"{model.MARK}attention" in names
    assert "optimiser" in found["shares_us"]["train_step"]["auto"]
    assert "sampler update" in found["shares_us"]["sample_4_steps"]["auto"]
    text = (tmp_path / "tables.md").read_text()
    assert "| train_step | DiT/debug b2 | fp32 | eager |" in text
    assert "100.0%" in text
    assert all((tmp_path / f"{name}.{kind}").is_file() for name in ("networks", "shares") for kind in ("png", "pdf"))


def test_a_saved_model_is_found(tmp_path: Path) -> None:
    """People profile what they trained."""
    saved = NetworkDenoiser(UNet.from_preset("debug", channels=24), Cosine(), "v")
    save(saved, tmp_path / "model")
    found = model.denoiser_of(str(tmp_path / "model"))
    assert found.network.config == saved.network.config
    assert model.denoiser_of("debug").network.config["channels"] == 16
    save(with_guidance_input(saved), tmp_path / "student")
    with pytest.raises(ValueError, match="a student that takes w"):
        model.denoiser_of(str(tmp_path / "student"))


MISTAKES = {
    "imagenet128": "imagenet128: neither .* nor a preset; presets: UNet/debug, .*DiT/imagenet64",
    "GAN/debug": "GAN/debug: neither",
    "debug --backend tritn": "--backend tritn: must be one of auto, .*reference here",
    "debug --dtype fp8": "--dtype fp8: must be bf16 or fp32",
    "debug --batch 0": "--batch 0: must be 1 or more",
    "debug --seconds -1": "--seconds -1: must be 0 or more",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any compute, naming what would be right."""
    arguments = mistake.replace("--seconds -1", "--seconds=-1").split()
    assert main(["profile", "model", *arguments, "--device", "cpu", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(MISTAKES[mistake], error)
    assert not (tmp_path / "o").exists()


def test_a_gpu_is_asked_for_all_ways() -> None:
    """On a GPU also the compiled and the captured ones, PyTorch's and ours alike."""
    assert end_to_end.ways("train_step", torch.device("cuda")) == ["eager", "auto", "compile", "auto+compile"]
    assert end_to_end.ways("sample_4_steps", torch.device("cuda"))[:2] == ["eager+graph", "auto+graph"]
    assert model.ways("auto") == ("eager", "auto")
    arguments = Namespace(model="debug", device="cpu", dtype=None, batch=3, seconds=0.0)
    assert model.chosen_subject(arguments).dtype == "fp32"
