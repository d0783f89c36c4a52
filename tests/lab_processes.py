"""Trainings so small that one process or several can run them: `python lab_processes.py FOLDER`, RANK set."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from fewstep.distill import DenoiserTraining, Method, MomentMatching
from fewstep.lab import checkpoint, distributed
from fewstep.lab.config import MomentsConfig, TeacherConfig, TrainingConfig
from fewstep.lab.context import Interrupted
from fewstep.lab.data import Split
from fewstep.lab.fsdp import is_sharded, local
from fewstep.lab.train import Trainer
from fewstep.models import NetworkDenoiser, UNet, save
from fewstep.schedules import Cosine

CPU = torch.device("cpu")
UPDATES, STOP = 12, 8  # of several processes, each eighth update is one at which they may stop
BASE = TeacherConfig(
    updates=UPDATES, batch_size=8, log_every=1, ema_half_life=0.3, checkpoint_seconds=0.0, parallel="fsdp"
)
LOW = replace(BASE, precision="bf16", activation_checkpointing=True)


def denoiser(seed: int = 0) -> NetworkDenoiser:
    """Without dropout, the one draw that differs between processes; with a convolution of one row, which one has."""
    torch.manual_seed(seed)
    network = UNet.from_preset("debug", channels=8, attention=(4,))
    return NetworkDenoiser(network, Cosine(), "v")


def teacher() -> DenoiserTraining:
    """The method of an ordinary training."""
    network = denoiser()
    return DenoiserTraining(network, network.null_cond)


def moments() -> MomentMatching:
    """Two networks that take turns."""
    return MomentMatching(denoiser(), denoiser(), denoiser(1), 4, weight="flat")


def trainer(
    out: Path, method: Method, options: TrainingConfig = BASE, stopping: Callable[[], bool] = lambda: False
) -> Trainer:
    """Everything that it starts from is the same on every call and every process."""
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.rand(30, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(30) % 10)
    return Trainer(
        method, split, options, updates=UPDATES, seed=5, out=out, device=CPU, bar=False, stopping=stopping
    )


def train(out: Path, method: Method, options: TrainingConfig = BASE) -> None:
    """To the end, from the last checkpoint if there is one; writes each network as an ordinary model."""
    run = trainer(out, method, options)
    run.run()
    run.finish()
    if distributed.is_main():
        for name, network in method.networks.items():
            assert isinstance(network, NetworkDenoiser)
            save(network, out / name)


def interrupted(out: Path) -> None:
    """The first `STOP` updates."""
    run = trainer(out, teacher(), stopping=lambda: run.state.step >= STOP)
    try:
        run.run()
    except Interrupted:
        return
    raise AssertionError("was not stopped")


def moments_options(parallel: str = "fsdp") -> TrainingConfig:
    """Those of moment matching."""
    return replace(MomentsConfig(), updates=UPDATES, batch_size=8, log_every=1, warmup=0, parallel=parallel)


def assert_half_is_here(run: Trainer) -> None:
    """Of weights, averages and Adam's state, once there is one."""
    run.update()
    found = checkpoint_tensors(run)
    here, whole = sum(local(v).numel() for v in found), sum(v.numel() for v in found)
    assert all(is_sharded(value) for value in found if value.ndim)
    assert here < 0.6 * whole, (here, whole)


def checkpoint_tensors(run: Trainer) -> list[torch.Tensor]:
    """All that grows with the network."""
    from fewstep.lab.state import checkpoint_of

    return [value for name, value in checkpoint_of(run.state).tensors.items() if not name.startswith("sum/")]


def assert_a_full_disk_stops_both(out: Path) -> None:
    """One process that cannot write its part: none goes on, and the checkpoint before is the last."""
    interrupted(out)
    run = trainer(out, teacher())
    if not distributed.is_main():
        checkpoint.save_file = full  # type: ignore[assignment]  # the fault
    try:
        run.run()
    except OSError:
        assert not distributed.is_main()
    except distributed.OtherProcessError:
        assert distributed.is_main()
    else:
        raise AssertionError("went on")
    assert [path.name for path in checkpoint.checkpoints(out / "checkpoints")] == ["00000008.parts"]


def full(tensors: object, path: Path, metadata: object) -> None:
    """What a full disk says."""
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    distributed.start(CPU)
    assert dist.get_world_size() == 2
    small = replace(BASE, activation_checkpointing=True, micro_batch=2, checkpoint_updates=5)
    train(folder / "two", teacher(), small)
    train(folder / "low2", teacher(), LOW)
    interrupted(folder / "there")
    train(folder / "back", teacher())
    train(folder / "moments2", moments(), moments_options())
    assert_half_is_here(trainer(folder / "memory", teacher()))
    assert_a_full_disk_stops_both(folder / "full")
    distributed.stop()
