"""Network sizes by name. `cifar10` and `imagenet64` of UNet are papers.md C.3; DiT's are DiT-S and DiT-B."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "UNet": {
        "debug": {
            "image_size": 8, "in_channels": 1, "channels": 16, "channel_mult": (1, 2), "blocks": 1, "attention": (4,),
            "num_classes": 10,
        },
        "digits": {
            # half the floating-point operations of 32 channels at 8x8 for more parameters; 16 channels per group:
            # normalising 4 at a time costs five times as much on a CPU in channels_last
            "image_size": 8, "in_channels": 1, "patch": 2, "channels": 32, "channel_mult": (1, 2), "blocks": 1,
            "group_channels": 16, "num_classes": 10,
        },
        "cifar10": {
            "image_size": 32, "in_channels": 3, "channels": 256, "channel_mult": (1, 1, 1), "blocks": 3,
            "attention": (16, 8), "heads": 1, "emb_channels": 1024, "dropout": 0.2, "num_classes": 10,
        },
        "imagenet64": {
            "image_size": 64, "in_channels": 3, "channels": 192, "channel_mult": (1, 2, 3, 4), "blocks": 3,
            "attention": (32, 16, 8), "head_dim": 64, "emb_channels": 768, "dropout": 0.1, "num_classes": 1000,
        },
    },
    "DiT": {
        "debug": {
            "image_size": 8, "in_channels": 1, "patch": 4, "width": 32, "depth": 2, "heads": 2, "num_classes": 10,
        },
        "digits": {
            "image_size": 8, "in_channels": 1, "patch": 2, "width": 96, "depth": 4, "heads": 3, "num_classes": 10,
        },
        "cifar10": {
            "image_size": 32, "in_channels": 3, "patch": 2, "width": 384, "depth": 12, "heads": 6, "num_classes": 10,
        },
        "imagenet64": {
            "image_size": 64, "in_channels": 3, "patch": 4, "width": 768, "depth": 12, "heads": 12,
            "num_classes": 1000,
        },
    },
}  # fmt: skip
