"""DiT: against diffusers with the same weights, adaLN-Zero at the start, and patches."""

import diffusers
import pytest
import torch
from model_helpers import batch, perturbed
from torch import nn

from fewstep.models import DiT
from fewstep.models.dit import DiTBlock, patchify, sincos_positions, unpatchify


def rows_per_pixel_first(weight: torch.Tensor, patch: int) -> torch.Tensor:
    """Rows (channel, pixel) of our last layer in diffusers' order (pixel, channel)."""
    return weight.unflatten(0, (-1, patch * patch)).transpose(0, 1).flatten(0, 1)


def as_diffusers(dit: DiT) -> dict[str, torch.Tensor]:
    """The DiT's weights under diffusers' names; every block there has its own copy of the embeddings."""
    ours, width, patch = dit.state_dict(), dit.config["width"], dit.patch
    time_in = ours["conditioning.time_in.weight"].roll(128, dims=1)  # there [cos | sin]
    weights = {
        "pos_embed.proj.weight": ours["patch_in.weight"].reshape(width, -1, patch, patch),
        "pos_embed.proj.bias": ours["patch_in.bias"],
        "pos_embed.pos_embed": ours["positions"][None],
        "proj_out_2.weight": rows_per_pixel_first(ours["patch_out.weight"], patch),
        "proj_out_2.bias": rows_per_pixel_first(ours["patch_out.bias"], patch),
    }
    for kind in ("weight", "bias"):
        weights[f"proj_out_1.{kind}"] = ours[f"modulation_out.{kind}"]
    for i in range(dit.config["depth"]):
        theirs, mine = f"transformer_blocks.{i}", f"blocks.{i}"
        weights |= {
            f"{theirs}.norm1.emb.timestep_embedder.linear_1.weight": time_in,
            f"{theirs}.norm1.emb.timestep_embedder.linear_1.bias": ours["conditioning.time_in.bias"],
            f"{theirs}.norm1.emb.class_embedder.embedding_table.weight": ours["conditioning.classes.weight"],
        }
        for kind in ("weight", "bias"):
            q, k, v = ours[f"{mine}.qkv.{kind}"].chunk(3)
            weights |= {
                f"{theirs}.attn1.to_q.{kind}": q,
                f"{theirs}.attn1.to_k.{kind}": k,
                f"{theirs}.attn1.to_v.{kind}": v,
                f"{theirs}.norm1.emb.timestep_embedder.linear_2.{kind}": ours[f"conditioning.time_out.{kind}"],
                f"{theirs}.norm1.linear.{kind}": ours[f"{mine}.modulation.{kind}"],
                f"{theirs}.attn1.to_out.0.{kind}": ours[f"{mine}.project.{kind}"],
                f"{theirs}.ff.net.0.proj.{kind}": ours[f"{mine}.mlp_in.{kind}"],
                f"{theirs}.ff.net.2.{kind}": ours[f"{mine}.mlp_out.{kind}"],
            }
    return weights


def test_equals_diffusers_with_the_same_weights() -> None:
    """Any difference in modulation, gates, attention, MLP or the order of patches from the published DiT would show."""
    dit = DiT(8, 3, 2, 24, 2, 3, out_channels=6, num_classes=5)
    perturbed(dit, std=0.1)
    dit.double().eval()
    twin = diffusers.DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-6, activation_fn="gelu-approximate",
    ).double().eval()  # fmt: skip
    missing, unexpected = twin.load_state_dict(as_diffusers(dit), strict=False)
    assert (missing, unexpected) in [([], []), ([], ["pos_embed.pos_embed"])]
    twin.pos_embed.pos_embed = dit.positions[None]
    z, time, y = torch.randn(3, 3, 8, 8).double(), torch.tensor([0.0, 321.5, 1000.0]), torch.tensor([0, 5, 3])
    with torch.no_grad():
        theirs, ours = twin(z, time, y).sample, dit(z, time, y)
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # their sines of 1000 f are float32


def test_starts_at_zero_and_at_the_identity() -> None:
    """adaLN-Zero: a fresh block must pass its tokens through whatever the embedding says, a fresh DiT must say zero."""
    block, x = DiTBlock(24, 3, 48, dropout=0.0), torch.randn(2, 5, 24)
    assert torch.equal(block(x, torch.randn(2, 24)), x)
    z, t, y = batch()
    assert torch.equal(DiT.from_preset("debug")(z, 1000 * t, y), torch.zeros_like(z))


def test_patches_go_back_to_where_they_were() -> None:
    """Swapped rows and columns would scramble every image."""
    z = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    assert torch.equal(unpatchify(patchify(z, 2), 2, 4), z)
    assert torch.equal(patchify(z, 2)[0, 5], z[0, :, 2:4, 2:4].flatten())  # token 5 of a 4 x 4 grid: row 1, column 1


def test_positions_tell_row_and_column() -> None:
    """Tokens that share a position embedding cannot be told apart: a transformer sees a set."""
    positions = sincos_positions(5, 32)
    distances = torch.cdist(positions, positions) + torch.eye(25)
    assert distances.min() > 0.5
    row, column = positions.reshape(5, 5, 2, 16).unbind(2)
    assert torch.equal(row, row[:, :1].expand_as(row))
    assert torch.equal(column, column[:1].expand_as(column))


def test_dropout_only_in_training() -> None:
    """A teacher that still drops units while it gives targets would make them noisy."""
    dit = DiT.from_preset("debug", dropout=0.5)
    perturbed(dit)
    z, t, y = batch()
    assert torch.equal(dit.eval()(z, t, y), dit(z, t, y))
    assert not torch.allclose(dit(z, t, y), dit.train()(z, t, y), atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"patch": 3}, "patch=3 does not divide image_size=8"), ({"heads": 5}, "width=32 must be a multiple of 4")],
)
def test_sizes_that_do_not_fit(wrong: dict[str, int], message: str) -> None:
    """Otherwise they surface as a shape error deep inside the first forward pass."""
    with pytest.raises(ValueError, match=message):
        DiT.from_preset("debug", **wrong)


def test_embedding_layers_are_not_frozen_buffers() -> None:
    """Positions are fixed; everything else must be a parameter, or the optimiser never sees it."""
    dit = DiT.from_preset("debug")
    assert [name for name, _ in dit.named_buffers()] == ["positions"]
    assert all(isinstance(p, nn.Parameter) for p in dit.parameters())
