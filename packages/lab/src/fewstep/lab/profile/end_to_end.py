"""What people wait for, by PyTorch's own operators and by ours: training steps, distillation targets, sampling.

A row's `backend` says how: "eager" (PyTorch's operators), "compile" (the same through torch.compile), "auto" (ours),
"auto+compile"; "+graph" is captured once in a CUDA graph and replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.distill import DenoiserTraining, guidance_target, progressive_target
from fewstep.kernels import use_backend
from fewstep.kernels.benchmark.error import relative
from fewstep.kernels.benchmark.operations import plain_pytorch
from fewstep.kernels.benchmark.task import CHECK, TIME, Settings, Task
from fewstep.kernels.benchmark.timing import Timing, by_the_clock
from fewstep.models import DiT, Network, NetworkDenoiser, UNet, with_guidance_input
from fewstep.samplers.common import prepare
from fewstep.samplers.ddim import ddim_weights
from fewstep.schedules import Cosine

NETWORKS: Mapping[str, type[Network]] = {"unet": UNet, "dit": DiT}
PRESETS = {"tiny": "debug", "gpu": "imagenet64"}
BATCHES = {"tiny": 2, "gpu": 32}
SECONDS = {"tiny": 0.0, "gpu": 3.0}
STEPS = 4  # of the student that is sampled, and of which targets are made
STEP, SAMPLING = "step", "sample_4_steps"
ALIKE = {"bf16": 5e-2, "fp32": 1e-4}  # how far results may be from those of PyTorch's operators, relative
DROPPED = 5e-2  # how far the loss may be where dropout draws differently

Job = Callable[[], Tensor]


@dataclass(frozen=True)
class Subject:
    """A network to be measured.

    Attributes:
        denoiser: without guidance input.
        batch: images of a training step and of targets.
        dtype: "bf16" or "fp32" of products and convolutions; weights are float32 except in sampling.
        device: where it is.
    """

    denoiser: NetworkDenoiser
    batch: int
    dtype: str
    device: torch.device

    @property
    def network(self) -> Network:
        """The network inside."""
        network = self.denoiser.network
        assert isinstance(network, Network)
        return network

    def precision(self) -> AbstractContextManager[object]:
        """Autocast to the dtype."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def labels(self, count: int) -> Tensor | None:
        """Classes (count,), in turn; None for an unconditional network."""
        classes = self.network.num_classes
        return None if classes is None else torch.arange(count, device=self.device) % classes

    def noise(self, count: int) -> Tensor:
        """N(0, 1) (count, C, H, W)."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(count, *self.network.input_shape, generator=generator, device=self.device)


def subject(denoiser: NetworkDenoiser, batch: int, dtype: str, device: torch.device) -> Subject:
    """A copy of a denoiser ready to be measured: what starts at zero gets values, since zeros are multiplied faster."""
    denoiser = copy.deepcopy(denoiser).to(device)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator, device=device))
    return Subject(denoiser, batch, dtype, device)


def training_step(s: Subject, compiled: bool) -> Job:
    """Draws, loss, backward pass and fused AdamW of the denoiser's own training."""
    denoiser = copy.deepcopy(s.denoiser).train().requires_grad_(True)
    if compiled:
        denoiser.network.compile(dynamic=False)
    method = DenoiserTraining(denoiser, s.denoiser.null_cond)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 1e-4, fused=True)
    images, labels = s.noise(s.batch).clamp(-1, 1), s.labels(s.batch)
    seeds = torch.arange(s.batch, device=s.device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        batch = method.draw(images, labels, seeds, 0)
        with s.precision():
            loss, _ = method.loss(batch, 0)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def guided_target(s: Subject, compiled: bool) -> Job:
    """The guided teacher's x by one evaluation of twice the batch (stage one)."""
    teacher = _frozen(s.denoiser, compiled)
    assert teacher.null_cond is not None
    z, t, w = s.noise(s.batch), torch.full((s.batch,), 0.5, device=s.device), _weights(s)
    return _without_gradient(s, lambda: guidance_target(teacher, teacher.null_cond, z, t, s.labels(s.batch), w))


def two_step_target(s: Subject, compiled: bool) -> Job:
    """What two steps of a teacher that takes w ask of one (stage two)."""
    teacher = _frozen(with_guidance_input(s.denoiser), compiled)
    z, t = s.noise(s.batch), torch.full((s.batch,), 0.5, device=s.device)
    labels, w = s.labels(s.batch), _weights(s)
    return _without_gradient(s, lambda: progressive_target(teacher, z, t, STEPS, labels, w))


def sampling(s: Subject, compiled: bool, count: int = 1) -> Job:
    """DDIM in a few steps by a student that takes w, weights in `dtype`; the grid is laid out beforehand."""
    student = with_guidance_input(s.denoiser)
    student.trained = None                    # it is trained for nothing, and no sampler needs to warn of that
    student = _frozen(student.to(torch.bfloat16) if s.dtype == "bf16" else student, compiled)
    w = torch.ones(count, device=s.device)
    run = prepare(
        student, s.noise(count), STEPS, s.labels(count), w, None, None, None, None, None, student="deterministic"
    )
    on = run.grid(ddim_weights)

    def sample() -> Tensor:
        z = run.z
        for i in range(STEPS - 1):
            z = run.update(z, i, "ddim", on[i])
        return run.x(z, STEPS - 1)

    return torch.no_grad()(sample)


JOBS: Mapping[str, Callable[[Subject, bool], Job]] = {
    "train_step": training_step,
    "guided_target": guided_target,
    "two_step_target": two_step_target,
    SAMPLING: sampling,
}


def _frozen(denoiser: NetworkDenoiser, compiled: bool) -> NetworkDenoiser:
    denoiser = copy.deepcopy(denoiser).eval().requires_grad_(False)
    if compiled:
        denoiser.network.compile(dynamic=False)
    return denoiser


def _weights(s: Subject) -> Tensor:
    return torch.linspace(0, 4, s.batch, device=s.device)


def _without_gradient(s: Subject, job: Job) -> Job:
    def run() -> Tensor:
        with torch.no_grad(), s.precision():
            return job()

    return run


def captured(job: Job) -> Job:
    """The same work as one CUDA graph: replayed without any host in between; its result stays in one place."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            job()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = job()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def ways(job: str, device: torch.device) -> list[str]:
    """How a job is measured here, as rows say it."""
    if device.type == "cpu":
        return ["eager", "auto"]              # which is the reference there, and compiling takes minutes
    graphs = ["eager+graph", "auto+graph"] if job == SAMPLING else []
    return [*graphs, "eager", "auto", "compile", "auto+compile"]


@contextmanager
def way(name: str) -> Iterator[None]:
    """Within, networks run on PyTorch's operators or on ours."""
    with use_backend("auto") if name.startswith("auto") else plain_pytorch():
        yield


def timed(job: str, s: Subject, name: str, seconds: float) -> tuple[Timing, float | None]:
    """What `measured` says of a job in that way."""
    with way(name):
        function = JOBS[job](s, "compile" in name)
        return measured(captured(function) if name.endswith("+graph") else function, s.device, seconds)


def measured(function: Job, device: torch.device, seconds: float) -> tuple[Timing, int | None]:
    """Time of a call after one that does not count, and the most memory in bytes that a GPU held meanwhile."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    function()
    timing = by_the_clock([function], device, seconds)
    return timing, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def tasks(settings: Settings) -> Iterator[Task]:
    """Whole networks: first a check of each job in each way, which also compiles it, then its time."""
    device = torch.device(settings.device)
    dtype = "bf16" if settings.size == "gpu" else "fp32"
    found = [(kind, job, name) for kind in NETWORKS for job in JOBS for name in ways(job, device)]
    kept = [(k, j, n) for k, j, n in found if settings.wants(f"{k}_{j}", PRESETS[settings.size], dtype, n)]
    for kind, job, name in kept:
        if name != "eager" and not name.endswith("+graph"):         # as exact as what they replay
            yield Task(f"check {kind} {job} {name}", CHECK, partial(_check, kind, job, name, settings, dtype))
    for kind, job, name in kept:
        yield Task(f"time {kind} {job} {name}", TIME, partial(_time, kind, job, name, settings, dtype))


def operations() -> list[str]:
    """The names under which `tasks` measures."""
    return [f"{kind}_{job}" for kind in NETWORKS for job in JOBS]


def _subject(kind: str, settings: Settings, dtype: str) -> Subject:
    torch.manual_seed(0)
    network = NETWORKS[kind].from_preset(PRESETS[settings.size])
    denoiser = NetworkDenoiser(network, Cosine(), "v")
    return subject(denoiser, BATCHES[settings.size], dtype, torch.device(settings.device))


def _check(kind: str, job: str, name: str, settings: Settings, dtype: str) -> Iterator[dict[str, Any]]:
    """How far the result is from that of PyTorch's operators, uncompiled, on the same weights and inputs."""
    s, results = _subject(kind, settings, dtype), []
    for which in ("eager", name):
        torch.manual_seed(0)                  # dropout
        with way(which):
            results.append(JOBS[job](s, "compile" in which)())
    drops = job == "train_step" and s.network.config["dropout"] > 0
    yield _identity(kind, job, name, settings, dtype) | {
        "rel_err": relative(results[1], results[0]), "limit": DROPPED if drops else ALIKE[dtype],
    }  # fmt: skip


def _time(kind: str, job: str, name: str, settings: Settings, dtype: str) -> Iterator[dict[str, Any]]:
    s = _subject(kind, settings, dtype)
    timing, memory = timed(job, s, name, SECONDS[settings.size])
    count = 1 if job == SAMPLING else s.batch
    yield _identity(kind, job, name, settings, dtype) | {
        "us": timing.us, "spread": timing.spread, "per_second": count / timing.us * 1e6, "peak_bytes": memory,
    }  # fmt: skip


def _identity(kind: str, job: str, name: str, settings: Settings, dtype: str) -> dict[str, Any]:
    words = f"{PRESETS[settings.size]} b{1 if job == SAMPLING else BATCHES[settings.size]}"
    return {"op": f"{kind}_{job}", "pass": STEP, "shape": words, "dtype": dtype, "layout": "-", "backend": name}

