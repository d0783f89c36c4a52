"""Stable Diffusion in small, from a pipeline's folder through every stage of experiments/laion_text, and back."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lab_configs import EXPERIMENTS, altered
from safetensors.torch import load_file

from fewstep.lab.cli import main
from fewstep.lab.compose import compose
from fewstep.lab.config import Config, ConfigError
from fewstep.lab.data import load_data
from fewstep.lab.latents import read_latents, training_split
from fewstep.lab.text import conditioned
from fewstep.lab.validate import validate
from fewstep.models import GuidedDenoiser, load, load_autoencoder
from fewstep.samplers import ddim

TOOLS = str(Path(__file__).parents[2] / "tools")
LAION = EXPERIMENTS / "laion_text"
PROMPTS = ["a large red circle", "two small things", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sys.path.insert(0, TOOLS)
    try:
        import tiny_checkpoint
    finally:
        sys.path.remove(TOOLS)
    tiny_checkpoint.checkpoint("stable-diffusion", folder)
    return folder


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage, once."""
    out = tmp_path_factory.mktemp("runs") / "laion"
    assert main(["run", str(LAION), "preset=debug", f"stages.teacher.path={checkpoint}", f"out={out}"]) == 0
    return out


def config(checkpoint: Path, *overrides: str) -> Config:
    return compose(LAION, ["preset=debug", f"stages.teacher.path={checkpoint}", *overrides])


def pipeline(folder: Path, **parts: Any) -> diffusers.StableDiffusionPipeline:
    made = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def noise(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def decoded(model: Path, latents: torch.Tensor) -> torch.Tensor:
    """As pipelines give images."""
    with torch.no_grad():
        return (load_autoencoder(model / "autoencoder").decode(latents) / 2 + 0.5).clamp(0, 1)


def write_index(folder: Path) -> None:
    """What makes a pipeline of the folder."""
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "safety_checker": [None, None], "feature_extractor": [None, None]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))


@torch.no_grad()
def test_the_teacher_is_that_of_the_pipeline(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    """From prompts to pixels: another padding, null prompt, time, scale of latents or w is another teacher."""
    folder = shutil.copytree(checkpoint, tmp_path / "theirs")
    write_index(folder)
    theirs = pipeline(folder)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    expected = theirs(PROMPTS, num_inference_steps=8, guidance_scale=3.5, latents=noise(), output_type="pt").images
    teacher = load(run / "teacher" / "model")
    cond = teacher.text_encoder.encode(PROMPTS)
    found = ddim(GuidedDenoiser(teacher, teacher.null_cond), noise(), 8, cond, w=2.5)
    torch.testing.assert_close(decoded(run / "teacher/model", found), expected, rtol=0, atol=2e-4)
    other = ddim(GuidedDenoiser(teacher, teacher.null_cond), noise(), 8, cond, w=3.5)
    assert (decoded(run / "teacher/model", other) - expected).abs().max() > 2e-3


@torch.no_grad()
def test_export_is_a_whole_pipeline(run: Path, tmp_path: Path) -> None:
    """Who distilled a checkpoint gets one back: nothing else is needed, and w is its guidance scale."""
    model = run / "halve" / "steps_2" / "model"
    assert main(["export", "--model", str(model), "--out", str(tmp_path / "out")]) == 0
    made = pipeline(tmp_path / "out")
    student = load(model)
    for w in (2.0, 9.0):
        images = made(PROMPTS, num_inference_steps=2, guidance_scale=1 + w, latents=noise(), output_type="pt").images
        found = ddim(student, noise(), 2, student.text_encoder.encode(PROMPTS), w)
        torch.testing.assert_close(images, decoded(model, found), rtol=0, atol=2e-4)


def test_every_stage_works_from_it(run: Path, checkpoint: Path) -> None:
    """eps becomes v, w an input, and each student starts from the one before; the encoder stays what it was."""
    found = [load(run / name / "model") for name in ("teacher", "convert", "guide", "halve/steps_2", "halve/steps_1")]
    assert [model.prediction for model in found] == ["eps", "v", "v", "v", "v"]
    assert [model.trained.kind for model in found] == ["teacher", "teacher", "guided", *["deterministic"] * 2]
    assert found[-1].trained.w_range == (2.0, 14.0)
    assert len({model.text_encoder.digest for model in found}) == 1
    first, *others = (model.network.model.conv_in.weight.detach() for model in found)
    assert all(0 < float((weight - first).abs().max()) < 0.1 for weight in others)
    changed = found[-1].network.model.time_embedding.cond_proj.weight.detach()
    assert float(changed.abs().max()) > 0  # it begins at zero


def test_what_is_trained_on(run: Path, checkpoint: Path) -> None:
    """Latents of the images in their order, scaled as the pipeline's, and CLIP's embeddings of their captions."""
    made = config(checkpoint, f"out={run}")
    data = load_data(made.data).train
    teacher = load(run / "teacher" / "model")
    split = conditioned(training_split(made, made.stages["guide"]), teacher)
    x, cond = split.take(torch.tensor([3, 59]))
    vae = diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae")
    images = data.images[[3, 59]].float()
    images = images / 127.5 - 1 if data.images.dtype == torch.uint8 else images
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mean * 0.18215
        text = teacher.text_encoder.encode([data.captions[3], data.captions[59]])["text"]
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    assert set(cond) == {"text"}
    torch.testing.assert_close(cond["text"], text)


def test_sample_by_prompt(run: Path, tmp_path: Path) -> None:
    """The command's images are the pipeline's of the same noise, by the model's folder alone."""
    model = shutil.copytree(run / "halve/steps_1/model", tmp_path / "model")
    options = ["--prompt", PROMPTS[0], "--w", "7.5", "--num", "2", "--out", str(tmp_path / "out")]
    assert main(["sample", "--model", str(model), *options]) == 0
    images = load_file(tmp_path / "out" / "samples.safetensors")["images"]
    assert images.shape == (2, 3, 32, 32)
    assert not torch.equal(images[0], images[1])


def test_a_changed_autoencoder_is_refused(
    run: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latents of one and pictures of another; a checkpoint that has only moved is the same."""
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    again = ["run", str(LAION), "preset=debug", f"stages.teacher.path={moved}", f"out={run}"]
    assert main(again) == 0
    weights = moved / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert main(again) == 2
    assert "vae/diffusion_pytorch_model.safetensors is another than when" in capsys.readouterr().err
    shutil.copytree(checkpoint, moved, dirs_exist_ok=True)
    (moved / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\n")
    assert main(again) == 2
    assert "tokenizer/merges.txt is another than when" in capsys.readouterr().err


def test_latents_are_gone_on_with(run: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of encoding are not begun anew; nor mixed with those of another autoencoder."""
    from fewstep.lab import latents
    from fewstep.lab.context import Interrupted

    split, autoencoder = load_data(config(checkpoint).data).train, load_autoencoder(run / "autoencoder" / "model")
    encoded: list[int] = []
    whole = autoencoder.encode
    monkeypatch.setattr(autoencoder, "encode", lambda x: encoded.append(len(x)) or whole(x))
    calls = iter([False, True])
    with pytest.raises(Interrupted, match="stopped after 2 of 4 files"):
        latents.write_latents(tmp_path / "latents", autoencoder, split, 16, lambda: next(calls))
    with pytest.raises(ConfigError, match=r"index.json: missing or damaged"):
        read_latents(tmp_path / "latents", split, autoencoder.digest)
    latents.write_latents(tmp_path / "latents", autoencoder, split, 16)
    assert encoded == [16, 16, 16, 12]
    found = read_latents(tmp_path / "latents", split, autoencoder.digest).images
    kept = read_latents(run / "autoencoder/latents/train", split, autoencoder.digest).images
    torch.testing.assert_close(found, kept)
    with torch.no_grad():
        autoencoder.scale.mul_(2)
    latents.write_latents(tmp_path / "latents", autoencoder, split, 16)
    torch.testing.assert_close(read_latents(tmp_path / "latents", split, autoencoder.digest).images, kept / 2)


def test_latents_too_many_for_memory_stay_in_files(
    run: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million of them in each of eight processes is a node's memory; from files they are the same, in any order."""
    from fewstep.lab import latents

    split, autoencoder = load_data(config(checkpoint).data).train, load_autoencoder(run / "autoencoder" / "model")
    folder = tmp_path / "autoencoder" / "latents" / "train"
    latents.write_latents(folder, autoencoder, split, 16)
    kept = read_latents(folder, split, autoencoder.digest)
    monkeypatch.setattr(latents, "MEMORY", 1000)
    streamed = read_latents(folder, split, autoencoder.digest)
    assert not isinstance(streamed.images, torch.Tensor)
    order = torch.tensor([59, 0, 17, 16, 15, 0])
    x, y = streamed.take(order)
    expected, labels = kept.take(order)
    assert torch.equal(x, expected)
    assert torch.equal(y, labels)
    shard = folder / "00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    damaged = read_latents(folder, split, autoencoder.digest)
    damaged.take(order)
    with pytest.raises(ConfigError, match=r"00002.safetensors: missing or damaged; delete .*autoencoder and run again"):
        damaged.take(torch.tensor([40]))


def test_large_pictures_are_decoded_in_parts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of samples at 512x512 would not fit into a GPU's memory."""
    from fewstep.lab import latents

    autoencoder = load_autoencoder(run / "autoencoder" / "model")
    expected = latents.decode(autoencoder, noise())
    monkeypatch.setattr(latents, "PIXELS", 2 * 32 * 32)
    torch.testing.assert_close(latents.decode(autoencoder, noise()), expected, rtol=1e-4, atol=1e-5)


MISTAKES = [
    ("space", None, "space=null: must be latent with stages.autoencoder", ""),
    ("text.tokenizer", "bpe", "text.tokenizer=bpe: must be pretrained", "brings CLIP's encoder; use text=pretrained"),
    ("stages.autoencoder.chunk", 0, "stages.autoencoder.chunk=0", "more than 0"),
    ("stages.autoencoder.path", "/nowhere", "stages.autoencoder.path=/nowhere: ", "has no vae/config.json"),
    ("stages.teacher.needs", [], "stages.teacher.needs", "such that teacher rests on autoencoder, whose latents"),
    ("stages.guide.needs", ["teacher"], "stages.teacher.path", "x, v or flow for stages.guide: let it need a stage of"),
    ("stages.convert.needs", ["autoencoder"], "stages.convert.needs", "exactly one stage of kind teacher"),
    ("data.channels", 1, "data.channels=1", "3"),
]


@pytest.mark.parametrize(("key", "value", "beginning", "message"), MISTAKES)
def test_mistakes(key: str, value: object, beginning: str, message: str, checkpoint: Path) -> None:
    """Before hours of encoding."""
    with pytest.raises(ConfigError) as caught:
        validate(altered(config(checkpoint), key, value))
    assert str(caught.value).startswith(beginning)
    assert message in str(caught.value)


def test_a_folder_that_lacks_something_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """By what is missing from it; its settings are enough, weights need not be there."""
    folder = shutil.copytree(checkpoint, tmp_path / "some")
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    validate(config(folder))
    settings = folder / "text_encoder" / "config.json"
    content = settings.read_text()
    settings.write_text(json.dumps(json.loads(content) | {"hidden_size": 16}))
    with pytest.raises(ConfigError, match=r"embeddings of its encoder's 16 channels; this one takes 12"):
        config(folder)
    settings.write_text(json.dumps(json.loads(content) | {"model_type": "t5"}))
    with pytest.raises(ConfigError, match=r"stages.teacher.path=.*a text encoder of type 't5'"):
        config(folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ConfigError, match=r"CLIP's text_encoder/ and tokenizer/ in its folder"):
        config(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ConfigError, match=r"stages.autoencoder.path=.*has no vae/config.json"):
        config(folder)
