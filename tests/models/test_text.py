"""Networks conditioned on text: what it adds, what padding must not, guidance, derivatives, storage."""

import copy
from pathlib import Path

import pytest
import torch
from model_helpers import TYPES, batch, perturbed, tiny
from torch import Tensor, nn

from fewstep.distill import GuidanceDistillation, guidance_target
from fewstep.models import (
    ByteTokenizer,
    GuidedDenoiser,
    NetworkDenoiser,
    TextEncoder,
    UNet,
    init_from,
    load,
    save,
    with_guidance_input,
)
from fewstep.models.cross_attention import CrossAttention
from fewstep.models.inputs import Text
from fewstep.schedules import Cosine

KINDS = pytest.mark.parametrize("kind", ["UNet", "DiT"])
WIDTH = 12
PROMPTS = ["a red circle", "", "a blue square left of it"]


def encoder() -> TextEncoder:
    torch.manual_seed(3)
    made = TextEncoder(ByteTokenizer(), width=WIDTH, depth=1, heads=2, length=26)
    perturbed(made, std=0.2)
    return made


def text(length: int = 5) -> dict[str, Tensor]:
    """Embeddings from some other encoder: rows of 5, 2 and 4 tokens that count."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(length) < torch.tensor([5, 2, 4])[:, None]
    return {"text": torch.randn(3, length, WIDTH, generator=generator), "text_mask": mask}


def denoiser(kind: str, **overrides: object) -> NetworkDenoiser:
    network = tiny(kind, num_classes=None, text_width=WIDTH, **overrides)
    return NetworkDenoiser(network, Cosine(), "v", text_encoder=encoder()).eval()


def test_cross_attention_is_torchs_with_padding() -> None:
    """Against nn.MultiheadAttention with the same weights: heads, scale, order of keys and values, masked keys."""
    torch.manual_seed(0)
    ours = CrossAttention(24, 3, WIDTH).double()
    perturbed(ours, std=0.3)
    theirs = nn.MultiheadAttention(24, 3, kdim=WIDTH, vdim=WIDTH, batch_first=True).double()
    (key, value), (key_bias, value_bias) = ours.key_value.weight.chunk(2), ours.key_value.bias.chunk(2)
    theirs.q_proj_weight.data, theirs.k_proj_weight.data, theirs.v_proj_weight.data = ours.query.weight, key, value
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, key_bias, value_bias])
    theirs.out_proj.load_state_dict(ours.project.state_dict())
    x, given = torch.randn(3, 7, 24).double(), text()
    tokens, mask = given["text"].double(), given["text_mask"]
    expected, _ = theirs(x, tokens, tokens, key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, Text(tokens, mask.sum(1))), expected, rtol=0, atol=1e-10)
    mean = torch.stack([row[:n].mean(0) for row, n in zip(tokens, (5, 2, 4), strict=True)])
    torch.testing.assert_close(Text(tokens, mask.sum(1)).mean(), mean)
    torch.testing.assert_close(Text(tokens, None).mean(), tokens.mean(1))


@KINDS
def test_text_adds_exactly_zero_at_first(kind: str) -> None:
    """A network that is given text later must start as what it was; and one without must have no weight for it."""
    plain = tiny(kind)
    network = TYPES[kind].from_preset("debug", text_width=WIDTH)
    assert init_from(network, plain) == [name for name, _ in plain.named_parameters()]
    added = network.state_dict().keys() - plain.state_dict().keys()
    assert added
    assert all(".text." in f".{name}" or ".cross." in name for name in added)
    z, t, y = batch()
    with torch.no_grad():
        assert torch.equal(network(z, 1000 * t, {"y": y, **text()}), plain(z, 1000 * t, y))


@KINDS
def test_every_token_counts_and_padding_does_not(kind: str) -> None:
    """A mask that is off by one reads noise, or never the last word; without one padding leaks in."""
    network = tiny(kind, num_classes=None, text_width=WIDTH).double()
    z, t, _ = batch(dtype=torch.float64)
    given = text()
    given["text"] = given["text"].double().requires_grad_()
    network(z, 1000 * t, given).square().sum().backward()
    moved = given["text"].grad.abs().amax(2)
    assert torch.equal(moved > 1e-9, given["text_mask"])
    with torch.no_grad():
        other = {**given, "text": torch.where(given["text_mask"][..., None], given["text"], 100.0)}
        assert torch.equal(network(z, 1000 * t, other), network(z, 1000 * t, given))
        alone = {"text": given["text"][1:2, :2]}  # no mask: everything counts
        torch.testing.assert_close(network(z[1:2], 1000 * t[1:2], alone), network(z, 1000 * t, given)[1:2])


@KINDS
def test_every_weight_is_reached(kind: str) -> None:
    """A text weight without gradient is a layer that is never trained."""
    network = tiny(kind, text_width=WIDTH)
    z, t, y = batch()
    network(z, 1000 * t, {"y": y, **text()}).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@KINDS
def test_derivative_along_the_weights(kind: str) -> None:
    """The jvp of instant moment matching, of the whole network with text, against central differences in float64."""
    network = perturbed(tiny(kind, text_width=WIDTH), seed=5, std=0.1).double()
    z, t, y = batch(dtype=torch.float64)
    cond = {"y": y, "text": text()["text"].double(), "text_mask": text()["text_mask"]}
    weights = {name: p.detach() for name, p in network.named_parameters()}
    generator = torch.Generator().manual_seed(4)
    along = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in weights.items()}

    def output(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network, parameters, (z, 1000 * t, cond))

    _, found = torch.func.jvp(output, (weights,), (along,))
    h = 1e-6
    ends = [output({n: p + sign * h * along[n] for n, p in weights.items()}) for sign in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-6)
    only_text = {n: v if ".cross." in n or ".text." in f".{n}" else torch.zeros_like(v) for n, v in along.items()}
    assert torch.func.jvp(output, (weights,), (only_text,))[1].abs().max() > 1e-3


@KINDS
def test_guidance_drops_the_prompt(kind: str) -> None:
    """Both ways to guide, against two evaluations: the null branch sees the empty prompt, other keys are kept."""
    teacher = denoiser(kind, inpainting=True)
    z, t, _ = batch()
    mask = torch.zeros(3, 1, 8, 8)
    mask[..., 4:] = 1
    kept = {"mask": mask, "masked_image": torch.rand(3, 1, 8, 8) * (1 - mask)}
    given = {**teacher.text_encoder.encode(PROMPTS), **kept}
    free = {**teacher.text_encoder.encode([""] * 3), **kept}
    with torch.no_grad():
        apart = 3.5 * teacher(z, t, given) - 2.5 * teacher(z, t, free)
        assert (apart - teacher(z, t, given)).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3
        for guided in (
            GuidedDenoiser(teacher, teacher.null_cond)(z, t, given, 2.5),
            guidance_target(teacher, teacher.null_cond, z, t, given, 2.5),
        ):
            torch.testing.assert_close(guided, apart, rtol=1e-4, atol=1e-4)
    assert set(teacher.null_cond) == {"text", "text_mask"}


@KINDS
def test_a_student_starts_as_the_conditional_branch(kind: str) -> None:
    """Stage one with text: bit for bit the teacher at every w, and its encoder goes along without being trained."""
    teacher = denoiser(kind)
    student = with_guidance_input(teacher)
    z, t, _ = batch()
    given = teacher.text_encoder.encode(PROMPTS)
    for w in (0.0, torch.tensor([0.0, 2.0, 14.0])):
        assert torch.equal(student(z, t, given, w), teacher(z, t, given))
    assert student.text_encoder is not teacher.text_encoder
    assert student.text_encoder.digest == teacher.text_encoder.digest
    method = GuidanceDistillation(teacher, student, teacher.null_cond)
    assert not any(p.requires_grad for p in student.text_encoder.parameters())
    trained = {id(p) for group in method.param_groups()["student"] for p in group["params"]}
    assert not trained & {id(p) for p in student.text_encoder.parameters()}
    loss, _ = method.loss(method.draw(z, given, torch.arange(3), 0), 0)
    assert torch.isfinite(loss)


@KINDS
def test_saved_with_its_encoder(kind: str, tmp_path: Path) -> None:
    """From the folder alone: the same image of the same prompt, bit for bit; another's encoder is refused."""
    made = with_guidance_input(denoiser(kind))
    save(made, tmp_path / "model")
    loaded = load(tmp_path / "model")
    z, t, _ = batch()
    with torch.no_grad():
        given, again = (one.text_encoder.encode(PROMPTS) for one in (made, loaded))
        assert torch.equal(loaded(z, t, again, 1.5), made(z, t, given, 1.5))
        assert torch.equal(loaded.null_cond["text"], made.null_cond["text"])
    TextEncoder(ByteTokenizer(), width=WIDTH, depth=1, heads=2, length=26).save(tmp_path / "model" / "text_encoder")
    with pytest.raises(ValueError, match="is not the text encoder that"):
        load(tmp_path / "model")
    save(made.use_text_encoder(None), tmp_path / "other")
    assert load(tmp_path / "other").text_encoder is None


def test_the_encoder_moves_along() -> None:
    """Left behind on another device or dtype, it would fail at the first prompt."""
    made = denoiser("DiT").double()
    assert made.text_encoder.encode(["a"])["text"].dtype == torch.float64
    assert made.to("meta").text_encoder.positions.device.type == "meta"
    assert copy.deepcopy(denoiser("DiT")).text_encoder.digest == denoiser("DiT").text_encoder.digest


def test_embeddings_from_elsewhere() -> None:
    """CLIP's or T5's: any dict of that form, half precision too; what stands for no text is then the user's to say."""
    plain = NetworkDenoiser(tiny("UNet", num_classes=None, text_width=WIDTH), Cosine(), "v")
    z, t, _ = batch()
    given = {name: value.half() if name == "text" else value.long() for name, value in text().items()}
    null = {"text": torch.zeros(5, WIDTH), "text_mask": torch.tensor([1, 0, 0, 0, 0])}
    assert torch.isfinite(GuidedDenoiser(plain, null)(z, t, given, 2.0)).all()
    with pytest.raises(ValueError, match="has no text_encoder: give null_cond"):
        plain.null_cond  # noqa: B018 - looking at it raises


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, r"cond must be a dict with key 'text' of shape \(3, tokens, 12\)"),
        ({"text": torch.zeros(3, 5, 8)}, r"\(3, tokens, 12\).* got a tensor of shape \(3, 5, 8\)"),
        ({"text": torch.zeros(2, 5, 12)}, r"got a tensor of shape \(2, 5, 12\)"),
        ({"text_mask": torch.ones(3, 4)}, r"text_mask must have shape \(3, 5\)"),
        ({"text_mask": torch.tensor([[0, 0, 1, 1, 1]] * 3)}, "pad prompts on the right"),
        ({"text_mask": torch.tensor([[1, 0, 1, 1, 1]] * 3)}, "pad prompts on the right"),
    ],
)
def test_bad_input(change: dict[str, Tensor | None], message: str) -> None:
    """Named, before a product complains of sizes; a mask that is not a prefix would silently mask other words."""
    z, t, _ = batch()
    with pytest.raises(ValueError, match=message):
        tiny("UNet", num_classes=None, text_width=WIDTH)(z, 1000 * t, {**text(), **change})
    with pytest.raises(ValueError, match="this network takes no text"):
        UNet.from_preset("debug")(z, 1000 * t, {"y": torch.zeros(3, dtype=torch.int64), **text()})
