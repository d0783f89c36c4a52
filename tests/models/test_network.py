"""Sizes against published ones, networks from presets and configs, students initialised from larger teachers."""

import json

import diffusers
import pytest
import torch
from model_helpers import TYPES, batch, perturbed, tiny

from fewstep.models import PRESETS, DiT, Network, UNet, build_network, init_from


def millions(network: torch.nn.Module) -> float:
    return sum(tensor.numel() for tensor in network.state_dict().values()) / 1e6


def test_published_sizes() -> None:
    """The ImageNet-64 U-Net of arXiv 2105.05233 (6 output channels) and DiT's table 1: a block too few would show."""
    with torch.device("meta"):
        assert millions(UNet.from_preset("imagenet64", out_channels=6)) == pytest.approx(295.9, abs=0.05)
        dits = ((384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675))
        for width, depth, heads, published in dits:
            dit = DiT(32, 4, 2, width, depth, heads, out_channels=8, num_classes=1000)
            assert millions(dit) == pytest.approx(published, abs=0.6)
        assert millions(DiT.from_preset("cifar10")) == pytest.approx(33, abs=0.7)
        assert millions(DiT.from_preset("imagenet64")) == pytest.approx(130, abs=0.6)


def test_cifar10_preset_has_the_size_of_diffusers_network() -> None:
    """The sizes of papers.md C.3, written out a second time for another library: both must count the same."""
    with torch.device("meta"):
        ours = UNet.from_preset("cifar10")
        theirs = diffusers.UNet2DModel(
            sample_size=32, block_out_channels=[256] * 3, layers_per_block=3,
            down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"], downsample_type="resnet",
            upsample_type="resnet", resnet_time_scale_shift="scale_shift", attention_head_dim=256,
            time_embedding_dim=1024, attn_norm_num_groups=32, num_class_embeds=11,
        )  # fmt: skip
    assert millions(ours) == millions(theirs)
    assert ours.config["dropout"] == 0.2


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in PRESETS for name in PRESETS[kind]])
def test_presets_survive_json(kind: str, name: str) -> None:
    """A config that JSON changes (tuples, numbers) would be another one after saving."""
    with torch.device("meta"):
        network = TYPES[kind].from_preset(name)
        again = build_network(json.loads(json.dumps(network.config)))
    assert again.config == network.config == json.loads(json.dumps(network.config))
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    assert {k: v.shape for k, v in again.state_dict().items()} == shapes


def test_overrides_and_unknown_names() -> None:
    """A misspelt override that is ignored trains another network than was asked for."""
    assert UNet.from_preset("debug", channels=8).config["channels"] == 8
    with pytest.raises(ValueError, match="UNet has no preset 'digit': use one of debug, digits, cifar10, imagenet64"):
        UNet.from_preset("digit")
    with pytest.raises(ValueError, match=r"unknown keys \['chanels'\].*its keys are image_size, in_channels, channels"):
        UNet.from_preset("debug", chanels=8)
    with pytest.raises(ValueError, match="network type None is unknown: use one of DiT, DiffusersNetwork, UNet"):
        build_network({"channels": 8})


def test_own_network_type_is_known_by_name() -> None:
    """A subclass defined by a user must be rebuilt from its config like ours, so that it can be saved and loaded."""

    class Flat(Network):
        def __init__(self, image_size: int, in_channels: int) -> None:
            super().__init__({"image_size": image_size, "in_channels": in_channels})

    try:
        assert type(build_network(Flat(4, 1).config)) is Flat
    finally:
        del Network.TYPES["Flat"]


def test_smaller_student_takes_what_matches() -> None:
    """A student of half the depth must start from the teacher's layers of the same name, and from nothing else."""
    teacher = tiny("UNet", blocks=2)
    student = UNet.from_preset("debug", blocks=1)
    fresh = {name: p.clone() for name, p in student.named_parameters()}
    copied = init_from(student, teacher)
    theirs = dict(teacher.named_parameters())
    assert {"conv_in.weight", "conditioning.classes.weight", "encoder.8x8_0.res.conv1.weight"} <= set(copied)
    assert "decoder.4x4_1.res.conv1.weight" not in copied  # its skip is narrower than the teacher's
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, theirs[name] if name in copied else fresh[name])
        assert parameter.requires_grad
    perturbed(student)
    assert not torch.equal(student.conv_in.weight, teacher.conv_in.weight)  # copied, not shared
    z, t, y = batch()
    assert torch.isfinite(student(z, t, y)).all()


def test_same_network_takes_everything() -> None:
    """Initialised from a network of its own kind, a student must be that network."""
    teacher, student = tiny("DiT"), DiT.from_preset("debug").eval()
    assert init_from(student, teacher) == [name for name, _ in student.named_parameters()]
    z, t, y = batch()
    assert torch.equal(student(z, t, y), teacher(z, t, y))


def test_nothing_in_common() -> None:
    """A student that silently starts from scratch costs a whole training run to notice."""
    with pytest.raises(ValueError, match="no parameter of the student"):
        init_from(torch.nn.Linear(3, 3), tiny("UNet"))
