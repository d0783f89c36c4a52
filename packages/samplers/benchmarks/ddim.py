"""What `ddim` costs beyond its calls: N steps against N calls of the same denoiser, interleaved, medians.

    python packages/samplers/benchmarks/ddim.py [--steps 8] [--batch 64 256] [--repeats 20] [--device cuda]

Denoisers: the digits UNet of fewstep.models as a w-conditioned student and as a guided teacher, and the student without
its `raw`, as a foreign denoiser would be. Exits with 1 if a ratio is above the bound (1.05).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.models import GuidedDenoiser, NetworkDenoiser, UNet, with_guidance_input
from fewstep.samplers import ddim
from fewstep.schedules import Cosine, Denoiser

BOUND = 1.05


class Foreign:
    """A denoiser that offers x alone."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.schedule = denoiser, denoiser.schedule

    def __call__(self, *arguments: Tensor) -> Tensor:
        return self.denoiser(*arguments)


def denoisers(device: str) -> dict[str, Denoiser]:
    torch.manual_seed(0)
    teacher = NetworkDenoiser(UNet.from_preset("digits"), Cosine(), "v").eval()
    student = with_guidance_input(teacher).eval().to(device)
    guided = GuidedDenoiser(teacher, teacher.null_cond).to(device)
    return {"student": student, "guided": guided, "foreign": Foreign(student)}


def seconds(run: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    began = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


@torch.no_grad()
def compare(
    denoiser: Denoiser, batch: int, steps: int, repeats: int, device: str, clock: Callable[[], float]
) -> tuple[float, float]:
    """Median seconds of `steps` calls and of `ddim` with as many steps, taken in turns."""
    noise = torch.randn(batch, 1, 8, 8, device=device)
    t, w = torch.full((batch,), 0.5, device=device), torch.ones(batch, device=device)
    y = torch.arange(batch, device=device) % 10

    def calls() -> None:
        for _ in range(steps):
            denoiser(noise, t, y, w)

    def sample() -> None:
        ddim(denoiser, noise, steps, y, w)

    for run in (calls, sample):
        seconds(run, device, clock)
    pairs = [(seconds(calls, device, clock), seconds(sample, device, clock)) for _ in range(repeats)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where others keep the CPU busy")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    place = f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"ddim with {options.steps} steps; {place}; medians of {options.repeats}")
    print(f"{'denoiser':10}{'batch':>6}{'calls ms':>11}{'ddim ms':>10}{'ratio':>8}")
    worst = 0.0
    for name, denoiser in denoisers(options.device).items():
        for batch in options.batch:
            calls, sample = compare(denoiser, batch, options.steps, options.repeats, options.device, clock)
            worst = max(worst, sample / calls)
            print(f"{name:10}{batch:6}{1e3 * calls:11.1f}{1e3 * sample:10.1f}{sample / calls:8.3f}", flush=True)
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
