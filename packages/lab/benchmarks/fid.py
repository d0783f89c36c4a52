"""FID of 50,000 feature vectors of 2,048 dimensions, streamed, against reference statistics: seconds and memory.

    python packages/lab/benchmarks/fid.py [--samples 50000] [--features 2048]

Features are float32 and come in batches of 250; what it takes to make them is left out. Exits with 1 above 60 s or
2 GB.
"""

import argparse
import os
import resource
import sys
import time

import torch

from fewstep.lab.metrics import Moments, StreamedMoments, frechet_distance

MOST_SECONDS, MOST_BYTES = 60.0, 2e9
BATCH = 250


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=2048)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(args.features, args.features, generator=generator) / args.features**0.5
    exact = mix.double().T @ mix.double()
    reference = Moments(args.samples, torch.zeros(args.features).double().numpy(), (args.samples - 1) * exact.numpy())
    streamed, folding = StreamedMoments(), 0.0
    for start in range(0, args.samples, BATCH):
        features = torch.randn(min(BATCH, args.samples - start), args.features, generator=generator) @ mix
        began = time.perf_counter()
        streamed.add(features)
        folding += time.perf_counter() - began
    began = time.perf_counter()
    moments = streamed.moments()
    folding += time.perf_counter() - began
    began = time.perf_counter()
    found = frechet_distance(moments, reference)
    distance = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    print(f"{args.samples} x {args.features}, on {len(os.sched_getaffinity(0))} cores: FID {found:.4f}")
    total = folding + distance
    print(f"moments {folding:.2f} s  distance {distance:.2f} s  total {total:.2f} s (at most {MOST_SECONDS:g})")
    print(f"memory {memory / 1e9:.2f} GB (at most {MOST_BYTES / 1e9:g})")
    return int(total > MOST_SECONDS or memory > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
