"""Moment matching so small that one process or several can run it: `python distill_processes.py FOLDER`, RANK set."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fewstep.distill import InstantMomentMatching, MomentMatching
from fewstep.schedules import Cosine, sample_seeds, seeded_noise

SCHEDULE = Cosine()


class Net(nn.Module):
    """A small denoiser of x and class, and of w if told so."""

    schedule = SCHEDULE
    takes_guidance = False

    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, z, t, cond=None, w=None):
        w = torch.zeros_like(t) if w is None else w
        features = torch.cat([z, torch.stack([t, w, cond.to(z.dtype)], dim=1)], dim=1)
        return self.out(self.body(features).tanh())


def data(count, update=0):
    """(x, cond, seeds) of an update."""
    seeds = sample_seeds(update, 0, torch.arange(count))
    return seeded_noise(seeds, (2,), stream=9), torch.arange(count) % 3, seeds


def build(form):
    """The method with the same weights in every process."""
    torch.manual_seed(0)
    teacher, student, auxiliary = Net(), Net(), Net()
    if form == "alternating":
        return MomentMatching(teacher, student, auxiliary, 4, weight="flat")
    ones = {name: torch.ones_like(p) for name, p in teacher.named_parameters()}
    return InstantMomentMatching(teacher, student, 4, ones, weight="flat")


class Loss(nn.Module):
    """The loss as a module, as DDP needs it."""

    def __init__(self, method):
        super().__init__()
        self.method, self.networks = method, nn.ModuleDict(method.networks)

    def forward(self, batch, step):
        return self.method.loss(batch, step)[0]


def train(form, rank=0, world=1):
    """The student's weights after four updates on 16 samples each, this process's consecutive share of them."""
    method = build(form)
    loss = Loss(method)
    if world > 1:
        loss = DistributedDataParallel(loss, find_unused_parameters=form == "alternating")
    optimizers = {name: torch.optim.SGD(groups, 0.1) for name, groups in method.param_groups().items()}
    for step in range(4):
        x, cond, seeds = data(16, step)
        batch = method.draw(x, cond, seeds, step).chunk(world)[rank]
        optimizer = optimizers[method.active(step)]
        optimizer.zero_grad()
        loss(batch, step).backward()
        optimizer.step()
    return method.networks["student"].state_dict()


def refusal():
    """What the instant form says to a teacher whose parameters are in shards."""
    from torch.distributed.device_mesh import init_device_mesh  # seconds of import that only this needs
    from torch.distributed.fsdp import fully_shard

    teacher = Net()
    fully_shard(teacher, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        InstantMomentMatching(teacher, Net(), 4, {})
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    assert "FSDP2" in refusal()
    for form in ("alternating", "instant"):
        weights = train(form, dist.get_rank(), dist.get_world_size())
        torch.save(weights, os.path.join(sys.argv[1], f"{form}{dist.get_rank()}.pt"))
    dist.destroy_process_group()
