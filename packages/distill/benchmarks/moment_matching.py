"""Time and memory of moment matching per student update, in evaluations of the network without gradient.

    python packages/distill/benchmarks/moment_matching.py [--network digits] [--batch 64] [--rounds 20] [--device cuda]

The unit is one evaluation of B images without gradient; a gradient through the network counts 3. Alternating, B images
an update, one for the auxiliary network and one for the student: (student 1, teacher 1, auxiliary 3) + (student 3,
auxiliary 1, teacher 1) = 10. Instant, two halves of B images: student 1, teacher's gradient 3, its jvp about 3, student
3 = 10. A guided call of the teacher adds 1: 12 in either form. Losses with their backward passes, no optimiser. Parts
are timed in turn within every round, medians over rounds; memory is the most that a part holds at once beyond what was
there before, as the profiler sees it. Exits with 1 if a form takes more than 1.2 times its floor.
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from fewstep.distill import Batch, InstantMomentMatching, Method, MomentMatching
from fewstep.distill.parameters import directional, loss_gradient, values
from fewstep.models import NetworkDenoiser, UNet
from fewstep.schedules import Cosine, sample_seeds

LIMIT = 1.2
FORMS = ("alternating", "alternating guided", "instant", "instant guided")
FLOOR = {form: 12 if form.endswith("guided") else 10 for form in FORMS}


def denoiser(options: argparse.Namespace) -> NetworkDenoiser:
    torch.manual_seed(0)
    return NetworkDenoiser(UNet.from_preset(options.network), Cosine(), "v").to(options.device)


def build(form: str, options: argparse.Namespace) -> tuple[Method, Batch]:
    """The method and a batch for it: the instant form splits what it is given, so its batch is twice as large."""
    teacher, guided = denoiser(options), form.endswith("guided")
    guidance = {"null_cond": teacher.null_cond, "w_range": (1.0, 1.0)} if guided else {}
    student = copy.deepcopy(teacher)
    method: Method
    if form.startswith("instant"):
        ones = {name: torch.ones_like(p) for name, p in values(teacher).items()}
        method = InstantMomentMatching(teacher, student, 4, ones, **guidance)
    else:
        method = MomentMatching(teacher, student, copy.deepcopy(teacher), 4, **guidance)
    return method, drawn(method, options.batch * (2 if form.startswith("instant") else 1), options)


def drawn(method: Method, count: int, options: argparse.Namespace) -> Batch:
    index = torch.arange(count, device=options.device)
    size = UNet.from_preset(options.network).input_shape
    return method.draw(torch.zeros(count, *size, device=options.device), index % 10, sample_seeds(0, 0, index), 0)


def update(method: Method, batch: Batch) -> None:
    """What one update of the student takes: of the auxiliary network too, where there is one."""
    for step in (0, 1) if len(method.networks) > 1 else (0,):
        loss, _ = method.loss(batch, step)
        loss.backward()
        for network in method.networks.values():
            network.zero_grad(set_to_none=True)


def parts(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The unit first, what the floors are made of, and the updates."""
    method, batch = build("alternating", options)
    student, teacher = method.networks["student"], denoiser(options).requires_grad_(False)
    parameters, ones = values(teacher), {name: torch.ones_like(p) for name, p in teacher.named_parameters()}
    z, t, cond = batch.z, batch.t, batch.cond

    def forward_backward() -> None:
        student(z, t, cond).square().mean().backward()
        student.zero_grad(set_to_none=True)

    weighting = method.weighting
    return {
        "evaluation": torch.no_grad()(lambda: teacher(z, t, cond)),
        "student's gradient": forward_backward,
        "teacher's gradient": lambda: loss_gradient(teacher, parameters, weighting, z, z, t, cond),
        "teacher's jvp": lambda: directional(teacher, parameters, ones, z, t, cond),
        **{form: partial(update, *build(form, options)) for form in FORMS},
    }


def medians(functions: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each, timed in turn; the first two rounds warm up."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(options.rounds + 2):
        for name, function in functions.items():
            began = clock()
            function()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return {name: 1000 * statistics.median(values[2:]) for name, values in seconds.items()}


def memory(function: Callable[[], object]) -> float:
    """The most MB that the function's tensors take at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="digits", help="preset of the UNet")
    parser.add_argument("--batch", type=int, default=64, help="B")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where others keep the CPU busy")
    options = parser.parse_args()
    place = f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"UNet {options.network}, B = {options.batch}, {place}; medians of {options.rounds}")
    functions = parts(options)
    found = medians(functions, options)
    print(f"{'':22}{'ms':>9}{'evaluations':>13}{'over floor':>12}{'memory MB':>11}")
    worst = 0.0
    for name, value in found.items():
        count = value / found["evaluation"]
        ratio = count / FLOOR[name] if name in FLOOR else None
        worst = max(worst, ratio or 0.0)
        over = "" if ratio is None else f"{ratio:.3f}"
        print(f"{name:22}{value:9.2f}{count:13.2f}{over:>12}{memory(functions[name]):11.1f}", flush=True)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
