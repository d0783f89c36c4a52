"""What an experiment's trainings would cost on GPUs: operations, memory and GPU-hours, counted and not measured.

    python packages/lab/benchmarks/step_cost.py experiments/imagenet64 [key=value ...] [--peak 989] [--utilisation 0.35]

Networks are built without memory, and operations of one forward pass counted as they are dispatched. A pass that trains
is three of them (forward, and twice as much backward). GPU-hours follow from --utilisation, the share of --peak that is
reached, which is an assumption. State: weights, gradients, Adam and averages of what trains, weights of what does not,
all float32, whole on each GPU. Activations: what autograd keeps of an image by PyTorch's own operators, in bfloat16.
Encoders of text, autoencoders, reading, sampling and measuring are left out. The data need not be there.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fewstep.kernels import use_backend
from fewstep.lab.compose import compose
from fewstep.lab.config import Config, ConfigError, MomentsConfig, PretrainedConfig, TrainingConfig
from fewstep.lab.networks import build_denoiser
from fewstep.lab.pretrained import read_checkpoint
from fewstep.lab.report.tables import Table
from fewstep.models import NetworkDenoiser

TRAINED = 3  # forward passes that one with its backward pass is worth
TOKENS = 77  # of a prompt, where the experiment does not say
# kind -> (passes forward alone, passes that train) of every image of an update, and (networks kept, networks trained).
# Guidance counts two: both branches. Alternating moments: student, teacher, auxiliary, of which one trains at a time.
# Instant moments, in halves of a batch: student forward, teacher forward and backward, its forward-mode derivative (two
# forward passes), student forward and backward, teacher forward.
PASSES = {
    "teacher": (0.0, 1.0), "convert": (0.0, 1.0), "guide": (2.0, 1.0), "halve": (2.0, 1.0),
    "alternating": (2.0, 1.0), "instant": (2.0, 1.0),
}  # fmt: skip
NETWORKS = {
    "teacher": (0, 1), "convert": (0, 1), "guide": (1, 1), "halve": (1, 1), "alternating": (1, 2), "instant": (1, 1),
}  # fmt: skip
HEADER = (
    "stage", "trainings x updates", "batch", "PFLOP an update", "GPU-hours", "state, GB", "activations, MB an image",
    "images at once",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of one image: operations of a forward pass, bytes kept for the backward pass in float32; and parameters."""

    flops: float
    kept: float
    parameters: int


@dataclass(frozen=True)
class Machine:
    """peak: operations/s of a GPU; utilisation: the share of them that is reached; memory: bytes of a GPU."""

    peak: float
    utilisation: float
    memory: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s in bfloat16; an H100's are 989")
    parser.add_argument("--utilisation", type=float, default=0.35, help="assumed share of the peak")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of a GPU")
    args = parser.parse_args()
    machine = Machine(args.peak * 1e12, args.utilisation, args.memory * 1e9)
    try:
        config = compose(args.experiment, args.overrides, check=False)
        denoiser = teacher_of(config)
        cost = cost_of(denoiser, config)
    except (ConfigError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    kind = type(denoiser.network).__name__
    print(f"{kind}: {cost.parameters / 1e6:.1f} M parameters, {cost.flops / 1e9:.1f} GFLOP a forward pass of one image")
    rows = list(rows_of(config, cost, machine))
    total = sum(row[1] for row in rows)
    body = [*(cells for cells, _ in rows), ["all", "", "", "", f"{total:,.0f}", "", "", ""]]
    print(Table(HEADER, body, text_columns=1).markdown())
    assumed = f"an assumed {args.utilisation:.0%} of {args.peak:g} TFLOP/s, {args.memory:g} GB a GPU"
    print(f"Estimated at {assumed}; not measured.")
    return 0


def teacher_of(config: Config) -> NetworkDenoiser:
    """What is distilled, without memory: the experiment's network, or that of the checkpoint that it reads."""
    for stage in config.stages.values():
        if isinstance(stage, PretrainedConfig):
            return read_checkpoint(stage, config.data.image_size, weights=False)
    with torch.device("meta"):
        return build_denoiser(config, config.network)


def cost_of(denoiser: NetworkDenoiser, config: Config) -> Cost:
    """Count one forward pass of one image; a student's, which takes w as well, costs as much within a thousandth."""
    parameters = sum(weight.numel() for weight in denoiser.network.parameters())
    with FakeTensorMode(), use_backend("reference"):
        network = _on_no_gpu(denoiser.network)
        z, time = torch.empty(1, *network.input_shape, device="cuda"), torch.zeros(1, device="cuda")
        cond = _condition(denoiser, config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(z, time, cond)
        kept = _kept(network, z, time, cond)
    return Cost(float(counter.get_total_flops()), kept, parameters)


def _on_no_gpu(network: Any) -> Any:
    """The network with weights of a GPU that need not be there: on the CPU its inputs would be looked at."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = nn.Parameter(empty) if tensors is module._parameters else empty
    return network.train()


def _condition(denoiser: NetworkDenoiser, config: Config) -> Any:
    if not denoiser.takes_text:
        return torch.zeros(1, dtype=torch.int64, device="cuda")
    settings = denoiser.network.config  # type: ignore[union-attr]  # every network has one
    width = settings.get("text_width") or settings["settings"]["cross_attention_dim"]
    return {"text": torch.empty(1, config.text.length if config.text else TOKENS, width, device="cuda")}


def _kept(network: nn.Module, *inputs: Any) -> float:
    """Bytes that autograd keeps of a forward pass, weights aside; what is kept twice counts once."""
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(*inputs)
    weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in weights)
    del output  # what is held must live until it is counted
    return float(found)


def rows_of(config: Config, cost: Cost, machine: Machine) -> Iterator[tuple[list[str], float]]:
    """(cells, GPU-hours) of every stage that trains a denoiser."""
    for name, stage in config.stages.items():
        kind = stage.method if isinstance(stage, MomentsConfig) else stage.kind
        if not isinstance(stage, TrainingConfig) or kind not in PASSES:
            continue
        trainings = list(trainings_of(stage))
        update = flops_of(kind, cost) * stage.batch_size
        hours = sum(trainings) * update / (machine.peak * machine.utilisation) / 3600
        state, kept = state_of(kind, stage, cost), cost.kept / 2
        at_once = max(0, int((0.9 * machine.memory - state) // kept))
        least, most = f"{min(trainings):,}", f"{max(trainings):,}"
        updates = f"{len(trainings)} x {least}" + (f" to {most}" if most != least else "")
        cells = [f"{stage.batch_size:,}", f"{update / 1e15:.2f}", f"{hours:,.0f}", f"{state / 1e9:.1f}"]
        yield [name, updates, *cells, f"{kept / 1e6:,.0f}", f"{at_once:,}"], hours


def trainings_of(stage: Any) -> Iterator[int]:
    """Updates of each training of a stage; the stochastic student of 1 step is that of 2 and costs none."""
    for steps in getattr(stage, "steps", [None]):
        if (getattr(stage, "students", None), steps) != ("stochastic", 1):
            yield stage.updates_for(steps)


def flops_of(kind: str, cost: Cost) -> float:
    """Operations of one image of an update."""
    alone, trained = PASSES[kind]
    return (alone + TRAINED * trained) * cost.flops


def state_of(kind: str, stage: TrainingConfig, cost: Cost) -> float:
    """Bytes of weights, gradients, Adam's two moments and averages on every GPU."""
    kept, trained = NETWORKS[kind]
    averaged = stage.ema_decay is not None or stage.ema_half_life > 0
    return 4.0 * cost.parameters * (kept + trained * (4 + averaged))


if __name__ == "__main__":
    sys.exit(main())
