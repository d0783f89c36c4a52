"""`space: latent`: an experiment whose denoisers see latents alone, from the autoencoder to decoded samples."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lab_configs import DIGITS
from PIL import Image
from safetensors.torch import load_file

from fewstep.lab.cli import main
from fewstep.lab.compose import compose
from fewstep.lab.config import Config, ConfigError
from fewstep.lab.data import load_data
from fewstep.lab.latents import autoencoder_of, read_latents, training_split
from fewstep.lab.networks import build_denoiser
from fewstep.models import Autoencoder, load
from fewstep.samplers import ddim
from fewstep.schedules import sample_seeds, seeded_noise

# 16x16 digits as 4x4 latents, an eps teacher that is converted to v before it is distilled
LATENT = [
    "preset=debug", "data=digits16", "space=latent", "prediction=eps",
    "+stage@stages.autoencoder=autoencoder", "+stage@stages.convert=convert", "+stage@stages.moments=moments",
    "+stage@stages.grid=grid",
    "stages.autoencoder={updates: 40, batch_size: 32, channels: 8, latent_channels: 2, lr: 3e-3, chunk: 400}",
    "stages.teacher.needs=[autoencoder]",
    "stages.convert={needs: [teacher], updates: 6, batch_size: 16}",
    "stages.guide={needs: [convert], guidance_form: diffusers}", "stages.halve.steps=[2,1]",
    "stages.moments={needs: [convert], steps: [2], updates: 4, batch_size: 8, warmup: 0}",
    "stages.evaluate={needs: [classifier,convert,guide,halve], steps: [2,1], headline: 2}",
    "stages.evaluate.targets.paired=[]",
    "stages.grid={needs: [classifier,convert,halve], steps: [2,1], weights: [0], num_samples: 20, paired_noises: 10,"
    " sampling_seeds: 1, chunk: 10}",
    "stages.grid.reference.steps=4", "~stages.report",
]  # fmt: skip


def latent(*overrides: str) -> Config:
    return compose(DIGITS, [*LATENT, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage, once."""
    out = tmp_path_factory.mktemp("runs") / "latent"
    assert main(["run", str(DIGITS), *LATENT, f"out={out}"]) == 0
    return out


@pytest.fixture
def student(run: Path) -> Path:
    return run / "halve" / "steps_2" / "model"


def autoencoder(run: Path) -> Autoencoder:
    return Autoencoder.load(run / "autoencoder" / "model")


def test_latents_are_what_the_encoder_says_of_each_image(run: Path) -> None:
    """In the order of the data set, of unit variance: labels would belong to other latents, schedules not fit."""
    config, images = latent(f"out={run}"), load_data(latent().data).train
    split = training_split(config, config.stages["teacher"])
    with torch.no_grad():
        expected = autoencoder(run).encode(images.images[[0, 400, 1346]]).mean
    torch.testing.assert_close(split.images[[0, 400, 1346]], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(split.labels, images.labels)
    values = split.images.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.std(1), torch.ones(2), rtol=1e-3, atol=0)
    assert training_split(config, config.stages["classifier"]).images.shape[1:] == (1, 16, 16)
    assert len(list((run / "autoencoder/latents/train").glob("*.safetensors"))) == 4


def test_the_autoencoder_learns(run: Path) -> None:
    """Its round trip must say more of an image than the mean image does."""
    heldout = load_data(latent().data).heldout.images
    rmse = json.loads((run / "autoencoder" / "reconstruction.json").read_text())["rmse"]["heldout"]
    assert rmse < 0.9 * float((heldout - heldout.mean(0)).square().mean().sqrt())


def test_conversion_starts_from_the_eps_teacher(run: Path) -> None:
    """v and eps of one network: the student distils v, which is stable where there is only noise."""
    predictions = [load(run / name / "model").prediction for name in ("teacher", "convert", "guide", "moments/steps_2")]
    assert predictions == ["eps", "v", "v", "v"]
    assert load(run / "halve/steps_1/model").network.input_shape == (2, 4, 4)


def test_sample_decodes(run: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's images are the decoder's of what the sampler gives, by the model's folder alone."""
    alone = tmp_path / "elsewhere"
    shutil.copytree(student, alone)
    command = ["sample", "--model", str(alone), "--num", "3", "--w", "1", "--classes", "3", "--out", str(tmp_path)]
    assert main(command) == 0
    found = load_file(tmp_path / "samples.safetensors")["images"]
    noise = seeded_noise(sample_seeds(0, 0, torch.arange(3)), (2, 4, 4))
    latents = ddim(load(student), noise, 2, torch.full((3,), 3), w=1.0)
    with torch.no_grad():
        torch.testing.assert_close(found, autoencoder(run).decode(latents).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert "decoded at" in capsys.readouterr().out


def test_measures_are_of_images_and_say_what_decoding_costs(run: Path) -> None:
    """The judge knows images; and a sampler's seconds must not hide, nor contain, the decoder's."""
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert all(row["decoding"] > 0 for row in results["timing"])
    assert load_file(run / "evaluate" / "grids.safetensors")["0/teacher"].shape[1:] == (1, 16, 16)
    assert json.loads((run / "grid" / "results.json").read_text())["rows"]


def test_inpainting_pastes_after_decoding(run: Path, student: Path, tmp_path: Path) -> None:
    """Known pixels bit for bit, though a round trip through latents moves every one of them."""
    image = (load_data(latent().data).heldout.images[:1] + 1).mul(127.5).round()
    Image.fromarray(image[0, 0].byte().numpy()).save(tmp_path / "one.png")
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[3:10, 5:8] = 255
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    command = ["inpaint", "--model", str(student), "--input", str(tmp_path / "one.png"), "--classes", "8"]
    assert main([*command, "--mask", str(tmp_path / "mask.png"), "--out", str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "samples.safetensors")
    known = mask[None, None] == 0
    assert torch.equal(found["images"][known], found["inputs"][known])
    assert not torch.equal(found["images"][~known], found["inputs"][~known])
    Image.fromarray(mask[:8].numpy()).save(tmp_path / "half.png")
    assert main([*command, "--mask", str(tmp_path / "half.png"), "--out", str(tmp_path / "no")]) == 2
    Image.fromarray(mask.div(2).byte().numpy()).save(tmp_path / "grey.png")
    assert main([*command, "--mask", str(tmp_path / "grey.png"), "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_edit_encodes_and_decodes(run: Path, student: Path, tmp_path: Path) -> None:
    """Images in, images out, of the same size."""
    command = ["edit", "--model", str(student), "--strength", "0.5", "--classes", "1", "--w", "0"]
    source = tmp_path / "one.png"
    Image.fromarray(torch.full((16, 16), 99, dtype=torch.uint8).numpy()).save(source)
    assert main([*command, "--input", str(source), "--out", str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out" / "samples.safetensors")["images"].shape == (1, 1, 16, 16)


def test_latents_of_another_autoencoder_are_refused(run: Path, tmp_path: Path) -> None:
    """A denoiser trained on one autoencoder's latents and decoded by another paints noise."""
    shutil.copytree(run / "autoencoder", tmp_path / "autoencoder")
    config = latent(f"out={tmp_path}")
    training_split(config, config.stages["teacher"])
    other = autoencoder(run)
    other.scale.mul_(1.1)
    other.save(tmp_path / "autoencoder" / "model")
    with pytest.raises(ConfigError, match=r"latents of another autoencoder \(SHA-256 [0-9a-f]{12}, the run's is"):
        training_split(config, config.stages["teacher"])


def test_damaged_latents_are_refused(run: Path, tmp_path: Path) -> None:
    """A flipped bit, a lost file or a data set of another size must not become a teacher."""
    folder, split = tmp_path / "autoencoder" / "latents" / "train", load_data(latent().data).train
    shutil.copytree(run / "autoencoder" / "latents" / "train", folder)
    digest, heldout = autoencoder(run).digest, load_data(latent().data).heldout
    with pytest.raises(ConfigError, match="latents of 1347 images, the data set has 450"):
        read_latents(folder, heldout, digest)
    shard = folder / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"00001.safetensors: missing or damaged; delete .*autoencoder and run again"):
        read_latents(folder, split, digest)
    (folder / "index.json").unlink()
    with pytest.raises(ConfigError, match=r"index.json: missing or damaged"):
        read_latents(folder, split, digest)


def test_images_have_no_autoencoder(run: Path, tmp_path: Path) -> None:
    """In pixel space nothing is decoded."""
    assert autoencoder_of(tmp_path, torch.device("cpu")) is None
    assert autoencoder_of(run / "convert" / "model", torch.device("cpu")).digest == autoencoder(run).digest


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["space=fourier"], "space=fourier"),
        (["~stages.autoencoder", "stages.teacher.needs=[]"], "exactly one stage of kind autoencoder, not 0"),
        (["stages.teacher.needs=[]"], r"stages.teacher.needs=\[\]: must be such that teacher rests on autoencoder"),
        (["stages.autoencoder.channel_mult=[1,1,1,1,1,1]"], "image_size=16 does not halve 5 times"),
        (["stages.autoencoder.error=huber"], "stages.autoencoder.error=huber"),
        (["stages.autoencoder.kl=-1"], "stages.autoencoder.kl=-1"),
        (["network.overrides.image_size=16"], "network.overrides.image_size=16"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    """Before any compute, by key and value."""
    with pytest.raises(ConfigError, match=message):
        build_denoiser(config := latent(*overrides), config.network)
