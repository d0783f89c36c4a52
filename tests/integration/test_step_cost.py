"""`step_cost.py`: what it counts is what a training does, and its table is that of the experiment."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lab_configs import EXPERIMENTS, digits
from torch.utils.flop_counter import FlopCounterMode

from fewstep.distill import (
    DenoiserTraining,
    GuidanceDistillation,
    InstantMomentMatching,
    Method,
    MomentMatching,
    ProgressiveDistillation,
)
from fewstep.lab.config import NetworkConfig
from fewstep.lab.data import load_data
from fewstep.lab.networks import build_denoiser
from fewstep.models import NetworkDenoiser, with_guidance_input
from fewstep.schedules import Trained, sample_seeds

PROGRAM = Path(__file__).parents[2] / "packages" / "lab" / "benchmarks" / "step_cost.py"
BATCH = 8


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_cost", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_cost"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def teacher() -> NetworkDenoiser:
    """Wide enough that its embeddings and heads count for little, as in networks of the papers' size."""
    torch.manual_seed(0)
    network = NetworkConfig(preset="debug", overrides={"channels": 32, "channel_mult": [1, 1], "attention": []})
    return build_denoiser(digits(), network)


def methods(teacher: NetworkDenoiser) -> dict[str, tuple[Method, int]]:
    """Each kind of training, and over how many updates its passes are a mean."""
    teacher = copy.deepcopy(teacher)
    fresh = copy.deepcopy(teacher)
    guided = with_guidance_input(teacher)
    guided.trained = Trained("guided", w_range=(0.0, 4.0))
    null, even = teacher.null_cond, {name: torch.ones_like(p) for name, p in teacher.named_parameters()}
    other = [copy.deepcopy(teacher).requires_grad_(True) for _ in range(3)]
    return {
        "teacher": (DenoiserTraining(fresh, null), 1),
        "guide": (GuidanceDistillation(teacher, with_guidance_input(teacher), null), 1),
        "halve": (ProgressiveDistillation(guided, copy.deepcopy(guided).requires_grad_(True), 4), 1),
        "alternating": (MomentMatching(teacher, other[0], other[1], 4), 2),
        "instant": (InstantMomentMatching(teacher, other[2], 4, even), 1),
    }


@pytest.mark.parametrize("kind", ["teacher", "guide", "halve", "alternating", "instant"])
def test_an_update_costs_what_is_said(kind: str, program: ModuleType, teacher: NetworkDenoiser) -> None:
    """Counted while a real update runs, forward and backward: a pass forgotten would be a fifth of the GPU-hours."""
    method, updates = methods(teacher)[kind]
    split = load_data(digits().data).train
    cost = program.cost_of(copy.deepcopy(teacher), digits())
    found = 0
    for step in range(updates):
        seeds = sample_seeds(0, step, torch.arange(BATCH))
        x, cond = split.take(torch.arange(BATCH), seeds)
        with FlopCounterMode(display=False) as counter:
            loss, _ = method.loss(method.draw(x, cond, seeds, step), step)
            loss.backward()
        found += counter.get_total_flops()
    assert found / updates / BATCH == pytest.approx(program.flops_of(kind, cost), rel=0.02)


def test_the_table_is_of_the_experiment(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Updates, batch and passes of each stage, at the share of the peak that is said; without the data set."""
    experiment = str(EXPERIMENTS / "imagenet64")
    changes = ["data.files.path=nowhere", "stages.teacher.updates=1000", "stages.halve.steps=[4,2,1]"]
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), experiment, *changes, "--peak", "100", "--utilisation", "0.5"])
    assert program.main() == 0
    out = capsys.readouterr().out
    assert "UNet: 295.9 M parameters, 219.3 GFLOP" in out
    rows = {cells[1].strip(): cells[5].strip() for line in out.splitlines() if len(cells := line.split("|")) > 5}
    an_hour = 100e12 * 0.5 * 3600
    assert float(rows["teacher"].replace(",", "")) == pytest.approx(1000 * 2048 * 3 * 219.3e9 / an_hour, abs=0.51)
    halving = (50_000 + 2 * 100_000) * 2048 * 5 * 219.3e9 / an_hour
    assert float(rows["halve"].replace(",", "")) == pytest.approx(halving, rel=1e-3)
    stochastic = halving * 150 / 250  # the student of 1 step is that of 2
    assert float(rows["halve_stochastic"].replace(",", "")) == pytest.approx(stochastic, rel=1e-3)
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), experiment])
    assert program.main() == 2
    assert "data.files.path" in capsys.readouterr().err
