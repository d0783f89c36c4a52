"""Whether reading keeps up with training: WebDataset shards of 64x64 JPEGs, read ahead by worker processes.

    python packages/lab/benchmarks/data_loader.py [--workers 4] [--batch 128] [--step 10] [--batches 10000]

Prints images/s of one process alone, by its processor time; how long a step of --step ms (a sleep, as if a GPU worked)
takes with its batch read by the workers; and the memory of this process and its workers together (PSS: what they share
counts once) after --early and after --batches batches read as fast as they come. Exits with 1 if a step takes more than
1.05 times --step, or memory grows by more than 2 %. Needs as many free cores as workers, and one.
"""

import argparse
import io
import os
import re
import sys
import tarfile
import tempfile
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep.lab.config import DataConfig, FilesConfig
from fewstep.lab.data import Order, Split, load_data

SIDE, DIFFERENT = 64, 500  # pixels; images that are drawn, the shards repeat them
STEP_LIMIT, MEMORY_LIMIT = 1.05, 1.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--step", type=float, default=10.0, help="ms")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--early", type=int, default=1000, help="batches")
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=50_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), args.images)
        alone, fed = (split_of(Path(folder), workers) for workers in (0, args.workers))
        cores = len(os.sched_getaffinity(0))
        print(f"{args.images} JPEGs of {SIDE}x{SIDE}, {size:.0f} bytes each; batch {args.batch}, {cores} cores")
        order = Order(len(fed), args.batch, seed=0)
        began = time.process_time()
        seconds(alone, order, range(20))
        print(f"one process  {args.batch * 20 / (time.process_time() - began):.0f} images/s per core")
        seconds(fed, order, range(5))  # workers start
        step = 1000 * seconds(fed, order, range(5, 5 + args.steps), args.step / 1000) / args.steps
        print(f"step of {args.step:g} ms from {args.workers} workers  {step:.2f} ms (at most {STEP_LIMIT:g} times)")
        taken = seconds(fed, order, range(args.early))
        early = memory()
        taken += seconds(fed, order, range(args.early, args.batches))
        growth = memory() / early
        rate = args.batches * args.batch / taken
        print(f"as fast as they come  {rate:.0f} images/s, {rate / args.workers:.0f} per worker")
        print(f"memory  {early / 1e6:.1f} MB after {args.early} batches, x {growth:.4f} after {args.batches} "
              f"(at most {MEMORY_LIMIT})")  # fmt: skip
    return int(step > STEP_LIMIT * args.step or growth > MEMORY_LIMIT)


def write(folder: Path, count: int) -> float:
    """Shards of 5,000 images and classes; returns their mean size in bytes."""
    drawn = [picture(i) for i in range(min(DIFFERENT, count))]
    for first in range(0, count, 5000):
        with tarfile.open(folder / f"{first // 5000:04d}.tar", "w") as archive:
            for i in range(first, min(first + 5000, count)):
                for suffix, content in (("jpg", drawn[i % len(drawn)]), ("cls", str(i % 10).encode())):
                    member = tarfile.TarInfo(f"{i:07d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return sum(map(len, drawn)) / len(drawn)


def picture(seed: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have it: each octave half as strong as the one before."""
    random, pixels = np.random.default_rng(seed), np.full((SIDE, SIDE, 3), 128.0)
    for octave in range(1, 6):
        coarse = Image.fromarray(random.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        pixels += (np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) - 128.0) / 2 ** (octave - 1)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def split_of(folder: Path, workers: int) -> Split:
    files = FilesConfig(str(folder), workers=workers)
    return load_data(DataConfig("webdataset", SIDE, 3, 10, 20, files=files)).train


def seconds(split: Split, order: Order, updates: range, step: float = 0.0) -> float:
    """For the batches of these updates, announced as training announces them; each step lasts `step` s at least."""
    began, announced = time.perf_counter(), updates.start
    for update in updates:
        last = min(max(update + split.ahead, announced), updates.stop)
        for later in range(announced, last):
            split.expect(order.indices(order.positions(later)))
        announced, due = last, time.perf_counter() + step
        images, _ = split.images.read(order.indices(order.positions(update)))
        assert images.dtype == torch.uint8
        time.sleep(max(0.0, due - time.perf_counter()))
    return time.perf_counter() - began


def memory() -> float:
    """Bytes of this process and its workers, what they share counted once."""
    ids = [os.getpid(), *(child.pid for child in active_children())]
    texts = [Path(f"/proc/{number}/smaps_rollup").read_text() for number in ids]
    return 1024.0 * sum(int(re.search(r"^Pss: +(\d+)", text, re.M)[1]) for text in texts)


if __name__ == "__main__":
    sys.exit(main())
