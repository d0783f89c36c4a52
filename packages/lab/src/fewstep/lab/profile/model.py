"""`fewstep profile model`: where a network's time goes, and what our kernels change of it.

Work is told apart while the profiler listens: convolutions, linear layers and embeddings by their modules,
normalisations and attention by the operations of fewstep.kernels. What backward nodes do belongs to the forward work
that recorded them (the profiler numbers both alike). The rest is element-wise.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile

from fewstep.kernels import available_backends, backend, use_backend
from fewstep.kernels.benchmark import results
from fewstep.kernels.benchmark.operations import plain_pytorch
from fewstep.lab.config import ConfigError
from fewstep.lab.distributed import pick_device
from fewstep.lab.profile import end_to_end, figures, tables
from fewstep.lab.profile.end_to_end import JOBS, SAMPLING, STEP, Subject, subject
from fewstep.lab.report.style import style
from fewstep.lab.report.tables import DASH, Table, number, percent, times
from fewstep.models import PRESETS, Network, NetworkDenoiser, build_network, load
from fewstep.schedules import Cosine

MARK = "fewstep:"
OTHER = "element-wise and the rest"
MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv2d, "convolution"), (nn.Linear, "linear"), (nn.Embedding, "embedding"),
)  # fmt: skip
OPERATIONS = {
    "group_norm_silu": "normalisation", "layer_norm_modulate": "normalisation", "attention": "attention",
    "attention_qkv": "attention", "guided_update": "sampler update",
}  # fmt: skip
OPTIMISER, BACKWARD = "optimiser", "autograd::engine::evaluate_function"
Shares = dict[str, float]  # microseconds by kind


def command(args: argparse.Namespace, console: Console) -> int:
    """Time whole steps both ways, split a training step and a sample by kind, write a trace of each.

    Raises:
        ConfigError: an unknown preset, backend, dtype or device, a batch below 1.
        ValueError, FileNotFoundError: the saved model is damaged or missing.
    """
    s = chosen_subject(args)
    names = ways(args.backend)
    say = Console(stderr=True) if args.json else console
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = list(timed_rows(args, s, names, say))
    shares = {job: {way: split(job, s, way, out) for way in names} for job in ("train_step", SAMPLING)}
    found = {"model": args.model, "rows": rows, "shares_us": shares}
    (out / "profile.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "tables.md").write_text(markdown(rows, shares))
    draw(rows, shares, out)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(rows, shares, out, console)
    return 0


def chosen_subject(args: argparse.Namespace) -> Subject:
    """The network that the arguments name, on its device."""
    device = pick_device(args.device)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if dtype not in ("bf16", "fp32"):
        raise ConfigError(f"--dtype {dtype}: must be bf16 or fp32")
    if args.batch < 1:
        raise ConfigError(f"--batch {args.batch}: must be 1 or more")
    if args.seconds < 0:
        raise ConfigError(f"--seconds {args.seconds:g}: must be 0 or more")
    return subject(denoiser_of(args.model), args.batch, dtype, device)


def denoiser_of(name: str) -> NetworkDenoiser:
    """A saved model's folder, or a freshly initialised network by its preset: "imagenet64" or "DiT/imagenet64".

    Raises:
        ConfigError: neither a folder nor a preset; names the presets.
    """
    if Path(name).exists():
        denoiser = load(name)
        if cast(Network, denoiser.network).takes_guidance:
            raise ConfigError(f"{name}: a student that takes w; profile the teacher that it was made from")
        return denoiser
    kind, _, preset = name.rpartition("/")
    if preset not in PRESETS.get(kind or "UNet", {}):
        known = ", ".join(f"{k}/{p}" for k in PRESETS for p in PRESETS[k])
        raise ConfigError(f"{name}: neither the folder of a saved model nor a preset; presets: {known}")
    network = build_network({"type": kind or "UNet"} | PRESETS[kind or "UNet"][preset])
    return NetworkDenoiser(network, Cosine(), "v")


def ways(name: str) -> tuple[str, str]:
    """PyTorch's operators first, then the backend.

    Raises:
        ConfigError: the backend is unknown or cannot run here; names those that can.
    """
    if name not in ("auto", *available_backends()):
        raise ConfigError(f"--backend {name}: must be one of auto, {', '.join(available_backends())} here")
    return "eager", name


@contextmanager
def way(name: str) -> Iterator[None]:
    """Within, networks run on PyTorch's operators or on a backend of ours."""
    with plain_pytorch() if name == "eager" else use_backend(name):
        yield


def timed_rows(args: argparse.Namespace, s: Subject, names: tuple[str, str], say: Console) -> Iterator[results.Row]:
    """Rows of whole training steps, targets and sampling as `make gpu-check` has them, for this network."""
    made = results.circumstances(torch.device(s.device.type))
    kinds = [f"{name}{suffix}" for suffix in ("", "+compile") for name in names if not suffix or args.compile]
    for job in JOBS:
        for name in kinds:
            plain = name.removesuffix("+compile")
            with say.status(f"{job}, {name}") if say.is_terminal else nullcontext(), way(plain):
                timing, peak = end_to_end.measured(JOBS[job](s, name != plain), s.device, args.seconds)
            count = 1 if job == SAMPLING else s.batch
            yield {
                "op": job, "pass": STEP, "shape": f"{args.model} b{count}", "dtype": s.dtype, "layout": "-",
                "backend": "compile" if name == "eager+compile" else name, "us": timing.us, "spread": timing.spread,
                "per_second": count / timing.us * 1e6, "peak_bytes": peak, **made,
            }  # fmt: skip


def split(job: str, s: Subject, name: str, out: Path) -> Shares:
    """Microseconds of one call of a job by kind, device time on a GPU; writes `<job>_<way>.trace.json` for Perfetto."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")      # it is not for the person in front of the screen
    gpu = s.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with way(name):
        run = JOBS[job](s, False)
        for _ in range(2):                  # the first call also pays for what is set up once
            with marked(), profile(activities=activities) as recorded:
                run()
                if gpu:
                    torch.cuda.synchronize(s.device)
    recorded.export_chrome_trace(str(out / f"{job}_{name}.trace.json"))
    return by_kind([event for event in recorded.events() or [] if event.device_type == DeviceType.CPU], gpu)


@contextmanager
def marked() -> Iterator[None]:
    """Within, the profiler sees which kind of work each module and each operation of ours is."""
    stack: list[record_function] = []

    def enter(module: nn.Module, *_: Any) -> None:
        if (kind := kind_of_module(module)) is not None:
            stack.append(record_function(MARK + kind))
            stack[-1].__enter__()

    def leave(module: nn.Module, *_: Any) -> None:
        if kind_of_module(module) is not None:
            stack.pop().__exit__(None, None, None)

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    kept = {op: dict(found) for op, found in backend._implementations.items()}
    for op, found in backend._implementations.items():
        found.update({name: _recorded(OPERATIONS.get(op, op), function) for name, function in found.items()})
    try:
        yield
    finally:
        for op, found in backend._implementations.items():
            found.update(kept[op])
        for hook in hooks:
            hook.remove()


def kind_of_module(module: nn.Module) -> str | None:
    """What a module that computes something by itself does, in a word."""
    return next((kind for type_, kind in MODULES if isinstance(module, type_)), None)


def _recorded(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with record_function(MARK + kind):
            return function(*args)

    return run


def by_kind(events: Sequence[FunctionEvent], gpu: bool) -> Shares:
    """Sum the events' own times by kind, the largest first.

    A backward node has the number of the operation that recorded it: the last one to begin with that number.
    """
    recorded_by = {
        event.sequence_nr: kind
        for event in sorted(events, key=lambda event: event.time_range.start)
        if event.sequence_nr >= 0 and (kind := _kind(event, {})) is not BACKWARD
    }
    sums: Shares = {}
    for event in events:
        kind = _kind(event, recorded_by)
        sums[kind] = sums.get(kind, 0.0) + (event.self_device_time_total if gpu else event.self_cpu_time_total)
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _kind(event: FunctionEvent, recorded_by: Mapping[int, str]) -> str:
    """By the innermost mark around an event; within a backward node, that of what recorded it."""
    around: FunctionEvent | None = event
    while around is not None:
        if around.name.startswith(MARK):
            return around.name.removeprefix(MARK)
        if around.name.startswith("Optimizer."):
            return OPTIMISER
        if around.name.startswith(BACKWARD):
            return recorded_by.get(around.sequence_nr, OTHER) if recorded_by else BACKWARD
        around = around.cpu_parent
    return OTHER


def share_table(shares: Mapping[str, Mapping[str, Shares]]) -> Table:
    """Milliseconds and share of each kind of work, PyTorch's operators beside ours."""
    first, second = next(iter(shares.values()))
    header = ("job", "work", f"{first} ms", "share", f"{second} ms", "share", "speed-up")
    body: list[list[str]] = []
    groups = set()
    for job, found in shares.items():
        groups.add(len(body))
        totals = {name: sum(found[name].values()) for name in found}
        for kind in [*dict.fromkeys([*found[first], *found[second]]), "all"]:
            a, b = (totals[n] if kind == "all" else found[n].get(kind, 0.0) for n in (first, second))
            cells = [number(a / 1e3), percent(a / totals[first]), number(b / 1e3), percent(b / totals[second])]
            body.append([job, kind, *cells, times(a / b) if a and b else DASH])
    return Table(header, body, text_columns=2, groups=frozenset(groups))


def markdown(rows: Sequence[results.Row], shares: Mapping[str, Mapping[str, Shares]]) -> str:
    """Both tables for a README, with what they were measured on."""
    facts = "\n".join(f"- {line}" for line in tables.circumstances(rows))
    return "\n".join([tables.networks(rows).markdown(), share_table(shares).markdown(), facts, ""])


def show(rows: Sequence[results.Row], shares: Mapping[str, Mapping[str, Shares]], out: Path, console: Console) -> None:
    """Both tables on the screen, and where the rest is."""
    tables.show(console, tables.networks(rows), "Whole steps")
    tables.show(console, share_table(shares), "Where the time of one step goes, while the profiler listens")
    for line in tables.circumstances(rows):
        console.print(line, markup=False)
    if rows[0]["peak_bytes"] is None:
        console.print("no GPU: memory and fused kernels cannot be measured; auto is our reference here", style="yellow")
    files = "profile.json, tables.md, figures, and *.trace.json for https://ui.perfetto.dev"
    console.print(f"{out}: {files}", soft_wrap=True)


def draw(rows: Sequence[results.Row], shares: Mapping[str, Mapping[str, Shares]], out: Path) -> None:
    """`networks` and `shares`, each as PNG and PDF."""
    with style():
        for name, figure in (("networks", figures.whole(rows)), ("shares", figures.shares(shares))):
            for suffix in ("png", "pdf") if figure is not None else ():
                figure.savefig(out / f"{name}.{suffix}")  # type: ignore[union-attr]  # it is there
