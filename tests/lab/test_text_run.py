"""Text to image from captions to the grid: the encoder's way through a run, prompts on the command line, alignment."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_configs import EXPERIMENTS
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fewstep.distill import DenoiserTraining, GuidanceDistillation
from fewstep.lab.captioned import shapes_split
from fewstep.lab.cli import main
from fewstep.lab.compose import compose
from fewstep.lab.config import ConfigError, TextConfig
from fewstep.lab.data import Split, load_data
from fewstep.lab.evaluation.alignment import alignment
from fewstep.lab.evaluation.plan import Draw
from fewstep.lab.metrics import wilson
from fewstep.lab.networks import build_denoiser
from fewstep.lab.report.grid import markdown
from fewstep.lab.sampling import SampleSpec
from fewstep.lab.shapes import World, parse, read, score
from fewstep.lab.targets import training_of
from fewstep.lab.text import Prompted, TextSplit, conditioned, for_method, new_encoder
from fewstep.lab.thumbnails import ThumbnailRegression, Thumbnails
from fewstep.models import Autoencoder, NetworkDenoiser, TextEncoder, load, with_guidance_input
from fewstep.samplers import ddim
from fewstep.schedules import sample_seeds, seeded_noise

SHAPES_TEXT = EXPERIMENTS / "shapes_text"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "shapes_text"
    assert main(["evaluate", str(SHAPES_TEXT), "preset=debug", f"out={out}", "--grid"]) == 0
    return out


def test_a_text_encoder_learns_what_pictures_look_like_on_average() -> None:
    """From the order of words alone: two captions of the same words, each of many pictures whose means are known."""
    torch.manual_seed(0)
    captions = ["red left of blue", "blue left of red"]
    means = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(2, 1, 1, 2)
    encoder = new_encoder(TextConfig("bytes", 300, 20, 16, 2, 2), captions)
    method = ThumbnailRegression(Thumbnails(encoder, 2, 1))
    optimizer = torch.optim.Adam(method.param_groups()["thumbnails"], lr=3e-3)
    cond = encoder.tokenize(captions * 16)
    for step in range(250):
        pictures = (means.repeat(16, 1, 4, 1) + torch.randn(32, 1, 4, 2)).repeat_interleave(2, dim=3)
        loss, _ = method.loss(method.draw(pictures, cond, torch.arange(32), step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        made = method.networks["thumbnails"](*(cond[name][:2] for name in ("tokens", "text_mask")))
    torch.testing.assert_close(made, means.expand(-1, -1, 2, -1), atol=0.2, rtol=0)


def test_a_teacher_goes_on_with_the_encoder_that_its_stage_made(run: Path) -> None:
    """Beginning anew would lose what it learned; the encoder is then the teacher's own, which goes on learning."""
    config = compose(SHAPES_TEXT, ["preset=debug", f"out={run}"])
    begun = TextEncoder.load(run / "text_encoder/model")
    folder = run.parent / "again"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("teacher", "guide", "halve", "grid"))
    config.out = str(folder)
    method, _ = training_of(config, "teacher", Console(quiet=True))
    (trained,) = method.networks.values()
    assert isinstance(trained, Prompted)
    assert trained.encoder.digest == begun.digest
    saved = load(run / "teacher/model").text_encoder
    assert saved is not None
    assert saved.digest != begun.digest


@pytest.fixture(scope="module")
def prompted() -> Prompted:
    """A denoiser and an encoder with weights everywhere."""
    config = compose(SHAPES_TEXT, ["preset=debug"])
    torch.manual_seed(0)
    captions = load_data(config.data).train.captions
    assert config.text is not None
    assert captions is not None
    made = Prompted(build_denoiser(config, config.network), new_encoder(config.text, captions))
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return made.eval()


def latents(count: int) -> Tensor:
    """Stand for an autoencoder's."""
    return seeded_noise(sample_seeds(0, 0, torch.arange(count)), (4, 8, 8))


@pytest.mark.slow
def test_the_encoder_learns_with_the_teacher_and_is_frozen_after(run: Path) -> None:
    """A student that trains its own encoder, or is saved without one, answers other prompts than its teacher."""
    found = [load(run / name / "model") for name in ("teacher", "guide", "halve/steps_2", "halve/steps_1")]
    encoders = [denoiser.text_encoder for denoiser in found]
    assert len({encoder.digest for encoder in encoders}) == 1
    captions = load_data(compose(SHAPES_TEXT, ["preset=debug"]).data).train.captions
    fresh = new_encoder(TextConfig("bpe", 300, 40, 16, 1, 2), captions)
    assert fresh.tokenizer.to_config() == encoders[0].tokenizer.to_config()
    assert encoders[0].norm_out.weight.sub(1).abs().max() > 1e-4  # it starts at 1 everywhere


@pytest.mark.slow
def test_round_trips_of_the_autoencoder_are_read(run: Path) -> None:
    """What latents lose no sampler gives back: the checker's share of captions after a round trip bounds all others."""
    found = json.loads((run / "autoencoder" / "reconstruction.json").read_text())
    data = load_data(compose(SHAPES_TEXT, ["preset=debug"]).data)
    autoencoder = Autoencoder.load(run / "autoencoder" / "model")
    with torch.no_grad():
        made = autoencoder.decode(autoencoder.encode(data.heldout.images).mean).clamp(-1, 1)
    expected = [score(parse(text), things).all for text, things in zip(data.heldout.captions, read(made), strict=True)]
    assert found["alignment"]["all"]["trials"] == len(expected) == 24
    assert found["alignment"]["all"]["share"] == sum(expected) / 24
    assert found["rmse"]["heldout"] == pytest.approx(float((made - data.heldout.images).square().mean().sqrt()))


@pytest.mark.slow
def test_the_grid_says_how_many_captions_hold(run: Path) -> None:
    """For every cell, of seen and of unseen combinations, with intervals; class accuracy has no place there."""
    results: dict[str, Any] = json.loads((run / "grid" / "results.json").read_text())
    assert results["features"].startswith("shape-classifier")
    for row in results["rows"]:
        assert row["alignment"]["all"]["trials"] == 24
        assert (row["unseen"] is None) == (row["kind"] in ("truth", "undistilled"))
        assert row["unseen"] is None or row["unseen"]["all"]["trials"] == 12
        share = row["alignment"]["all"]
        assert 0 <= share["low"] <= share["share"] <= share["high"] <= 1
        assert set(row["mean"]) == {"fid_heldout", "is"}
    text = markdown(results)
    assert "**captions of unseen combinations that hold**" in text
    assert "class accuracy" not in text
    assert results["decoding_images_per_second"] > 0
    assert "(and decoding)**" in text
    assert "The teacher by 6 steps of DDIM, w = 2: FID to held-out" in text


@pytest.mark.slow
def test_prompts_on_the_command_line(run: Path, tmp_path: Path) -> None:
    """Taken in turn, those of the file last, as a person would make them in a notebook from the model's folder."""
    model = run / "halve" / "steps_2" / "model"
    (tmp_path / "prompts.txt").write_text("a small green square\n\n")
    options = ["--prompt", "a large red circle", "--prompts", str(tmp_path / "prompts.txt"), "--w", "2", "--num", "4"]
    out = tmp_path / "out"
    assert main(["sample", "--model", str(model), "--out", str(out), "--device", "cpu", *options]) == 0
    prompts = ["a large red circle", "a small green square", "", "a large red circle"]
    student, autoencoder = load(model), Autoencoder.load(model / "autoencoder")
    noise = seeded_noise(sample_seeds(0, 0, torch.arange(4)), autoencoder.latent_shape)
    with torch.no_grad():
        latents = ddim(student, noise, 2, student.text_encoder.encode(prompts), 2.0)
        expected = autoencoder.decode(latents).clamp(-1, 1)
    torch.testing.assert_close(load_file(out / "samples.safetensors")["images"], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--prompt: must be given, or --prompts FILE: this model takes text"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: must be a file of one prompt per line"),
        (["--prompt", "a red circle", "--classes", "3"], "--classes 3: must be left out"),
    ],
)
def test_prompts_that_cannot_be(
    options: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line before anything is computed."""
    arguments = ["sample", "--model", str(run / "halve/steps_2/model"), "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_teacher_drops_to_the_condition_that_guidance_uses(prompted: Prompted) -> None:
    """The empty prompt in training (tokens) and after (embeddings) must be one thing, and every caption its own."""
    config = compose(SHAPES_TEXT, ["preset=debug"])
    method = DenoiserTraining(prompted, prompted.null_cond, cond_drop=0.5)
    split = for_method(load_data(config.data).train, method)
    indices = torch.arange(16)
    _, tokens = split.take(indices)
    batch = method.draw(latents(16), tokens, indices, 0)
    ends = (batch.cond["tokens"] == prompted.null_cond["tokens"]).all(1)
    assert 2 < ends.sum() < 14
    denoiser = NetworkDenoiser(prompted.denoiser.network, prompted.schedule, "v", text_encoder=prompted.encoder)
    captions = ["" if end else split.captions[i] for i, end in enumerate(ends.tolist())]
    with torch.no_grad():
        expected = denoiser(batch.z, batch.t, prompted.encoder.encode(captions))
        torch.testing.assert_close(prompted(batch.z, batch.t, batch.cond), expected)
        assert torch.equal(denoiser.null_cond["text"], prompted.encoder.encode([""])["text"][0])
        frozen = conditioned(load_data(config.data).train, denoiser)
        picked = torch.tensor([7, 3, 11])
        _, cond = frozen.take(picked)
        again = prompted.encoder.encode([split.captions[i] for i in picked.tolist()])
        torch.testing.assert_close(cond["text"], again["text"])
        assert torch.equal(cond["text_mask"], again["text_mask"])
    student = with_guidance_input(denoiser)
    stage_one = GuidanceDistillation(denoiser, student, denoiser.null_cond)
    assert isinstance(for_method(load_data(config.data).train, stage_one), TextSplit)
    prompted.requires_grad_(True)


def test_captions_are_embedded_once(prompted: Prompted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each different one, by the encoder as it is now; a neighbour's, or another encoder's, is another condition."""
    own = copy.deepcopy(prompted.encoder)
    denoiser = NetworkDenoiser(prompted.denoiser.network, prompted.schedule, "v", text_encoder=own)
    words = ("a red circle", "a blue square", "a red circle", "a green square above a red circle")
    split = Split(torch.zeros(300, 3, 4, 4), torch.zeros(300), tuple(words[i % 4] for i in range(300)))
    indices, seen = torch.tensor([298, 1, 4, 3]), []
    own.register_forward_hook(lambda module, given, made: seen.append(len(made)))
    for memory in (2**31, 0):  # 0: too little for them, so batch by batch
        monkeypatch.setattr("fewstep.lab.text.MEMORY", memory)
        with torch.no_grad():
            own.positions.mul_(1.5)
        seen.clear()
        conditioned(split, denoiser)
        found = conditioned(split, denoiser).take(indices)[1]
        assert seen == ([3] if memory else [4])
        expected = own.encode([words[i % 4] for i in indices.tolist()])
        assert torch.equal(found["text_mask"], expected["text_mask"])
        torch.testing.assert_close(found["text"], expected["text"])


def test_every_part_of_the_encoder_is_trained(prompted: Prompted) -> None:
    """An encoder without gradient leaves prompts at what a random network makes of them."""
    config = compose(SHAPES_TEXT, ["preset=debug"])
    method = DenoiserTraining(prompted, prompted.null_cond, cond_drop=0.1)
    _, cond = for_method(load_data(config.data).train, method).take(torch.arange(16))
    method.loss(method.draw(latents(16), cond, torch.arange(16), 0), 0)[0].backward()
    assert [name for name, p in prompted.named_parameters() if p.grad is None or not p.grad.any()] == []
    prompted.zero_grad()


class Pictures:
    """Stands for `Samples`: these images, of these prompts."""

    def __init__(self, images: Tensor, prompts: tuple[str, ...]) -> None:
        self.images, self.chunk = images, 10
        self._spec = SampleSpec("ddim", 1, 0.0, 0, 0, (3, 32, 32), (), 10, prompts=prompts)

    def spec(self, draw: Draw) -> SampleSpec:
        return self._spec

    def batches(self, draw: Draw, count: int) -> Any:
        return iter(self.images[:count].split(self.chunk))


def test_alignment_of_known_pictures() -> None:
    """True pictures hold, and as many as are exchanged for others do not; prompts are taken in turn."""
    split = shapes_split(World(), 0, 0, 40)
    draw = Draw("teacher", "ddim", 1, 0.0)
    whole = alignment(Pictures(split.images, split.captions), [draw, draw], 40)
    assert whole["all"]["share"] == 1.0
    assert whole["all"]["trials"] == 80
    assert (whole["all"]["low"], whole["all"]["high"]) == wilson(80, 80)
    images = split.images.clone()
    images[:10] = split.images[10:20]
    assert alignment(Pictures(images, split.captions), [draw], 40)["all"]["share"] == 0.75
    turns = alignment(Pictures(split.images[:4].repeat(3, 1, 1, 1), split.captions[:4]), [draw], 12)
    assert turns["all"]["share"] == 1.0


def test_cached_samples_know_their_prompts() -> None:
    """Images of one prompt must not be found in the cache for another's; without prompts keys are what they were."""
    spec = SampleSpec("ddim", 1, 0.0, 0, 0, (3, 32, 32), (), 10)
    device = torch.device("cpu")
    assert "prompts" not in spec.key("digest", device)
    keys = [replace(spec, prompts=(text,)).key("digest", device) for text in ("a", "b")]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text.tokenizer=words", "text.tokenizer=words: must be one of bytes, bpe"),
        ("text.heads=3", "text.heads=3: must be a divisor of width=16"),
        ("text.vocabulary=100", "text.vocabulary=100: must be 258 or more"),
        ("+stage@stages.report=report", "stages.report.kind=report: must be one that knows captions"),
        ("network.overrides.text_width=32", "network.overrides.text_width=32: captioned_shapes has 16"),
    ],
)
def test_configs_that_cannot_be(override: str, message: str) -> None:
    """Before any training, which would end in an error hours later."""
    with pytest.raises(ConfigError, match=message):
        built(override)


def built(override: str) -> NetworkDenoiser:
    config = compose(SHAPES_TEXT, ["preset=debug", override])
    return build_denoiser(config, config.network)


def test_captions_and_text_go_together() -> None:
    """Captions that nothing reads, or an encoder with nothing to read."""
    with pytest.raises(ConfigError, match=r"text=null: must be given for captioned_shapes, e\.g\. text=small"):
        compose(EXPERIMENTS / "digits", ["preset=debug", "data=captioned_shapes"])
    with pytest.raises(ConfigError, match=r"must be null: digits has none"):
        compose(EXPERIMENTS / "digits", ["preset=debug", "+text=small"])
