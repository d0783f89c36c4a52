"""What the way to z_s does to diversity: moment matching of a mixture in the plane (arXiv 2406.04103, figure 3).

    python packages/distill/benchmarks/renoising.py [--k 8] [--updates 1200] [--seed 0]

Data are equal Gaussians on a grid; data and teacher are known exactly, so all that differs between the students is how
z_s is drawn in training: from q(z_s | z_t, x~), by DDIM, or from q(z_s | x~), which forgets z_t. All sample alike, by
`ancestral`. "modes" is the perplexity of the modes' shares (25: all alike), "spread" the deviation within a mode over
the data's, "distance" the energy distance to data.
"""

import argparse
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fewstep.distill import MomentMatching
from fewstep.distill.moments import Renoise
from fewstep.samplers import ancestral
from fewstep.schedules import Cosine, Denoiser, Schedule, expand, sample_seeds, seeded_noise

KINDS: tuple[Renoise, ...] = ("posterior", "ddim", "unconditional")
SAMPLES, PAIRED = 20_000, 4000
POOL = 1 << 16
SCHEDULE = Cosine(log_snr_max=12.0)


@dataclass(frozen=True)
class Grid:
    """Equal Gaussians of deviation `std` on a square grid of deviation 1, and their denoiser in closed form."""

    schedule: Schedule
    side: int = 5
    std: float = 0.1

    @cached_property
    def means(self) -> Tensor:
        places = torch.arange(self.side) - (self.side - 1) / 2
        return torch.cartesian_prod(places, places) / places.square().mean().sqrt()

    def sample(self, seeds: Tensor) -> Tensor:
        return self.means[seeds % len(self.means)] + self.std * seeded_noise(seeds, (2,), stream=9)

    def __call__(self, z: Tensor, t: Tensor, cond: object = None, w: object = None) -> Tensor:
        alpha, sigma = (expand(a, z) for a in self.schedule.alpha_sigma(t))
        variance = (alpha * self.std) ** 2 + sigma**2
        gap = z[:, None] - alpha[:, None] * self.means
        share = (-gap.square().sum(2) / (2 * variance)).softmax(1)
        return (share[..., None] * (self.means + (alpha * self.std**2 / variance)[:, None] * gap)).sum(1)


class Corrected(nn.Module):
    """The closed-form denoiser plus a small network that starts at zero."""

    def __init__(self, denoiser: Grid, width: int = 64) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        last = nn.Linear(width, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.body = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, z: Tensor, t: Tensor, cond: object = None, w: object = None) -> Tensor:
        x, angle = self.denoiser(z, t), math.pi / 2 * t[:, None]
        change: Tensor = self.body(torch.cat([z, x, angle.sin(), angle.cos()], 1))
        return x + change


def train(grid: Grid, kind: Renoise, k: int, updates: int, seed: int = 0) -> nn.Module:
    """A student of k steps."""
    batch, lr = 256, 5e-3
    torch.manual_seed(seed)
    method = MomentMatching(grid, Corrected(grid), Corrected(grid), k, weight="flat", renoise=kind)
    seeds = sample_seeds(seed, 0, torch.arange(POOL))
    pool = method.draw(grid.sample(seeds), None, seeds, 0)
    optimizers = {n: torch.optim.Adam(g, betas=(0.0, 0.99), eps=1e-12) for n, g in method.param_groups().items()}
    for step in range(updates):
        optimizer = optimizers[method.active(step)]
        optimizer.param_groups[0]["lr"] = lr * (1 - step / updates)
        loss, _ = method.loss(pool[torch.randint(POOL, (batch,))], step)
        optimizer.zero_grad()
        loss.backward()
        (group,) = optimizer.param_groups
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
    return method.networks["student"]


def measure(x: Tensor, grid: Grid) -> dict[str, float]:
    """Perplexity of the modes' shares, spread within modes, energy distance to data. Shape: x (B, 2)."""
    gap = x[:, None] - grid.means
    nearest = gap.square().sum(2).argmin(1)
    share = torch.bincount(nearest, minlength=len(grid.means)) / len(x)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    spread = gap[torch.arange(len(x)), nearest].square().mean().sqrt() / grid.std
    return {"modes": float(entropy.exp()), "spread": float(spread), "distance": energy_distance(x[:PAIRED], grid)}


def energy_distance(x: Tensor, grid: Grid) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| with y, y' data. Shape: x (B, 2)."""
    y = grid.sample(torch.arange(SAMPLES, SAMPLES + len(x)))
    pairs = len(x) * (len(x) - 1)
    alike = (torch.cdist(x, x).sum() + torch.cdist(y, y).sum()) / pairs
    return float(2 * torch.cdist(x, y).mean() - alike)


def sampled(denoiser: Denoiser, k: int) -> Tensor:
    """SAMPLES points by ancestral sampling in k steps; the same noise for every denoiser."""
    seeds = torch.arange(SAMPLES)
    return ancestral(denoiser, seeded_noise(seeds, (2,)), k, seeds=seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    grid = Grid(SCHEDULE)
    print(f"{options.k} steps, {options.updates} updates, seed {options.seed}")
    print(f"{'':15}{'modes':>8}{'spread':>8}{'distance':>10}")

    def row(name: str, x: Tensor) -> None:
        found = measure(x, grid)
        print(f"{name:15}{found['modes']:8.2f}{found['spread']:8.2f}{found['distance']:10.4f}", flush=True)

    row("data", grid.sample(torch.arange(SAMPLES)))
    row("teacher", sampled(grid, options.k))
    for kind in KINDS:
        row(kind, sampled(train(grid, kind, options.k, options.updates, options.seed), options.k))


if __name__ == "__main__":
    main()
