"""The training loop: the same run whatever interrupts it, however it is split."""

import copy
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill import DenoiserTraining, GuidanceDistillation
from fewstep.lab.config import ConfigError, GuideConfig, TeacherConfig, TrainingConfig
from fewstep.lab.context import Interrupted
from fewstep.lab.data import Split
from fewstep.lab.signals import stop_on_signals
from fewstep.lab.state import Skips
from fewstep.lab.train import Trainer, TrainingError, learning_rate
from fewstep.models import NetworkDenoiser, UNet, with_guidance_input
from fewstep.schedules import Cosine

CPU = torch.device("cpu")
UPDATES = 7


def split() -> Split:
    generator = torch.Generator().manual_seed(0)
    return Split(torch.rand(30, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(30) % 10)


def denoiser() -> NetworkDenoiser:
    torch.manual_seed(0)
    # Dropout is the one draw that is not by a sample's seed: a resumed run must repeat it too.
    return NetworkDenoiser(UNet.from_preset("debug", channels=8, attention=(), dropout=0.2), Cosine(), "v")


def trainer(out: Path, options: TrainingConfig | None = None, **more: Any) -> Trainer:
    """A teacher in training; everything it starts from is the same on every call."""
    network = denoiser()
    method = DenoiserTraining(network, network.null_cond)
    options = options or teacher_options()
    return Trainer(method, split(), options, updates=UPDATES, seed=5, out=out, device=CPU, bar=False, **more)


def teacher_options(**changes: Any) -> TrainingConfig:
    base = TeacherConfig(
        updates=UPDATES, batch_size=8, warmup=3, anneal="cosine", log_every=2, ema_half_life=0.3, checkpoint_seconds=0.0
    )
    return replace(base, **changes)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and optimiser state."""
    state = trainer.state
    (network,), (optimizer,) = state.networks.values(), state.optimizers.values()
    found = {f"weight {key}": value for key, value in network.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        found |= {f"optimizer {index} {key}": value for key, value in values.items()}
    if state.ema is not None:
        for average in state.ema.average.values():
            found |= {f"average {key}": value for key, value in average.items()}
    return {key: value.clone() for key, value in found.items()}


def trained(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and optimiser state: what a skipped update leaves as it is."""
    return {key: value for key, value in everything(trainer).items() if not key.startswith("average")}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, different


def finished(out: Path, options: TrainingConfig | None = None) -> Trainer:
    done = trainer(out, options)
    done.run()
    return done


class StopAfter:
    """Asks to stop once it has been asked that many times: after that many updates."""

    def __init__(self, updates: int) -> None:
        self.left = updates

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("interruptions", [[1], [4], [6], [2, 1, 3]])
def test_interrupted_run_ends_in_the_same_bits(tmp_path: Path, interruptions: list[int]) -> None:
    # Broken: a preempted run is another run; its figures cannot be reproduced.
    whole = finished(tmp_path / "whole")
    for updates in interruptions:
        with pytest.raises(Interrupted, match="saved after update"):
            trainer(tmp_path / "parts", stopping=StopAfter(updates)).run()
    resumed = finished(tmp_path / "parts")
    assert_same_bits(everything(whole), everything(resumed))


def test_crash_after_a_checkpoint_repeats_the_lost_updates_and_their_metrics(tmp_path: Path) -> None:
    # Broken: metrics.jsonl shows updates twice, or the means around the crash are of half the updates.
    options = teacher_options(checkpoint_updates=3)
    whole = finished(tmp_path / "whole", options)
    crashed = trainer(tmp_path / "parts", options)
    plain = crashed.update

    def crash_at_six() -> None:
        if crashed.state.step == 5:
            raise MemoryError
        plain()

    crashed.update = crash_at_six  # type: ignore[method-assign]  # the crash
    with pytest.raises(MemoryError):
        crashed.run()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # what a killed process may leave
    resumed = finished(tmp_path / "parts", options)
    assert_same_bits(everything(whole), everything(resumed))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert [line["step"] for line in metrics(tmp_path / "whole")] == [2, 4, 6, 7]


def test_tensorboard_shows_each_update_once_after_a_crash(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Crash(Exception):
        """Not a wish to stop: nothing is saved."""

    def crash_after_five() -> bool:
        if run.state.step == 5:
            raise Crash
        return False

    options = teacher_options(checkpoint_updates=3)
    run = trainer(tmp_path, options, tensorboard=True, stopping=crash_after_five)
    with pytest.raises(Crash):
        run.run()
    trainer(tmp_path, options, tensorboard=True).run()  # from update 3: 4 is told again
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [2, 4, 6, 7]
    told = [line["loss"] for line in metrics(tmp_path)]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(told)


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "images_per_second")} for line in lines]


def test_damaged_last_checkpoint_costs_time_but_no_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = finished(tmp_path / "whole")
    options = teacher_options(checkpoint_updates=2)
    with pytest.raises(Interrupted):
        trainer(tmp_path / "parts", options, stopping=StopAfter(5)).run()
    newest = tmp_path / "parts" / "checkpoints" / "00000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed = finished(tmp_path / "parts", options)
    assert_same_bits(everything(whole), everything(resumed))
    assert "going on after update 4" in capsys.readouterr().out


def test_exactly_the_asked_number_of_updates(tmp_path: Path) -> None:
    # Broken: one update fewer than asked, as in a known rival.
    done = finished(tmp_path)
    steps = {int(values["step"]) for opt in done.state.optimizers.values() for values in opt.state.values()}
    assert steps == {UPDATES}
    assert done.state.step == UPDATES


@pytest.mark.parametrize("anneal", ["linear", "cosine", "none"])
def test_rate_warms_up_and_is_exactly_zero_at_the_end(anneal: str) -> None:
    options = TeacherConfig(lr=0.5, warmup=4, anneal=anneal)
    assert learning_rate(options, 0, 100) == pytest.approx(0.125, rel=1e-3)
    halfway = {"none": 0.5, "linear": 0.25, "cosine": 0.25}[anneal]
    assert learning_rate(options, 50, 100) == pytest.approx(halfway)
    assert learning_rate(options, 100, 100) == (0.5 if anneal == "none" else 0.0)
    assert learning_rate(options, 99, 100) > 0


def test_accumulation_is_the_big_batch(tmp_path: Path) -> None:
    # Broken: the same config trains otherwise on a smaller GPU.
    plain = teacher_options(grad_clip=0.1, betas=[0.9, 0.999])
    networks = []
    for parts in (1, 4):
        run = trainer(tmp_path / str(parts), replace(plain, accumulate=parts))
        without_dropout(run)
        run.update()
        (network,) = run.state.networks.values()
        networks.append([weight.grad.clone() for weight in network.parameters() if weight.grad is not None])
    for whole, accumulated in zip(*networks, strict=True):
        torch.testing.assert_close(whole, accumulated, rtol=1e-4, atol=1e-7)


def without_dropout(run: Trainer) -> None:
    (network,) = run.state.networks.values()
    network.eval()  # parts of a batch cannot meet the dropout of the whole


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_close_to_float32_and_keeps_float32_weights(tmp_path: Path, precision: str) -> None:
    full = finished(tmp_path / "fp32")
    low = finished(tmp_path / precision, teacher_options(precision=precision))
    (theirs,), (ours,) = full.state.networks.values(), low.state.networks.values()
    start = denoiser().state_dict()
    for value in ours.state_dict().values():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    moved = sum(float((theirs.state_dict()[key] - start[key]).square().sum()) for key in start)
    apart = sum(float((theirs.state_dict()[key] - ours.state_dict()[key]).square().sum()) for key in start)
    assert 0 < apart < 0.25 * moved


def test_fp16_scale_survives_a_resume(tmp_path: Path) -> None:
    options = teacher_options(precision="fp16")
    whole = finished(tmp_path / "whole", options)
    with pytest.raises(Interrupted):
        trainer(tmp_path / "parts", options, stopping=StopAfter(3)).run()
    resumed = finished(tmp_path / "parts", options)
    assert_same_bits(everything(whole), everything(resumed))
    assert whole.state.scaler.state_dict() == resumed.state.scaler.state_dict()


def poison(run: Trainer, steps: set[int], value: float = float("nan")) -> None:
    """Make the loss of those updates (from 0) not finite."""
    plain = run.method.loss

    def poisoned(batch: Any, step: int, targets: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = plain(batch, step, targets)
        return (loss + value, {**logs, "loss": logs["loss"] + value}) if step in steps else (loss, logs)

    run.method.loss = poisoned  # type: ignore[method-assign]  # the poison


def test_losses_that_stay_broken_stop_the_run_and_keep_the_last_checkpoint(tmp_path: Path) -> None:
    # Broken: hours of training of NaN, saved over the last good weights.
    run = trainer(tmp_path, teacher_options(checkpoint_updates=2))
    poison(run, {2, 3, 4})
    with pytest.raises(TrainingError, match="not finite 3 times in a row, at update 5 of 7 again"):
        run.run()
    newest = max((tmp_path / "checkpoints").iterdir())
    assert newest.name == "00000004.safetensors"
    kept = trainer(tmp_path)
    kept._restore()
    before = trainer(tmp_path / "before")
    for _ in range(2):
        before.update()
    assert_same_bits(trained(before), trained(kept))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_loss_now_and_then_is_skipped_and_counted(
    tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    # Broken: one freak batch ends a long run, or its NaN (or an infinite loss with finite gradients) reaches weights,
    # Adam's moments and its step count (and with that its bias correction), or the means in the metrics.
    run = trainer(tmp_path, teacher_options(anneal="none", warmup=0))
    poison(run, {1, 2, 4, 5}, value)
    before: dict[int, dict[str, Tensor]] = {}
    plain = run.update

    def watched() -> None:
        plain()
        before[run.state.step] = trained(run)

    run.update = watched  # type: ignore[method-assign]  # to look at every update
    run.run()
    for skipped in (2, 3, 5, 6):
        assert_same_bits(before[skipped - 1], before[skipped])
    assert any(not torch.equal(before[6][key], before[7][key]) for key in before[6])
    lines = metrics(tmp_path)
    assert [line.get("skipped") for line in lines] == [1, 2, 4, 4]
    trainer(tmp_path / "clean", teacher_options(anneal="none", warmup=0, log_every=1)).run()
    assert lines[0]["loss"] == metrics(tmp_path / "clean")[0]["loss"]  # the mean of update 1 alone
    assert lines[3]["loss"] == pytest.approx(lines[0]["loss"], rel=1)
    assert "4 updates skipped so far" in capsys.readouterr().out


def test_networks_in_turns_fail_on_their_own(tmp_path: Path) -> None:
    # Broken: an auxiliary network that fails at its every turn is never three failures in a row, and the student goes
    # on for hours against one that learns nothing.
    run = trainer(tmp_path)
    skips = Skips(["student", "auxiliary"], CPU)
    good, bad = torch.tensor(True), torch.tensor(False)
    counts = [int(skips.count(name, good if name == "student" else bad)) for name in ("auxiliary", "student") * 3]
    assert counts == [1, 0, 2, 0, 3, 0]
    run.state.skips.count("denoiser", bad)
    run.state.skips.count("denoiser", bad)
    run._save()
    again = trainer(tmp_path)
    again._restore()
    assert int(again.state.skips.count("denoiser", bad)) == 3  # a crash in between forgives nothing
    assert int(again.state.skips.total) == 3


def test_signal_in_the_middle_of_an_update_waits_for_its_end(tmp_path: Path) -> None:
    with stop_on_signals() as stop:
        run = trainer(tmp_path, stopping=stop)
        plain = run.update

        def signalled() -> None:
            if run.state.step == 2:
                signal.raise_signal(signal.SIGTERM)
            plain()

        run.update = signalled  # type: ignore[method-assign]  # the signal
        with pytest.raises(Interrupted, match="after update 3 of 7"):
            run.run()
    assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_same_bits(everything(finished(tmp_path)), everything(finished(tmp_path / "whole")))


def test_second_interrupt_is_at_once() -> None:
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_only_the_student_is_trained_and_its_embedding_of_w_is(tmp_path: Path) -> None:
    # Broken: the embedding of w stays at zero and the student ignores w (diffusers #6278), or the teacher drifts.
    (teacher,) = finished(tmp_path / "teacher").state.networks.values()
    before = copy.deepcopy(teacher.state_dict())
    student = with_guidance_input(teacher)
    options = GuideConfig(updates=3, batch_size=8, checkpoint_seconds=0.0)
    method = GuidanceDistillation(teacher, student, teacher.null_cond)
    Trainer(method, split(), options, updates=3, seed=5, out=tmp_path / "s", device=CPU, bar=False).run()
    assert_same_bits(before, teacher.state_dict())
    guidance = student.network.conditioning.guidance
    assert guidance is not None
    assert all(float(weight.detach().abs().sum()) > 0 for weight in guidance.project.parameters())


def test_batch_that_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.lab.distributed.world_size", lambda: 3)
    with pytest.raises(ConfigError, match="batch_size=8: must be a multiple of 6"):
        trainer(tmp_path, teacher_options(accumulate=2))


@pytest.mark.parametrize("change", [{"betas": [0.8, 0.99]}, {"lr": 2e-3}, {"weight_decay": 0.5}, {"grad_clip": 0.01}])
def test_every_option_of_the_optimiser_reaches_it(tmp_path: Path, change: dict[str, Any]) -> None:
    plain, changed = finished(tmp_path / "a"), finished(tmp_path / "b", teacher_options(**change))
    (one,), (other,) = plain.state.networks.values(), changed.state.networks.values()
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_update_is_that_of_torchs_adam(tmp_path: Path) -> None:
    # Our options against the optimiser as a user of PyTorch would call it, clipping included.
    options = teacher_options(warmup=0, anneal="none", grad_clip=0.05, betas=[0.8, 0.95], lr=3e-3)
    run = trainer(tmp_path, options)
    reference = copy.deepcopy(run.state.networks)
    weights = [weight for network in reference.values() for weight in network.parameters()]
    adam = torch.optim.Adam(weights, lr=3e-3, betas=(0.8, 0.95), eps=options.eps, foreach=False, fused=False)
    for _ in range(3):
        run.update()
        (network,) = run.state.networks.values()
        for mine, theirs in zip(weights, network.parameters(), strict=True):
            mine.grad = None if theirs.grad is None else theirs.grad.clone()  # already clipped
        assert sum(float(weight.grad.square().sum()) for weight in weights if weight.grad is not None) <= 0.0501**2
        adam.step()
    for mine, theirs in zip(weights, network.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
