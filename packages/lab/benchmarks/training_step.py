"""What a training update costs beside what it cannot do without, for stage one and stage two.

    python packages/lab/benchmarks/training_step.py [--network digits] [--batch 128] [--rounds 20]

An update is the whole of what `fewstep run` repeats: batch from memory, seeded draws, teacher, student, optimiser,
clipping, average, metrics. Its floor is the teacher's forwards (two for either stage: stage one evaluates both
branches as one batch of twice the size), the student's forward and backward on bare tensors, and the optimiser,
clipping and average, each timed alone. All parts are timed in turn within every round, so that a busy machine slows all
of them alike; medians over rounds. Exits with 1 if an update takes more than 1.15 times its floor.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.distill import GuidanceDistillation, Method, ProgressiveDistillation
from fewstep.lab.config import Config, GuideConfig, HalveConfig, NetworkConfig, TrainingConfig
from fewstep.lab.data import load_data
from fewstep.lab.networks import build_denoiser
from fewstep.lab.state import clip_
from fewstep.lab.train import Trainer
from fewstep.models import NetworkDenoiser, with_guidance_input
from fewstep.schedules import Trained

LIMIT = 1.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="digits", help="preset of the UNet")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    circumstances = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"UNet {args.network}, batch {args.batch}, {circumstances}")
    teacher = build_denoiser(Config(name="benchmark"), NetworkConfig(preset=args.network)).to(device)
    guided = with_guidance_input(teacher)
    guided.trained = Trained("guided", w_range=(0.0, 4.0))
    one = GuidanceDistillation(teacher, with_guidance_input(teacher), teacher.null_cond)
    two = ProgressiveDistillation(guided, copy.deepcopy(guided), 4)
    stages: dict[str, tuple[Method, TrainingConfig, Callable[[Trainer], Callable[[], object]]]] = {
        "stage one": (one, GuideConfig(batch_size=args.batch), lambda trainer: two_at_once(trainer, teacher)),
        "stage two": (two, HalveConfig(batch_size=args.batch), lambda trainer: one_by_one(trainer, guided)),
    }
    ratios = [
        report(name, medians(parts(method, options, forwards, device), args.rounds, device))
        for name, (method, options, forwards) in stages.items()
    ]
    return int(max(ratios) > LIMIT)


def parts(
    method: Method,
    options: TrainingConfig,
    forwards: Callable[[Trainer], Callable[[], object]],
    device: torch.device,
) -> dict[str, Callable[[], object]]:
    """The update and each part of its floor, as functions without arguments; "update" is the first."""
    trainer = Trainer(
        method, load_data(Config(name="benchmark").data).train, options, updates=10**9, seed=0,
        out=Path(tempfile.mkdtemp()), device=device, bar=False,
    )  # fmt: skip
    state = trainer.state
    optimizer, student = state.optimizers["student"], state.networks["student"]
    assert isinstance(student, NetworkDenoiser)
    batch = trainer.draw(0)
    times = student.network_time(batch.t)

    def forward_backward() -> None:
        student.network(batch.z, times, batch.cond, batch.w).square().mean().backward()

    def optimise() -> None:
        optimizer.step()
        optimizer.zero_grad()

    trainer.update()
    found = {
        "update": trainer.update,
        "two teacher forwards": forwards(trainer),
        "student forward and backward": forward_backward,
        "clipping": lambda: clip_(optimizer, options.grad_clip),
        "optimiser": optimise,
    }
    if state.ema is not None:
        found["average"] = lambda: state.ema.update(1000) if state.ema else None
    return found


def two_at_once(trainer: Trainer, teacher: NetworkDenoiser) -> Callable[[], object]:
    """Both branches of the teacher as one batch of 2 B."""
    batch = trainer.draw(0)
    z, times = torch.cat([batch.z] * 2), teacher.network_time(torch.cat([batch.t] * 2))
    assert isinstance(batch.cond, Tensor)
    assert teacher.null_cond is not None
    cond = torch.cat([batch.cond, teacher.null_cond.expand(len(batch))])
    return torch.no_grad()(lambda: teacher.network(z, times, cond))


def one_by_one(trainer: Trainer, teacher: NetworkDenoiser) -> Callable[[], object]:
    """Two evaluations of the w-conditioned teacher, the second of which must wait for the first."""
    batch = trainer.draw(0)
    times = teacher.network_time(batch.t)
    return torch.no_grad()(lambda: [teacher.network(batch.z, times, batch.cond, batch.w) for _ in range(2)])


def medians(functions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, timed in turn; the first two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def report(name: str, milliseconds: dict[str, float]) -> float:
    """Print one stage's table: the floor's parts, their sum, the update; returns the update's ratio to the floor."""
    update = milliseconds.pop("update")
    floor = sum(milliseconds.values())
    print(f"\n{name}")
    for part, value in milliseconds.items():
        print(f"  {part:30} {value:8.2f} ms")
    print(f"  {'floor':30} {floor:8.2f} ms")
    print(f"  {'update':30} {update:8.2f} ms   {update / floor:.3f} x floor (at most {LIMIT})")
    return update / floor


if __name__ == "__main__":
    sys.exit(main())
