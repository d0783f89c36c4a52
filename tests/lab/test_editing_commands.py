"""`fewstep edit`, `inpaint` and `transfer`: what they write, and what they refuse before they compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import small_dit
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.lab.cli import main
from fewstep.models import (
    ByteTokenizer,
    GuidedDenoiser,
    NetworkDenoiser,
    TextEncoder,
    load,
    save,
    with_guidance_input,
)
from fewstep.samplers import edit, inpaint, stochastic, transfer
from fewstep.schedules import Cosine, Trained, sample_seeds, seeded_noise
from fewstep.schedules.denoiser import TrainedKind

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, students of 4 steps of three kinds, five images as tensors and as PNGs, a mask; weights are random."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    teacher = NetworkDenoiser(small_dit(), Cosine(), "v", trained=Trained("teacher"))
    save(teacher, root / "teacher")
    student = with_guidance_input(teacher, w_range=(0.0, 2.0))
    for kind in ("deterministic", "stochastic", "encoder"):
        with torch.no_grad():  # a fresh w path is zero, and kinds must differ
            for weight in student.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        student.trained = Trained(kind, 4, (0.0, 2.0))  # type: ignore[arg-type]  # one of the kinds
        save(student, root / kind)
    save(NetworkDenoiser(small_dit(num_classes=None), Cosine(), "v"), root / "unconditional")
    for name, inpainting in (("prompted", False), ("masked", True)):
        save(prompted(inpainting), root / name)
    save(prompted(inpainting=False, kind="encoder"), root / "prompted_encoder")
    levels = torch.randint(0, 256, (5, *SHAPE), generator=torch.Generator().manual_seed(1))
    save_file({"images": levels / 127.5 - 1, "classes": torch.arange(5)}, root / "images.safetensors")
    save_file({"images": levels / 127.5 - 1}, root / "unlabelled.safetensors")
    save_file({"pixels": levels}, root / "other.safetensors")
    save_file({"images": torch.zeros(2, 1, 16, 16)}, root / "large.safetensors")
    (root / "pngs").mkdir()
    for i, image in enumerate(levels):
        Image.fromarray(image[0].numpy().astype(np.uint8)).save(root / "pngs" / f"{i}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 5:] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(mask // 2).save(root / "grey.png")
    Image.fromarray(mask[:4]).save(root / "half.png")
    (root / "empty").mkdir()
    return root


def prompted(inpainting: bool, kind: TrainedKind = "deterministic") -> NetworkDenoiser:
    """A student of 4 steps that takes prompts of at most 11 bytes and, if asked to, masks."""
    network = small_dit(num_classes=None, text_width=8, inpainting=inpainting)
    encoder = TextEncoder(ByteTokenizer(), 8, 1, 2, length=12)
    teacher = NetworkDenoiser(network, Cosine(), "v", text_encoder=encoder)
    student = with_guidance_input(teacher, w_range=(0.0, 2.0))
    student.trained = Trained(kind, 4, (0.0, 2.0))
    return student


def run(command: str, files: Path, out: Path, *options: str) -> int:
    named = [str(files / word[1:]) if word.startswith("@") else word for word in options]
    return main([command, *named, "--out", str(out), "--device", "cpu"])


def given(files: Path) -> Tensor:
    return load_file(files / "images.safetensors")["images"]


def noise(seed: int = 0) -> Tensor:
    return seeded_noise(sample_seeds(seed, 0, torch.arange(5)), SHAPE)


@pytest.mark.parametrize("source", ["@images.safetensors", "@pngs"])
def test_edit_is_the_samplers(files: Path, tmp_path: Path, source: str) -> None:
    """Images, classes in turn, noise and strength as said: a person must be able to make the same in a notebook."""
    options = ["--strength", "0.5", "--classes", "7,2", "--w", "1", "--seed", "3"]
    assert run("edit", files, tmp_path, "--model", "@deterministic", "--input", source, *options) == 0
    found = load_file(tmp_path / "samples.safetensors")
    classes = torch.tensor([7, 2, 7, 2, 7])
    expected = edit(load(files / "deterministic"), given(files), noise(3), 4, 0.5, classes, 1.0).clamp(-1, 1)
    torch.testing.assert_close(found["images"], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["inputs"], given(files), atol=1e-6, rtol=0)
    assert found["classes"].tolist() == classes.tolist()
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (5 * 52 + 4, 2 * 52 + 4)  # images above, results below


def test_a_stochastic_student_is_sampled_as_one(files: Path, tmp_path: Path) -> None:
    """ddim on it looks plausible and is wrong."""
    options = ["--strength", "1", "--classes", "1", "--w", "1"]
    assert run("edit", files, tmp_path, "--model", "@stochastic", "--input", "@pngs", *options, "--strict") == 0
    seeds = sample_seeds(0, 0, torch.arange(5))
    expected = edit(
        load(files / "stochastic"), given(files), noise(), 4, 1.0, torch.ones(5, dtype=torch.long), 1.0,
        sampler=stochastic, seeds=seeds,
    )  # fmt: skip
    found = load_file(tmp_path / "samples.safetensors")["images"]
    torch.testing.assert_close(found, expected.clamp(-1, 1), atol=1e-4, rtol=0)


def test_prompts_are_what_images_become(files: Path, tmp_path: Path) -> None:
    """Taken in turn, those of the file last; what is too long is cut, and said."""
    (tmp_path / "more.txt").write_text("blue\n")
    options = ["--prompt", "red", "--prompts", str(tmp_path / "more.txt"), "--w", "1", "--seed", "3"]
    arguments = ["--model", "@prompted", "--input", "@images.safetensors", "--strength", "0.5", *options]
    assert run("edit", files, tmp_path, *arguments) == 0
    found, model = load_file(tmp_path / "samples.safetensors"), load(files / "prompted")
    assert model.text_encoder is not None
    text = model.text_encoder.encode(["red", "blue", "red", "blue", "red"])
    expected = edit(model, given(files), noise(3), 4, 0.5, text, 1.0).clamp(-1, 1)
    torch.testing.assert_close(found["images"], expected, atol=1e-4, rtol=0)
    assert "classes" not in found


def test_a_long_prompt_is_cut_and_said(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words that never reached the model must not look as if it had ignored them."""
    arguments = ["--model", "@prompted", "--input", "@images.safetensors", "--prompt", "a red triangle"]
    assert run("edit", files, tmp_path, *arguments, "--strength", "0.5") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: prompt 'a red triangle' has 14 tokens, more than the 11" in said
    assert "'gle' was cut off" in said


def test_a_model_trained_with_masks_is_given_them(files: Path, tmp_path: Path) -> None:
    """By inpaint the mask, by edit one that hides everything: such a model cannot be called without."""
    model = load(files / "masked")
    assert model.text_encoder is not None
    text = model.text_encoder.encode(["red"] * 5)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 5:] = 1
    arguments = ["--model", "@masked", "--input", "@images.safetensors", "--prompt", "red", "--w", "1"]
    assert run("inpaint", files, tmp_path, *arguments, "--mask", "@mask.png") == 0
    found = load_file(tmp_path / "samples.safetensors")["images"]
    expected = inpaint(model, given(files), noise(), 4, 1.0, text, 1.0, mask=mask).clamp(-1, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert torch.equal(found[..., :5], given(files)[..., :5])
    assert run("edit", files, tmp_path, *arguments, "--strength", "0.5") == 0
    hidden = {**text, "mask": torch.ones(5, 1, 8, 8), "masked_image": torch.zeros(5, *SHAPE)}
    expected = edit(model, given(files), noise(), 4, 0.5, hidden, 1.0).clamp(-1, 1)
    torch.testing.assert_close(load_file(tmp_path / "samples.safetensors")["images"], expected, atol=1e-4, rtol=0)


def test_inpaint_keeps_what_the_mask_keeps(files: Path, tmp_path: Path) -> None:
    """White is painted, black comes back bit for bit, in the tensors and in the levels of the picture."""
    options = ["--mask", "@mask.png", "--classes", "4", "--w", "1"]
    assert run("inpaint", files, tmp_path, "--model", "@deterministic", "--input", "@images.safetensors", *options) == 0
    found, x = load_file(tmp_path / "samples.safetensors")["images"], given(files)
    assert torch.equal(found[..., :5], x[..., :5])
    assert (found[..., 5:] - x[..., 5:]).abs().max() > 0.05
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 5:] = 1
    classes = torch.full((5,), 4)
    expected = inpaint(load(files / "deterministic"), x, noise(), 4, 1.0, classes, 1.0, mask=mask).clamp(-1, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_transfer_goes_from_the_images_classes_to_those_asked_for(files: Path, tmp_path: Path) -> None:
    """From the file's own classes unless --from says others; by the encoder there and by the decoder back."""
    models = ["--encoder", "@encoder", "--decoder", "@deterministic", "--w", "1", "--to", "8", "--strict"]
    x, target, pair = given(files), torch.full((5,), 8), (load(files / "encoder"), load(files / "deterministic"))
    for more, source in (([], torch.arange(5)), (["--from", "9,0"], torch.tensor([9, 0, 9, 0, 9]))):
        assert run("transfer", files, tmp_path, "--input", "@images.safetensors", *models, *more) == 0
        found = load_file(tmp_path / "samples.safetensors")["images"]
        expected = transfer(*pair, x, 4, source, target, 1.0).clamp(-1, 1)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_transfer_goes_from_one_text_to_another(files: Path, tmp_path: Path) -> None:
    """In turn, each read by the encoder of the model that is told it; dropped or exchanged, nothing is transferred."""
    models = ["--encoder", "@prompted_encoder", "--decoder", "@prompted", "--w", "1", "--strict"]
    words = ["--from-prompt", "red", "--from-prompt", "blue", "--to-prompt", "green"]
    assert run("transfer", files, tmp_path, "--input", "@images.safetensors", *models, *words) == 0
    found = load_file(tmp_path / "samples.safetensors")
    pair = load(files / "prompted_encoder"), load(files / "prompted")
    texts = ["red", "blue", "red", "blue", "red"], ["green"] * 5
    own, other = (model.text_encoder.encode(said) for model, said in zip(pair, texts, strict=True))
    expected = transfer(*pair, given(files), 4, own, other, 1.0).clamp(-1, 1)
    torch.testing.assert_close(found["images"], expected, atol=1e-3, rtol=0)
    assert (transfer(*pair, given(files), 4, own, own, 1.0).clamp(-1, 1) - expected).abs().max() > 0.01
    assert "classes" not in found


def test_a_model_trained_with_masks_transfers_as_a_generator(files: Path, tmp_path: Path) -> None:
    """As `edit` and `sample` take it: all is hidden."""
    models = ["--encoder", "@prompted_encoder", "--decoder", "@masked", "--from-prompt", "red", "--to-prompt", "blue"]
    assert run("transfer", files, tmp_path, "--input", "@images.safetensors", *models, "--w", "1") == 0
    pair = load(files / "prompted_encoder"), load(files / "masked")
    own, other = (model.text_encoder.encode([said] * 5) for model, said in zip(pair, ("red", "blue"), strict=True))
    other |= {"mask": torch.ones(5, 1, 8, 8), "masked_image": torch.zeros(5, *SHAPE)}
    expected = transfer(*pair, given(files), 4, own, other, 1.0).clamp(-1, 1)
    found = load_file(tmp_path / "samples.safetensors")["images"]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_a_teacher_can_stand_on_both_sides(files: Path, tmp_path: Path) -> None:
    """Undistilled DDIB, guided with its own null class: what distilled pairs are compared with."""
    models = ["--encoder", "@teacher", "--decoder", "@teacher", "--w", "2", "--steps", "3"]
    assert run("transfer", files, tmp_path, "--input", "@images.safetensors", "--to", "1", *models) == 0
    teacher = load(files / "teacher")
    guided = GuidedDenoiser(teacher, teacher.null_cond)
    classes = torch.arange(5), torch.ones(5, dtype=torch.long)
    expected = transfer(guided, guided, given(files), 3, *classes, 2.0).clamp(-1, 1)
    torch.testing.assert_close(load_file(tmp_path / "samples.safetensors")["images"], expected, atol=1e-3, rtol=0)


EDIT = ["--model", "@deterministic", "--input", "@images.safetensors", "--classes", "1"]
TEXT = ["--model", "@prompted", "--input", "@images.safetensors", "--strength", "0.5"]
PAIR = ["--encoder", "@encoder", "--decoder", "@deterministic", "--to", "1"]
SAID = ["--encoder", "@prompted_encoder", "--decoder", "@prompted", "--input", "@images.safetensors"]


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("edit", [*EDIT, "--strength", "1.5"], "strength = 1.5: must lie in [0, 1]"),
        ("edit", [*EDIT, "--strength", "0.2"], "strength = 0.2 of 4 steps leaves no whole step: must be at least 1/4"),
        ("edit", [*EDIT, "--strength", "0.5", "--steps", "8"], "--steps 8: must be 4 or left out"),
        ("edit", [*EDIT, "--strength", "0.5", "--classes", "10"], "this model has no class 10"),
        ("edit", [*EDIT, "--strength", "0.5", "--w", "-1"], "--w -1.0: must be 0 (no guidance) or more"),
        ("edit", [*EDIT, "--strength", "0.5", "--w", "3", "--strict"], "[0, 2]"),
        ("edit", [*EDIT, "--strength", "0.5", "--model", "@encoder", "--strict"], "trained as 'encoder'"),
        ("edit", [*EDIT, "--strength", "0.5", "--input", "@large.safetensors"], "(1, 8, 8), not (1, 16, 16)"),
        ("edit", [*EDIT, "--strength", "0.5", "--input", "@other.safetensors"], "holds no images"),
        ("edit", [*EDIT, "--strength", "0.5", "--input", "@empty"], "must be a PNG, a folder with some"),
        ("edit", [*EDIT, "--strength", "0.5", "--input", "@nowhere.png"], "no picture that can be read"),
        (
            "edit",
            [*EDIT, "--strength", "0.5", "--prompt", "red"],
            "--prompt: must be left out: this model takes no text",
        ),
        ("edit", TEXT, "--prompt: must be given, or --prompts FILE: this model takes text"),
        ("edit", [*TEXT, "--prompt", "red", "--classes", "1"], "--classes 1: must be left out"),
        ("edit", [*TEXT, "--prompts", "nowhere.txt"], "--prompts nowhere.txt: must be a file of one prompt per line"),
        ("edit", [*TEXT, "--prompt", "red", "--negative-prompt", "blue"], "guidance leads away from the empty prompt"),
        ("inpaint", [*TEXT, "--prompt", "red", "--mask", "@half.png"], "mask has shape (1, 1, 4, 8)"),
        ("inpaint", [*EDIT, "--mask", "@grey.png"], "mask is not binary"),
        ("inpaint", [*EDIT, "--mask", "@half.png"], "mask has shape (1, 1, 4, 8)"),
        ("inpaint", [*EDIT, "--mask", "@images.safetensors"], "no picture that can be read"),
        ("transfer", [*PAIR, "--input", "@unlabelled.safetensors"], "--from: needed"),
        ("transfer", [*PAIR, "--input", "@images.safetensors", "--from", "12"], "this model has no class 12"),
        ("transfer", [*PAIR, "--input", "@images.safetensors", "--encoder", "@stochastic"], "must be an encoder"),
        ("transfer", [*PAIR, "--input", "@images.safetensors", "--decoder", "@teacher"], "--steps: "),
        ("transfer", [*PAIR, "--input", "@images.safetensors", "--decoder", "@teacher", "--steps", "8"],
         "encoder: must be of 8 steps, as many as are taken, not 4"),
        ("transfer", [*PAIR, "--input", "@images.safetensors", "--to-prompt", "red"], "--to-prompt: must be left out"),
        ("transfer", [*SAID, "--to-prompt", "red"], "--from-prompt: must be given: this model takes text"),
        ("transfer", [*SAID, "--from-prompt", "red"], "--to-prompt: must be given: this model takes text"),
        ("transfer", [*SAID, "--from-prompt", "red", "--to-prompt", "blue", "--from", "1"], "--from 1: must be left"),
    ],
)
def test_refusals(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, options: list[str], said: str
) -> None:
    """One line on stderr that names the value and what would be right, exit code 2, and nothing written."""
    out = tmp_path / "out"
    assert run(command, files, out, *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()
