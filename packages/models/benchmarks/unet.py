"""Seconds of one forward pass of `UNet` against diffusers' `UNet2DModel` of the same shape and parameter count.

    python packages/models/benchmarks/unet.py --preset cifar10 --batch 64 --repeats 20 --json unet.json

Both are evaluated eagerly, in channels_last, without gradients, in turn (ours, theirs, ours, ...), so that whatever
else the machine does meets both; medians are compared. The two networks do the same arithmetic, which is checked first:
their parameter counts must agree. Exits with 1 if ours takes more than 1.05 times as long.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.kernels.benchmark.results import cpu_name
from fewstep.models import PRESETS, UNet

BOUND = 1.05


def diffusers_twin(unet: UNet) -> nn.Module:
    """diffusers' network of the same shape: BigGAN up and down blocks, FiLM, attention at the same levels."""
    c = unet.config
    levels = len(c["channel_mult"])
    side = c["image_size"] // c["patch"]
    attends = [side >> level in c["attention"] for level in range(levels)]
    return diffusers.UNet2DModel(
        sample_size=side,
        in_channels=c["in_channels"] * c["patch"] ** 2,
        out_channels=c["out_channels"] * c["patch"] ** 2,
        block_out_channels=[c["channels"] * mult for mult in c["channel_mult"]],
        layers_per_block=c["blocks"],
        down_block_types=["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=c["head_dim"] or c["channels"] * c["channel_mult"][-1] // c["heads"],
        time_embedding_dim=c["emb_channels"],
        norm_num_groups=min(c["groups"], c["channels"] // c["group_channels"]),
        attn_norm_num_groups=min(c["groups"], c["channels"] // c["group_channels"]),
        dropout=c["dropout"],
        num_class_embeds=None if c["num_classes"] is None else c["num_classes"] + 1,
    )


def interleaved(functions: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in turn, after two calls of each that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-2, repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(preset: str, batch: int, repeats: int, device: str) -> dict[str, Any]:
    """The record: medians, their ratio, parameter counts and what it ran on."""
    unet = UNet.from_preset(preset)
    twin = diffusers_twin(unet)
    networks = {
        name: network.to(device).to(memory_format=torch.channels_last).eval()
        for name, network in (("fewstep", unet), ("diffusers", twin))
    }
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    if len(set(parameters.values())) > 1:
        raise SystemExit(f"the two networks differ in parameters: {parameters}")
    z = torch.randn(batch, *unet.input_shape, device=device).to(memory_format=torch.channels_last)
    t = torch.linspace(0, 999, batch, device=device)
    patch = unet.config["patch"]
    y = None if unet.num_classes is None else torch.arange(batch, device=device) % unet.num_classes
    with torch.inference_mode():
        seconds = interleaved(
            {"fewstep": lambda: unet(z, t, y), "diffusers": lambda: twin(F.pixel_unshuffle(z, patch), t, y).sample},
            repeats,
        )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "preset": preset, "batch": batch, "repeats": repeats, "parameters": parameters,
        "median_seconds": medians, "seconds": seconds, "ratio": medians["fewstep"] / medians["diffusers"],
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10", choices=sorted(PRESETS["UNet"]))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    record = measure(options.preset, options.batch, options.repeats, options.device)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    medians, parameters = record["median_seconds"], record["parameters"]
    print(f"parameters {parameters}\nmedian seconds {medians}\nratio fewstep / diffusers: {record['ratio']:.3f}")
    return int(record["ratio"] > BOUND)


if __name__ == "__main__":
    sys.exit(main())
