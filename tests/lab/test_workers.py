"""Work spread over processes: the same results as in one, nothing left behind, errors and signals not lost."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from lab_jobs import die, threads_and, touch_after
from rich.console import Console

from fewstep.lab.evaluation.plan import Draw
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.shards import ShardCache
from fewstep.lab.workers import spread
from fewstep.models import NetworkDenoiser, UNet, save
from fewstep.schedules import Cosine


def assert_nobody_is_left() -> None:
    """Worker processes are gone; the pool's own thread may be reaping the last of them just now."""
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_every_piece_is_done_once_by_single_threaded_processes() -> None:
    """A piece done twice or not at all would be an image missing; many threads a core would make it slower."""
    found = dict(spread(threads_and, [(n,) for n in range(6)], 2, lambda: False))
    assert {i: n for i, (n, _, _) in found.items()} == {i: i for i in range(6)}
    assert {threads for _, threads, _ in found.values()} == {1}
    assert os.getpid() not in {pid for *_, pid in found.values()}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_piece_reaches_the_caller(workers: int) -> None:
    with pytest.raises(ValueError, match=r"domain|nonnegative"):
        list(spread(math.sqrt, [(-1,), (-1,), (-1,)], workers, lambda: False))
    assert_nobody_is_left()


def test_a_killed_worker_is_an_error_and_no_endless_wait() -> None:
    with pytest.raises(BrokenProcessPool):
        list(spread(die, [(0,), (1,)], 2, lambda: False))


def test_stopping_kills_what_is_under_way(tmp_path: Path) -> None:
    """Ctrl-C must not wait for a chunk of 512 steps."""
    jobs = [(str(tmp_path), seconds, str(seconds)) for seconds in (0.0, 60.0, 60.0, 60.0)]
    done = [i for i, _ in spread(touch_after, jobs, 2, lambda: (tmp_path / "0.0").exists())]
    assert set(done) <= {0}
    assert [path.name for path in tmp_path.iterdir()] == ["0.0"]
    assert_nobody_is_left()


def test_samples_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """The shards of one and of two processes are the same bits."""
    torch.manual_seed(0)
    save(NetworkDenoiser(UNet.from_preset("debug"), Cosine(), "v").eval(), tmp_path / "model")
    draw, cpu = Draw("teacher", "ddim", 3, 1.0), torch.device("cpu")
    images = []
    for workers in (1, 2):
        made = Samples(
            sizes={draw: 20}, models={"teacher": Model(tmp_path / "model", cpu)},
            cache=ShardCache(tmp_path / str(workers)), judge="", shape=(1, 8, 8), classes=(0, 1, 2), seed=0, chunk=8,
            device=cpu, workers=workers,
        )  # fmt: skip
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        made.make(Console(quiet=True), False, lambda: False)
        torch.set_num_threads(threads)
        images.append(torch.cat(list(made.batches(draw, 20))))
    assert images[0].shape == (20, 1, 8, 8)
    assert torch.equal(*images)
