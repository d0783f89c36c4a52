"""UNet: against diffusers with the same weights, against formulas written out here, and what its users rely on."""

import diffusers
import pytest
import torch
from model_helpers import batch, perturbed, tiny
from torch.nn import functional as F

from fewstep.models import UNet
from fewstep.models.interchange.twin import unet_settings, unet_weights
from fewstep.models.unet import Groups, ResBlock, SelfAttention


def test_equals_diffusers_with_the_same_weights() -> None:
    """Any difference in wiring, FiLM, attention, resampling, skips or embeddings from ADM's network would show."""
    shape = {"image_size": 16, "in_channels": 3, "out_channels": 4, "channels": 32, "channel_mult": (1, 2, 2)}
    shape |= {"blocks": 2, "attention": (8, 4), "head_dim": 16, "emb_channels": 48, "groups": 8, "num_classes": 5}
    unet = UNet(**shape)
    perturbed(unet)
    unet.double()
    z, time, y = torch.randn(3, 3, 16, 16).double(), torch.tensor([0.0, 321.5, 1000.0]), torch.tensor([0, 5, 3])
    with torch.no_grad():
        twin = diffusers.UNet2DModel(**unet_settings(unet))
        twin.load_state_dict(unet_weights(unet))  # strict, so that none is left out
        theirs = twin.double()(z, time, y).sample
        ours = unet(z, time, y)
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # their sines of 1000 f are float32


def expected_norm(x: torch.Tensor, norm: torch.nn.GroupNorm) -> torch.Tensor:
    """Group normalisation from its definition."""
    grouped = x.reshape(x.shape[0], norm.num_groups, -1)
    mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, keepdim=True, unbiased=False)
    normal = ((grouped - mean) / (var + norm.eps).sqrt()).reshape(x.shape)
    return normal * norm.weight[:, None, None] + norm.bias[:, None, None]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def expected_resample(x: torch.Tensor, direction: str) -> torch.Tensor:
    if direction == "down":
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2) if direction == "up" else x


@pytest.mark.parametrize(("resample", "out_channels"), [("", 12), ("", 8), ("down", 8), ("up", 8)])
def test_residual_block_formula(resample: str, out_channels: int) -> None:
    """h = norm(h) (1 + scale) + shift with the scale first, resampling before the first convolution and of the skip."""
    block = ResBlock(8, out_channels, 6, Groups(32, 4), dropout=0.0, resample=resample).double()
    perturbed(block, std=0.3)
    x, emb = torch.randn(2, 8, 4, 4).double().to(memory_format=torch.channels_last), torch.randn(2, 6).double()
    scale, shift = (emb @ block.film.weight.T + block.film.bias)[..., None, None].chunk(2, dim=1)
    h = F.conv2d(expected_resample(silu(expected_norm(x, block.norm1)), resample), block.conv1.weight,
                 block.conv1.bias, padding=1)  # fmt: skip
    h = F.conv2d(silu(expected_norm(h, block.norm2) * (1 + scale) + shift), block.conv2.weight, block.conv2.bias,
                 padding=1)  # fmt: skip
    skip = expected_resample(x, resample)
    if out_channels != 8:
        skip = torch.einsum("oc,bchw->bohw", block.skip.weight, skip) + block.skip.bias[:, None, None]
    torch.testing.assert_close(block(x, emb), (h, skip))


def test_attention_formula() -> None:
    """On a residual block's halves; softmax over pixels, scores scaled by the root of the head's width, heads of
    consecutive channels."""
    block = SelfAttention(12, 3, Groups(32, 4)).double()
    perturbed(block, std=0.3)
    x = torch.randn(2, 12, 3, 5).double().to(memory_format=torch.channels_last)
    h = expected_norm(x, block.norm)
    qkv = torch.einsum("oc,bchw->bohw", block.qkv.weight, h) + block.qkv.bias[:, None, None]
    q, k, v = qkv.flatten(2).chunk(3, 1)
    out = torch.cat([
        torch.einsum("bcm,blm->bcl", v_h, torch.softmax(torch.einsum("bcl,bcm->blm", q_h, k_h) / 2, -1))
        for q_h, k_h, v_h in zip(q.split(4, 1), k.split(4, 1), v.split(4, 1), strict=True)
    ], dim=1)  # fmt: skip
    out = torch.einsum("oc,bcl->bol", block.project.weight, out) + block.project.bias[:, None]
    branch = torch.randn_like(x)
    torch.testing.assert_close(block(branch, x - branch), x + out.unflatten(2, (3, 5)))


def test_starts_at_zero_and_at_the_identity() -> None:
    """Without zero initialisation of conv2, the projection and the last convolution training starts from noise."""
    unet = UNet.from_preset("debug")
    z, t, y = batch()
    assert torch.equal(unet(z, 1000 * t, y), torch.zeros_like(z))
    block = ResBlock(16, 16, 8, Groups(32, 4), dropout=0.0)
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    branch, skip = block(x, torch.randn(2, 8))
    assert torch.equal(branch, torch.zeros_like(x))
    assert torch.equal(skip, x)
    assert torch.equal(SelfAttention(16, 2, Groups(32, 4))(branch, x), x)


def test_dropout_only_in_training() -> None:
    """A teacher that still drops units while it gives targets would make them noisy."""
    unet = tiny("UNet", dropout=0.5)
    z, t, y = batch()
    with torch.no_grad():
        quiet = unet(z, t, y)
        assert torch.equal(quiet, unet(z, t, y))
        assert torch.equal(quiet, tiny("UNet")(z, t, y))
        assert not torch.allclose(quiet, unet.train()(z, t, y), atol=1e-3)


def test_convolutions_see_channels_last() -> None:
    """A convolution fed contiguous NCHW tensors is copied back and forth: half as fast on a CPU."""
    unet = tiny("UNet", channels=16, patch=1)
    fed: list[bool] = []

    def look(module: torch.nn.Conv2d, args: tuple[torch.Tensor]) -> None:
        fed.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (module.weight, args[0]))

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(look)
    z, t, y = batch()
    output = unet(z, t, y)
    assert len(fed) > 20
    assert all(fed)
    assert output.is_contiguous()


def test_patch_is_a_reshaped_image() -> None:
    """With patch 2 the network must be the one on half the side with four times the channels, pixel for pixel."""
    unet = tiny("UNet", patch=2, attention=())
    inner = UNet(**{k: v for k, v in unet.config.items() if k not in ("type", "guidance")}
                 | {"patch": 1, "image_size": 4, "in_channels": 4, "out_channels": 4})  # fmt: skip
    inner.load_state_dict(unet.state_dict())
    z, t, y = batch()
    cells = z.reshape(3, 4, 2, 4, 2).permute(0, 2, 4, 1, 3).reshape(3, 4, 4, 4)
    expected = inner.eval()(cells, t, y).reshape(3, 2, 2, 4, 4).permute(0, 3, 1, 4, 2).reshape(3, 1, 8, 8)
    torch.testing.assert_close(unet(z, t, y), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention": (5,)}, r"attention=\[5\].*the levels are \[8, 4\]"),
        ({"image_size": 9}, "9 positions per side do not halve"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"heads": 3}, "heads=3"),
        ({"patch": 3}, "patch=3 does not divide image_size=8"),
    ],
)
def test_sizes_that_do_not_fit(wrong: dict[str, object], message: str) -> None:
    """Otherwise they surface as a shape error deep inside the first forward pass, or as a network without attention."""
    with pytest.raises(ValueError, match=message):
        UNet.from_preset("debug", **wrong)
