"""from_diffusers: what diffusers computes itself is the truth, by class, prediction and condition."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers_models import CLASSES, MODELS, ddpm, dit, inputs, null_text, text, text_unet, unet
from model_helpers import perturbed

from fewstep.distill import GuidanceDistillation, guidance_target
from fewstep.models import GuidedDenoiser, NetworkDenoiser, from_diffusers, load, save, with_guidance_input

KINDS = pytest.mark.parametrize("kind", MODELS)


def wrapped(kind: str, **settings: Any) -> NetworkDenoiser:
    null = null_text() if kind == "UNet2DConditionModel" else None
    return from_diffusers(MODELS[kind](**settings), ddpm(), null_text=null)


@KINDS
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_x_is_what_diffusers_scheduler_says(kind: str, prediction: str) -> None:
    """The scheduler's own `pred_original_sample` at an index: a time off by one, another sign or another alpha show."""
    model, (z, cond, theirs) = MODELS[kind](), inputs(kind)
    scheduler = diffusers.DDIMScheduler.from_config(ddpm(prediction).config, clip_sample=False)
    scheduler.set_timesteps(1000)
    denoiser = from_diffusers(model, ddpm(prediction))
    for index in (0, 417, 999):
        with torch.no_grad():
            output = model(z, timestep=torch.full((3,), index), **theirs).sample[:, : z.shape[1]]
            expected = scheduler.step(output, index, z).pred_original_sample
            x = denoiser(z, torch.full((3,), (index + 1) / 1000), cond)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_guided_is_two_evaluations_of_diffusers(kind: str) -> None:
    """Classifier-free guidance as its pipelines have it: null class the last, null text the one that was given."""
    denoiser, (z, cond, theirs) = wrapped(kind), inputs(kind)
    null = {"class_labels": torch.full((3,), CLASSES)}
    if kind == "UNet2DConditionModel":
        null = {"encoder_hidden_states": null_text().expand(3, -1, -1)}
    t, w = torch.full((3,), 0.6), torch.tensor([0.5, 1.0, 3.0])
    with torch.no_grad():
        given, dropped = (denoiser.network.model(z, timestep=600 - 1.0 + 0 * t, **c).sample[:, : z.shape[1]]
                          for c in (theirs, null))  # fmt: skip
        raw = GuidedDenoiser(denoiser, denoiser.null_cond).raw(z, t, cond, w)
    torch.testing.assert_close(raw.cond_output, given, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw.uncond_output, dropped, rtol=1e-4, atol=1e-5)
    assert (given - dropped).abs().max() > 1e-3


def test_text_mask_hides_padding() -> None:
    """Tokens that the mask hides must not matter; without a mask all do, as in Stable Diffusion's pipeline."""
    denoiser, (z, cond, _) = wrapped("UNet2DConditionModel"), inputs("UNet2DConditionModel")
    t, mask = torch.full((3,), 0.5), torch.ones(3, 6, dtype=torch.bool)
    mask[:, 4:] = False
    padded = cond["text"].clone()
    padded[:, 4:] = 7.0
    with torch.no_grad():
        seen = denoiser(z, t, {"text": padded})
        hidden = [denoiser(z, t, {"text": each, "text_mask": mask}) for each in (cond["text"], padded)]
        short = denoiser(z, t, {"text": cond["text"][:, :4]})
    torch.testing.assert_close(hidden[0], hidden[1])
    torch.testing.assert_close(hidden[0], short, rtol=1e-4, atol=1e-5)
    assert (seen - hidden[0]).abs().max() > 1e-3


def test_inpainting_model() -> None:
    """Stable Diffusion's order of input channels: z, mask, masked image; guidance keeps them and drops the text."""
    model = text_unet(in_channels=9)
    denoiser = from_diffusers(model, ddpm(), null_text=null_text())
    z, image, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), (torch.rand(2, 1, 8, 8) > 0.5).float()
    with torch.no_grad():
        expected = model(torch.cat([z, mask, image], 1), torch.tensor(499.0), text(2)).sample
        cond = {"text": text(2), "mask": mask, "masked_image": image}
        raw = denoiser.raw(z, torch.full((2,), 0.5), cond)
    torch.testing.assert_close(raw.cond_output, expected, rtol=1e-4, atol=1e-5)
    assert denoiser.takes_mask
    assert sorted(denoiser.null_cond) == ["text"]


@KINDS
@pytest.mark.parametrize("form", ["normalized", "diffusers"])
def test_guidance_input_starts_as_the_conditional_branch_and_learns(kind: str, form: str) -> None:
    """Bit for bit at every w, then dependent on each sample's own w, and every parameter is trained."""
    teacher, (z, cond, _) = wrapped(kind), inputs(kind)
    student, t = with_guidance_input(teacher, form), torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        expected = teacher(z, t, cond)
        for w in (0.0, 7.5, torch.tensor([0.0, 1.0, 4.0])):
            assert torch.equal(student(z, t, cond, w), expected)
        perturbed(student, std=0.1)
        low, high = student(z, t, cond, 0.0), student(z, t, cond, 3.0)
        mixed = student(z, t, cond, torch.tensor([0.0, 3.0, 0.0]))
        assert torch.equal(teacher(z, t, cond), expected)
    torch.testing.assert_close(mixed, torch.stack([low[0], high[1], low[2]]), rtol=1e-4, atol=1e-4)
    assert (low - high).abs().flatten(1).amax(1).min() > 1e-4
    student(z, t, cond, torch.ones(3)).square().mean().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
    with pytest.raises(ValueError, match="already has a guidance input"):
        with_guidance_input(student)


def test_default_form_is_what_pipelines_read() -> None:
    """A text-to-image student in another form could not be exported after days of training."""
    forms = {kind: with_guidance_input(wrapped(kind)).network.config["guidance"]["form"] for kind in MODELS}
    assert forms == dict.fromkeys(MODELS, "normalized") | {"UNet2DConditionModel": "diffusers"}


def test_model_that_takes_w_already() -> None:
    """An LCM model: w reaches it as its pipeline's embedding of guidance_scale - 1 = w."""
    model = text_unet(time_cond_proj_dim=32)
    denoiser, (z, cond, theirs) = from_diffusers(model, ddpm(), w_range=(2.0, 14.0)), inputs("UNet2DConditionModel")
    w = torch.tensor([2.0, 7.5, 14.0])
    angles = 1000 * w[:, None] * torch.exp(torch.arange(16) * (-torch.log(torch.tensor(10000.0)) / 15))
    with torch.no_grad():
        embedding = torch.cat([angles.sin(), angles.cos()], 1)
        expected = model(z, torch.tensor(499.0), timestep_cond=embedding, **theirs).sample
        torch.testing.assert_close(denoiser.raw(z, torch.full((3,), 0.5), cond, w).cond_output, expected,
                                   rtol=1e-3, atol=1e-4)  # fmt: skip
    assert denoiser.takes_guidance
    assert denoiser.trained.w_range == (2.0, 14.0)
    with pytest.raises(ValueError, match="give w"):
        denoiser(z, torch.full((3,), 0.5), cond)


def test_dit_drops_no_labels_of_its_own() -> None:
    """diffusers' DiT replaces a tenth of the labels by the null class while it trains, by global random numbers."""
    denoiser, (z, cond, _) = wrapped("DiTTransformer2DModel"), inputs("DiTTransformer2DModel")
    t = torch.full((3,), 0.5)
    with torch.no_grad():
        expected = denoiser(z, t, cond)
        denoiser.train()
        assert all(torch.equal(denoiser(z, t, cond), expected) for _ in range(40))


@KINDS
@pytest.mark.parametrize("guided", [False, True])
def test_saved_and_loaded(kind: str, guided: bool, tmp_path: Path) -> None:
    """A student of a foreign model must come back with its schedule, its null condition and its w."""
    denoiser, (z, cond, _) = wrapped(kind), inputs(kind)
    if guided:
        denoiser = with_guidance_input(denoiser)
        perturbed(denoiser)
    save(denoiser, tmp_path / "model")
    again, t, w = load(tmp_path / "model"), torch.tensor([0.1, 0.5, 1.0]), 2.0 if guided else None
    with torch.no_grad():
        torch.testing.assert_close(again(z, t, cond, w), denoiser(z, t, cond, w), rtol=1e-5, atol=1e-5)
    assert (again.schedule, again.trained) == (denoiser.schedule, denoiser.trained)
    torch.testing.assert_close(again.null_cond, denoiser.null_cond)
    if not guided:
        torch.testing.assert_close(again.null_cond, wrapped(kind).null_cond)
    assert sorted(each.name for each in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


@KINDS
def test_a_folder_is_its_pipeline(kind: str, tmp_path: Path) -> None:
    """From what `save_pretrained` wrote, without the hub: the same numbers as from the objects."""
    part = "transformer" if kind == "DiTTransformer2DModel" else "unet"
    MODELS[kind]().save_pretrained(tmp_path / part)
    ddpm("v_prediction").save_pretrained(tmp_path / "scheduler")
    z, cond, _ = inputs(kind)
    t = torch.full((3,), 0.3)
    with torch.no_grad():
        read, made = from_diffusers(tmp_path), from_diffusers(MODELS[kind](), ddpm("v_prediction"))
        torch.testing.assert_close(read(z, t, cond), made(z, t, cond))
    assert (read.prediction, read.schedule) == ("v", made.schedule)
    assert from_diffusers(tmp_path, ddpm("sample")).prediction == "x"


def test_a_model_without_a_pipeline_is_read_with_a_scheduler_from_anywhere(tmp_path: Path) -> None:
    """Scripts often save the network alone; its scheduler then lies beside it, or in a folder that one names."""
    unet().save_pretrained(tmp_path / "model")
    ddpm("v_prediction").save_pretrained(tmp_path / "elsewhere")
    z, cond, _ = inputs("UNet2DModel")
    t = torch.full((3,), 0.3)
    with pytest.raises(FileNotFoundError, match=r"scheduler_config.json is missing: give a scheduler"):
        from_diffusers(tmp_path / "model")
    with torch.no_grad():
        expected = from_diffusers(unet(), ddpm("v_prediction"))(z, t, cond)
        for given in (tmp_path / "model", unet()):
            torch.testing.assert_close(from_diffusers(given, tmp_path / "elsewhere")(z, t, cond), expected)
        ddpm("v_prediction").save_pretrained(tmp_path / "model")
        torch.testing.assert_close(from_diffusers(tmp_path / "model")(z, t, cond), expected)


@KINDS
def test_what_a_folder_holds_is_known_without_its_weights(kind: str, tmp_path: Path) -> None:
    """Before hours of work, and before gigabytes are read: the same answers as those of the whole model."""
    MODELS[kind]().save_pretrained(tmp_path)
    ddpm("sample").save_pretrained(tmp_path)
    whole = from_diffusers(tmp_path)
    save(whole, tmp_path / "ours")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    for found in (from_diffusers(tmp_path, weights=False), load(tmp_path / "ours", weights=False)):
        assert {parameter.device.type for parameter in found.parameters()} == {"meta"}
        assert (found.prediction, found.schedule, found.time_input) == ("x", whole.schedule, "index")
        assert found.network.input_shape == whole.network.input_shape
        assert found.network.num_classes == whole.network.num_classes
        assert (found.takes_text, found.takes_guidance) == (kind == "UNet2DConditionModel", False)


def test_a_dit_is_read_under_the_name_that_it_was_published_with(tmp_path: Path) -> None:
    """DiT-XL-2-256 says Transformer2DModel, and more than DiT's class takes now; no other transformer is a DiT."""
    model, (z, y, _) = dit(), inputs("DiTTransformer2DModel")
    model.save_pretrained(tmp_path / "transformer")
    ddpm().save_pretrained(tmp_path / "scheduler")
    config = tmp_path / "transformer" / "config.json"
    settings = json.loads(config.read_text()) | {
        "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "cross_attention_dim": None,
        "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False,
    }  # fmt: skip
    config.write_text(json.dumps(settings))
    found, t = from_diffusers(tmp_path), torch.full((3,), 0.5)
    torch.testing.assert_close(found(z, t, y), from_diffusers(model, ddpm())(z, t, y))
    assert from_diffusers(tmp_path, weights=False).network.config == found.network.config
    save(found, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(z, t, y), found(z, t, y))
    config.write_text(json.dumps(settings | {"norm_type": "ada_norm_single"}))
    with pytest.raises(ValueError, match="'Transformer2DModel' is unknown: use one of UNet2DModel, UNet2DCond"):
        from_diffusers(tmp_path)


def test_pipeline_object() -> None:
    """A pipeline that is already in memory carries both."""
    pipeline = diffusers.DDIMPipeline(unet(num_class_embeds=None), diffusers.DDIMScheduler.from_config(ddpm().config))
    denoiser = from_diffusers(pipeline)
    assert denoiser.network.model is pipeline.unet
    assert denoiser.null_cond is None
    assert denoiser.network.num_classes is None


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    """A pickle can run any program; diffusers would fall back on one."""
    unet().save_pretrained(tmp_path / "unet", safe_serialization=False)
    ddpm().save_pretrained(tmp_path / "scheduler")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(OSError, match="safetensors"):
        from_diffusers(tmp_path)


def test_zero_terminal_snr_and_learned_times() -> None:
    """A last alpha of 0 is bounded, not divided by; a table of times is read at the nearest index."""
    zero = from_diffusers(unet(), ddpm("v_prediction", rescale_betas_zero_snr=True))
    z, cond, _ = inputs("UNet2DModel")
    assert zero(z, torch.ones(3), cond).isfinite().all()
    model = unet(time_embedding_type="learned", num_train_timesteps=1000)
    denoiser = from_diffusers(model, ddpm())
    with torch.no_grad():
        expected = model(z, torch.tensor(124), cond).sample
        torch.testing.assert_close(denoiser.raw(z, torch.full((3,), 0.125), cond).cond_output, expected)
        first = model(z, torch.tensor(0), cond).sample  # times below the first index are drawn in training
        torch.testing.assert_close(denoiser.raw(z, torch.zeros(3), cond).cond_output, first)


class Other(torch.nn.Module):
    """Some network."""


@pytest.mark.parametrize(
    ("model", "scheduler", "message"),
    [
        (Other(), ddpm(), "'Other' is unknown: use one of UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel"),
        (unet(), ddpm("flow_prediction"), "'flow_prediction' is unknown: use one of epsilon, v_prediction, sample"),
        (unet(), diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEuler.* has no alphas_cumprod"),
        (unet(), None, "needs a scheduler"),
        (unet(sample_size=None), ddpm(), "sample_size=None: give image_size"),
        (unet(in_channels=5), ddpm(), "in_channels=5 and out_channels=3"),
        (unet(class_embed_type="timestep"), ddpm(), "class_embed_type='timestep' is not supported: it must be None"),
        (text_unet(addition_embed_type="text"), ddpm(), "addition_embed_type='text' is not supported"),
    ],
)
def test_what_is_not_known_is_refused(model: Any, scheduler: Any, message: str) -> None:
    """A model that asks for more than it is given would be wrong, or fail deep inside, after hours."""
    with pytest.raises(ValueError, match=message):
        from_diffusers(model, scheduler)


def test_folders_that_are_none(tmp_path: Path) -> None:
    """A name that is no folder must not become a download."""
    for path in ("runwayml/stable-diffusion-v1-5", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"is no folder: .* downloads nothing"):
            from_diffusers(path)
    with pytest.raises(FileNotFoundError, match=r"has no unet/config.json or transformer/config.json"):
        from_diffusers(tmp_path)
    unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match=r"scheduler_config.json is missing: give a scheduler"):
        from_diffusers(tmp_path)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DiffusionPipeline"}')
    with pytest.raises(ValueError, match="scheduler 'DiffusionPipeline' is none of diffusers"):
        from_diffusers(tmp_path)
    for content, message in (("{", "is not JSON"), ("[]", "must be a JSON object")):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            from_diffusers(tmp_path)


def test_the_size_is_taken_where_the_settings_do_not_say_it() -> None:
    """Another size than the one that it was trained at would pass every check and give noise."""
    assert from_diffusers(unet(sample_size=None), ddpm(), image_size=16).network.input_shape == (3, 16, 16)
    assert from_diffusers(unet(), ddpm(), image_size=16).network.input_shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (None, r"cond\['text'\] must have shape \(3, length, 12\), got nothing"),
        (torch.arange(3), r"cond\['text'\] must have shape"),
        ({"text": text(2)}, r"got \(2, 6, 12\)"),
    ],
)
def test_text_that_is_missing(cond: Any, message: str) -> None:
    """Otherwise it is an attribute error inside diffusers."""
    z = torch.zeros(3, 4, 8, 8)
    with pytest.raises(ValueError, match=message):
        wrapped("UNet2DConditionModel")(z, torch.full((3,), 0.5), cond)


def test_labels_out_of_range() -> None:
    """Index K is the null class, K + 1 nothing."""
    z, _, _ = inputs("DiTTransformer2DModel")
    with pytest.raises(ValueError, match="class index 6 is out of range: classes are 0 to 4, null 5"):
        wrapped("DiTTransformer2DModel")(z, torch.full((3,), 0.5), torch.tensor([0, 5, 6]))


def test_without_a_null_text_there_is_no_guidance() -> None:
    """Zeros in the place of the empty prompt's embedding would guide away from nothing that the model has seen."""
    denoiser = from_diffusers(text_unet(), ddpm())
    assert denoiser.null_cond is None
    with pytest.raises(ValueError, match="needs null_cond"):
        GuidedDenoiser(denoiser, denoiser.null_cond)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message must say what to install."""
    save(wrapped("UNet2DModel"), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for call in (lambda: from_diffusers(tmp_path), lambda: load(tmp_path / "model")):
        with pytest.raises(ImportError, match=r"pip install 'fewstep-models\[diffusers\]'"):
            call()


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "DiTTransformer2DModel"])
def test_distils(kind: str) -> None:
    """Stage one on a foreign teacher: the student comes nearer to the guided teacher, which stays as it was."""
    torch.manual_seed(0)
    teacher, (z, cond, _) = wrapped(kind), inputs(kind)
    before = copy.deepcopy(teacher.state_dict())
    student = with_guidance_input(teacher, w_range=(1.0, 3.0))
    method = GuidanceDistillation(teacher, student, null_cond=teacher.null_cond, w_range=(1.0, 3.0))
    optimiser = torch.optim.Adam(method.param_groups()["student"], lr=2e-3)
    x, losses = z.clamp(-1, 1), []
    batch = method.draw(x, cond, torch.arange(3), 0)
    for step in range(25):
        loss, _ = method.loss(batch, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    t, w = torch.full((3,), 0.5), torch.full((3,), 2.0)
    target = guidance_target(teacher, teacher.null_cond, z, t, cond, w)
    assert target.isfinite().all()


def test_wrapping_takes_no_copy() -> None:
    """A large model must not be in memory twice."""
    model = dit()
    assert from_diffusers(model, ddpm()).network.model is model
