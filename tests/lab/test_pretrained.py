"""A teacher that is read: what diffusers makes of the same checkpoint is the truth; mistakes are met before compute."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers_models import ddpm, dit, text_unet, unet
from lab_configs import EXPERIMENTS, altered
from model_helpers import perturbed

from fewstep.lab.cli import main
from fewstep.lab.compose import compose
from fewstep.lab.config import AutoencoderConfig, Config, ConfigError, NetworkConfig, PretrainedConfig
from fewstep.lab.networks import build_denoiser, with_dropout
from fewstep.lab.pretrained import read_checkpoint
from fewstep.lab.shapes.scene import SIDE
from fewstep.lab.sources import digests, refuse_changed, write_source
from fewstep.lab.text import new_encoder
from fewstep.lab.validate import validate
from fewstep.models import GuidedDenoiser, NetworkDenoiser, UNet, from_diffusers, load, save, with_guidance_input
from fewstep.samplers import ddim
from fewstep.schedules import Cosine, Trained

PAGE = Path(__file__).parents[2] / "docs" / "own-checkpoint.md"
DIGIT = {"in_channels": 1, "out_channels": 1, "num_class_embeds": 11}
SHORT = [
    "threads=1", "progress=false", "tensorboard=false", "stages.classifier={updates: 20, batch_size: 32, width: 8}",
    "stages.convert={updates: 3, batch_size: 8, ema_half_life: 0, warmup: 0}",
    "stages.guide={updates: 3, batch_size: 8, warmup: 0}",
    "stages.halve={steps: [2, 1], updates: 2, batch_size: 8, warmup: 0}",
    "stages.grid={steps: [2, 1], weights: [0, 1], num_samples: 20, paired_noises: 10, sampling_seeds: 1, chunk: 10}",
    "stages.grid.reference.steps=4",
]  # fmt: skip


def write(folder: Path, prediction: str = "epsilon", **settings: Any) -> Path:
    """A pipeline's folder of a digits model."""
    unet(**(DIGIT | settings)).save_pretrained(folder / "unet")
    ddpm(prediction).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write(tmp_path_factory.mktemp("models") / "mine")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that the page shows."""
    folder = tmp_path_factory.mktemp("experiments") / "own"
    folder.mkdir()
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (folder / "config.yaml").write_text(shown)
    return folder


@pytest.fixture(scope="module")
def config(experiment: Path, checkpoint: Path) -> Config:
    """Not to be changed in place."""
    return compose(experiment, [*SHORT, f"stages.teacher.path={checkpoint}"])


@pytest.fixture(scope="module")
def run(experiment: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage of it, once."""
    out = tmp_path_factory.mktemp("runs") / "own"
    assert main(["run", str(experiment), *SHORT, f"stages.teacher.path={checkpoint}", f"out={out}"]) == 0
    return out


def theirs(checkpoint: Path, noise: torch.Tensor, y: torch.Tensor, w: float) -> torch.Tensor:
    """Guided DDIM by diffusers alone, on 10 of its own indices."""
    model = diffusers.UNet2DModel.from_pretrained(checkpoint / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(
        checkpoint / "scheduler", timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    scheduler.set_timesteps(10)
    z = noise
    for index in scheduler.timesteps:
        given, dropped = (model(z, index, class_labels=labels).sample for labels in (y, torch.full_like(y, 10)))
        z = scheduler.step((1 + w) * given - w * dropped, index, z).prev_sample
    return z


@torch.no_grad()
def test_its_images_are_those_of_diffusers(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Another time, null class, schedule or prediction would make a run of hours from another model than was given."""
    teacher = load(run / "teacher" / "model")
    noise, y = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 9, 5])
    expected = theirs(checkpoint, noise, y, w=1.5)
    found = ddim(GuidedDenoiser(teacher, teacher.null_cond), noise, 10, y, 1.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    shutil.copytree(checkpoint, tmp_path / "planted")
    ddpm("v_prediction").save_pretrained(tmp_path / "planted" / "scheduler")
    planted = from_diffusers(tmp_path / "planted")
    assert (ddim(GuidedDenoiser(planted, planted.null_cond), noise, 10, y, 1.5) - expected).abs().max() > 0.1


def test_every_later_stage_works_from_it(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    """From eps to v, to a network that takes w, to students of one step, measured, and back to diffusers."""
    names = ("teacher", "convert", "guide", "halve/steps_2", "halve/steps_1")
    found = [load(run / name / "model") for name in names]
    assert [model.prediction for model in found] == ["eps", "v", "v", "v", "v"]
    assert [model.trained.kind for model in found] == ["teacher", "teacher", "guided", *["deterministic"] * 2]
    assert {model.schedule for model in found} == {from_diffusers(checkpoint).schedule}
    first, *others = (model.network.model.conv_in.weight.detach() for model in found)
    assert all(0 < float((weight - first).abs().max()) < 0.1 for weight in others)  # each starts from the one before
    rows = json.loads((run / "grid" / "results.json").read_text())["rows"]
    assert {row["kind"] for row in rows} >= {"teacher", "deterministic"}
    arguments = ["export", "--model", str(run / "halve/steps_1/model"), "--out", str(tmp_path / "out"), "--w", "1"]
    assert main(arguments) == 0
    again = from_diffusers(tmp_path / "out")
    z, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        torch.testing.assert_close(again(z, torch.ones(2), y), found[-1](z, torch.ones(2), y, 1.0))


def test_a_checkpoint_that_changed_is_refused_and_one_that_moved_is_not(
    run: Path, checkpoint: Path, experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Students of two teachers in one folder would be measured as one's."""
    source = json.loads((run / "teacher" / "source.json").read_text())
    assert sorted(source["sha256"]) == [
        "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    again = ["run", str(experiment), *SHORT, f"stages.teacher.path={moved}", f"out={run}"]
    assert main(again) == 0
    perturbed(unet(**DIGIT)).save_pretrained(moved / "unet")
    capsys.readouterr()
    assert main(again) == 2
    assert "unet/diffusion_pytorch_model.safetensors is another than when" in capsys.readouterr().err
    shutil.copytree(checkpoint, moved, dirs_exist_ok=True)
    (moved / "model_index.json").write_text("{}")
    assert main(again) == 2
    assert "model_index.json is another than when" in capsys.readouterr().err


def test_a_scheduler_of_another_folder_is_part_of_what_was_read(config: Config, tmp_path: Path) -> None:
    """The network's own folder may have none; another scheduler makes another teacher of the same weights."""
    unet(**DIGIT).save_pretrained(tmp_path / "model")
    ddpm().save_pretrained(tmp_path / "elsewhere")
    stage = altered(config, "stages.teacher.path", str(tmp_path / "model")).stages["teacher"]
    with pytest.raises(ConfigError, match=r"scheduler_config.json is missing: give a scheduler"):
        read_checkpoint(stage, 8)
    stage.scheduler = str(tmp_path / "elsewhere")
    assert read_checkpoint(stage, 8).prediction == "eps"
    write_source(tmp_path, stage, digests(stage))
    refuse_changed(stage, tmp_path)
    ddpm("v_prediction").save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"scheduler=scheduler_config.json is another than when"):
        refuse_changed(stage, tmp_path)
    (tmp_path / "source.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"source.json is damaged"):
        refuse_changed(stage, tmp_path)


@pytest.mark.parametrize("inpainting", [False, True])
def test_one_of_our_own_is_read_too(experiment: Path, inpainting: bool, tmp_path: Path) -> None:
    """A teacher of another run, on its own schedule, needs no conversion where it predicts v; nor where it paints."""
    network = perturbed(UNet.from_preset("debug", inpainting=inpainting))
    denoiser = NetworkDenoiser(network, Cosine(shift=-1.0), "v", trained=Trained("teacher"))
    save(denoiser, tmp_path / "model")
    changes = ["~stages.convert", "stages.guide.needs=[teacher]", "stages.grid.needs=[classifier,teacher,halve]"]
    arguments = [str(experiment), *(each for each in SHORT if "convert" not in each), *changes]
    arguments += [f"stages.teacher.path={tmp_path / 'model'}", f"out={tmp_path / 'run'}"]
    assert main(["run", *arguments, "--until", "guide"]) == 0
    found = load(tmp_path / "run" / "teacher" / "model")
    assert found.schedule == load(tmp_path / "run" / "guide" / "model").schedule == Cosine(shift=-1.0)
    weights = denoiser.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.state_dict().items())


def broken(tmp_path: Path) -> Path:
    folder = write(tmp_path / "broken")
    (folder / "unet" / "config.json").write_text("{")
    return folder


def only_settings(tmp_path: Path, prediction: str = "epsilon", **settings: Any) -> Path:
    folder = write(tmp_path / "some", **settings)
    written = folder / "scheduler" / "scheduler_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"prediction_type": prediction}))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # settings must be enough
    return folder


def of_class(tmp_path: Path, name: str) -> Path:
    folder = write(tmp_path / "some")
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": name}))
    return folder


def of_text(tmp_path: Path) -> Path:
    text_unet(in_channels=1, out_channels=1).save_pretrained(tmp_path / "text" / "unet")
    ddpm().save_pretrained(tmp_path / "text" / "scheduler")
    return tmp_path / "text"


def with_vae(tmp_path: Path) -> Path:
    folder = write(tmp_path / "latent")
    (folder / "vae").mkdir()
    return folder


def ours(tmp_path: Path, trained: Trained | None, guided: bool = False, **overrides: Any) -> Path:
    denoiser = NetworkDenoiser(UNet.from_preset("debug", **overrides), Cosine(), "v")
    denoiser = with_guidance_input(denoiser) if guided else denoiser
    denoiser.trained = trained
    save(denoiser, tmp_path / "ours")
    return tmp_path / "ours"


MISTAKES: dict[str, Callable[[Path], Path]] = {
    "is no folder: from_diffusers reads local ones": lambda tmp: tmp / "nowhere",
    "has no unet/config.json or transformer/config.json, nor config.json": lambda tmp: tmp,
    "config.json is not JSON": broken,
    "diffusers class 'UNet1DModel' is unknown: use one of UNet2DModel,": lambda tmp: of_class(tmp, "UNet1DModel"),
    "prediction_type 'flow' is unknown: use one of epsilon,": lambda tmp: only_settings(tmp, "flow"),
    "a model of images (1, 8, 8), as data=digits has; this one's are (1, 16, 16)":
        lambda tmp: only_settings(tmp, sample_size=16),
    "this one's are (3, 8, 8)": lambda tmp: only_settings(tmp, in_channels=3, out_channels=3),
    "a model of 10 classes and one more index, the last, for none; this one has 9 and that one":
        lambda tmp: only_settings(tmp, num_class_embeds=10),
    "for none; this one has none": lambda tmp: only_settings(tmp, num_class_embeds=None),
    "a model of classes, as data=digits asks": of_text,
    "must be a model of pixels; this one works on the latents of an autoencoder": with_vae,
    "this is a model of kind guided": lambda tmp: ours(tmp, Trained("guided", w_range=(0.0, 4.0)), guided=True),
    "this is a model of kind moments": lambda tmp: ours(tmp, Trained("moments", 4)),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_a_checkpoint_that_does_not_fit_is_refused_by_its_settings(
    message: str, config: Config, tmp_path: Path
) -> None:
    """Otherwise it is met in the middle of the run, or never."""
    changed = altered(config, "stages.teacher.path", str(MISTAKES[message](tmp_path)))
    with pytest.raises(ConfigError) as caught:
        validate(changed)
    assert str(caught.value).startswith(f"stages.teacher.path={changed.stages['teacher'].path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_damaged_are_one_line(config: Config, tmp_path: Path) -> None:
    """What settings cannot say is met by the first stage."""
    folder = write(tmp_path / "mine")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    stage = altered(config, "stages.teacher.path", str(folder)).stages["teacher"]
    with pytest.raises(ConfigError, match=r"^stages.teacher.path=\S+: .+$"):
        read_checkpoint(stage, 8)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stages.guide.needs", ["teacher"], "x, v or flow for stages.guide: let it need a stage of kind convert"),
        ("prediction", "x", "prediction=x: must be left out: stages.teacher brings its own"),
        ("network.preset", "debug", "must be left out: stages.teacher brings its own"),
        ("schedule", {"type": "Karras"}, "must be left out: stages.teacher brings its own"),
        ("stages.guide.student.network.overrides", {"channels": 8}, "must be left out: students of teacher are copies"),
        ("stages.halve.student.network.type", "DiT", "must be left out: students of teacher are copies of its network"),
        ("stages.convert.needs", [], "exactly one stage of kind teacher or pretrained"),
    ],
)
def test_what_its_experiment_cannot_ask_is_refused(key: str, value: object, message: str, config: Config) -> None:
    """What the checkpoint brings would be taken for what the config says."""
    with pytest.raises(ConfigError) as caught:
        validate(altered(config, key, value))
    assert message in str(caught.value)


def test_moment_matching_from_it(experiment: Path, checkpoint: Path, tmp_path: Path) -> None:
    """It has neither a past from which Adam's second moments could be taken nor another schedule than its own."""
    added = [*SHORT, "~stages.grid", "+stage@stages.moments=moments", "stages.moments={needs: [convert], steps: [4]}"]
    converted = compose(experiment, [*added, f"stages.teacher.path={checkpoint}"])
    other = altered(converted, "stages.moments.schedule", {"type": "Karras"})
    with pytest.raises(ConfigError, match=r"schedule=Karras: must be {}: teacher is a network that takes indices"):
        validate(other)
    direct = altered(converted, "stages.moments.needs", ["teacher"])
    with pytest.raises(ConfigError, match=r"x, v or flow for stages\.moments: let it need a stage of kind convert"):
        validate(direct)
    instant = altered(direct, "stages.moments.method", "instant")
    instant = altered(instant, "stages.teacher.path", str(write(tmp_path / "v", "v_prediction")))
    with pytest.raises(ConfigError, match=r"preconditioner_batches=0: must be 1 or more: teacher was not trained here"):
        validate(instant)
    validate(altered(instant, "stages.moments.preconditioner_batches", 2))


def test_a_text_teacher_of_our_own(config: Config, tmp_path: Path) -> None:
    """Its encoder comes with it; a config that says another would only seem to be what was distilled."""
    shapes = altered(compose(EXPERIMENTS / "shapes_text", ["preset=debug"]), "space", None)
    teacher = build_denoiser(shapes, NetworkConfig(preset="debug", overrides={"attention": [16]}))
    teacher.trained = Trained("teacher")
    save(teacher, tmp_path / "mute")
    shapes.stages["teacher"] = PretrainedConfig(name="teacher", path=str(tmp_path / "mute"))
    shapes.network, shapes.schedule = config.network, config.schedule
    with pytest.raises(ConfigError, match=r"must be a model saved with a fewstep.models.TextEncoder"):
        validate(shapes)
    assert shapes.text is not None
    save(teacher.use_text_encoder(new_encoder(shapes.text, ["a red square"])), tmp_path / "model")
    found = altered(shapes, "stages.teacher.path", str(tmp_path / "model"))
    validate(found)
    with pytest.raises(ConfigError, match=r"text.length=17: must be \d+, as the encoder of stages.teacher.path="):
        validate(altered(found, "text.length", 17))
    classes = ours(tmp_path, None, in_channels=3, image_size=SIDE, attention=[16])
    with pytest.raises(ConfigError, match="must be a model of text, as data=captioned_shapes asks"):
        validate(altered(shapes, "stages.teacher.path", str(classes)))


def test_latents_are_not_its_inputs(config: Config) -> None:
    """A run's own autoencoder makes other latents than the checkpoint was trained on."""
    stages = {"autoencoder": AutoencoderConfig(name="autoencoder"), **config.stages}
    with pytest.raises(ConfigError, match=r"stages\.teacher\.kind=pretrained: must be left out with space=latent"):
        validate(altered(altered(config, "stages", stages), "space", "latent"))


def test_students_of_a_network_with_dropout_have_none(tmp_path: Path) -> None:
    """Dropout in a network of diffusers is its own setting: students are distilled without (paper C)."""
    teacher = from_diffusers(unet(dropout=0.3, **DIGIT), ddpm())
    student = with_dropout(teacher, 0.0)
    assert {module.p for module in student.network.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    z, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.equal(student.train()(z, t, y), teacher.eval()(z, t, y))
    assert with_dropout(teacher, None) is teacher
    with_dropout(from_diffusers(dit(dropout=0.1), ddpm()), 0.0)
