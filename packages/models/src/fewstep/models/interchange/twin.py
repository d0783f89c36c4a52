"""Our UNet as diffusers' UNet2DModel: one network under two names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fewstep.models.unet import UNet

ATTENTION = {"group_norm": "norm", "to_out.0": "project"}
RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "film", "norm2": "norm2", "conv2": "conv2",
            "conv_shortcut": "skip"}  # fmt: skip
OUTSIDE = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out",
           "time_embedding.linear_1": "conditioning.time_in", "time_embedding.linear_2": "conditioning.time_out",
           "class_embedding": "conditioning.classes"}  # fmt: skip
MAPPED = {"type", "image_size", "in_channels", "out_channels", "channels", "channel_mult", "blocks", "attention",
          "heads", "head_dim", "emb_channels", "dropout", "groups", "group_channels", "num_classes", "patch",
          "guidance"}  # fmt: skip


def unet_settings(unet: UNet) -> dict[str, Any]:
    """The arguments of the UNet2DModel that computes what this UNet does.

    Raises:
        ValueError: there is none; the message names the setting that it has no counterpart of.
    """
    c = unet.config
    _refuse_what_it_lacks(unet)
    attends = [c["image_size"] >> level in c["attention"] for level in range(len(c["channel_mult"]))]
    groups = _the_one("groups", {norm.num_groups for norm in unet.modules() if isinstance(norm, nn.GroupNorm)})
    return {
        "sample_size": c["image_size"], "in_channels": c["in_channels"], "out_channels": c["out_channels"],
        "block_out_channels": [c["channels"] * mult for mult in c["channel_mult"]], "layers_per_block": c["blocks"],
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": _head_dim(unet), "time_embedding_dim": c["emb_channels"], "dropout": c["dropout"],
        "freq_shift": 1, "flip_sin_to_cos": False, "norm_num_groups": groups, "attn_norm_num_groups": groups,
        "num_class_embeds": None if c["num_classes"] is None else c["num_classes"] + 1,
    }  # fmt: skip


def unet_weights(unet: UNet) -> dict[str, Tensor]:
    """The UNet's weights under diffusers' names; those of a guidance input are left out."""
    ours = unet.state_dict()
    pairs = dict(OUTSIDE)
    for res, attention, block in _blocks(unet):
        pairs |= {f"{res}.{theirs}": f"{block}.res.{name}" for theirs, name in RESIDUAL.items()}
        pairs |= {f"{attention}.{theirs}": f"{block}.attention.{name}" for theirs, name in ATTENTION.items()}
    weights = {
        f"{theirs}.{kind}": ours[f"{name}.{kind}"]
        for theirs, name in pairs.items() for kind in ("weight", "bias") if f"{name}.{kind}" in ours
    }  # fmt: skip
    for _, attention, block in _blocks(unet):
        for kind in ("weight", "bias"):
            if f"{block}.attention.qkv.{kind}" in ours:
                parts = ours[f"{block}.attention.qkv.{kind}"].chunk(3)
                weights |= {f"{attention}.to_{part}.{kind}": w for part, w in zip("qkv", parts, strict=True)}
    return {name: w[..., None, None] if "shortcut.weight" in name else w for name, w in weights.items()}


def _blocks(unet: UNet) -> Iterator[tuple[str, str | None, str]]:
    """(diffusers' residual block, its attention, our block) for every block."""
    levels, blocks = len(unet.config["channel_mult"]), unet.config["blocks"]
    sizes = [f"{s}x{s}" for s in (unet.config["image_size"] >> level for level in range(levels))]
    for level, size in enumerate(sizes):
        if level:
            yield f"down_blocks.{level - 1}.downsamplers.0", None, f"encoder.{size}_down"
        for i in range(blocks):
            yield f"down_blocks.{level}.resnets.{i}", f"down_blocks.{level}.attentions.{i}", f"encoder.{size}_{i}"
    for i in range(2):
        yield f"mid_block.resnets.{i}", f"mid_block.attentions.{i}", f"middle.{sizes[-1]}_{i}"
    for step, size in enumerate(reversed(sizes)):
        if step:
            yield f"up_blocks.{step - 1}.upsamplers.0", None, f"decoder.{size}_up"
        for i in range(blocks + 1):
            yield f"up_blocks.{step}.resnets.{i}", f"up_blocks.{step}.attentions.{i}", f"decoder.{size}_{i}"


def _refuse_what_it_lacks(unet: UNet) -> None:
    c = unet.config
    further = {key: c[key] for key in sorted(c.keys() - MAPPED) if c[key]}
    if c["patch"] != 1:
        further["patch"] = c["patch"]
    if further:
        named = ", ".join(f"{key}={value}" for key, value in further.items())
        raise ValueError(f"UNet with {named} cannot be exported: diffusers' UNet2DModel has no such thing")


def _head_dim(unet: UNet) -> int | None:
    """Channels per head; None for one head everywhere, whatever its width."""
    c = unet.config
    if c["head_dim"] or c["heads"] == 1:
        head_dim: int | None = c["head_dim"]
        return head_dim
    levels = [level for level in range(len(c["channel_mult"])) if c["image_size"] >> level in c["attention"]]
    widths = {c["channels"] * c["channel_mult"][level] for level in (*levels, -1)}
    return _the_one(f"channels of a head (heads={c['heads']})", {width // c["heads"] for width in widths})


def _the_one(what: str, found: set[int]) -> int:
    if len(found) != 1:
        raise ValueError(f"UNet cannot be exported: UNet2DModel has one number of {what}, not {sorted(found)}")
    return found.pop()
