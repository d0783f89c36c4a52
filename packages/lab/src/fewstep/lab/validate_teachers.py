"""What can be wrong with teachers: those that are read, those that are fine-tuned, and what is to be made of them."""

from pathlib import Path

from fewstep.lab.checks import check_schedule, needs_one, one_of, require
from fewstep.lab.config import (
    Config,
    ConfigError,
    ConvertConfig,
    GuideConfig,
    HalveConfig,
    PretrainedConfig,
    StageConfig,
    StudentNetworkConfig,
)
from fewstep.lab.latents import INSIDE, sample_shape
from fewstep.lab.networks import config_of
from fewstep.lab.pretrained import brings_own_network, read_checkpoint
from fewstep.lab.record import ancestry
from fewstep.lab.text import PRETRAINED
from fewstep.models import ClipTextEncoder, NetworkDenoiser

TEACHERS = ("teacher", "pretrained", "convert")  # kinds of stages that give a teacher
OTHERWISE = "fewstep.models.from_diffusers and fewstep.distill do that in a program of yours"


def check_pretrained(key: str, stage: PretrainedConfig, config: Config) -> None:
    """The checkpoint, by its settings: a teacher of the experiment's data, which can be guided."""
    if config.space is None and any((Path(stage.path) / inside).is_dir() for inside in ("vae", INSIDE)):
        wrong = "a model of pixels; this one works on the latents of an autoencoder"
        right = "with space=latent and a stage of kind pretrained_autoencoder it may"
        raise ConfigError(f"{key}.path={stage.path}: must be {wrong} ({right})")
    found = read_checkpoint(stage, config.data.image_size, weights=False)
    _check_kind(f"{key}.path", stage, found)
    shape = sample_shape(config)
    right = f"a model of images {shape}, as data={config.data.name} has; this one's are {found.network.input_shape}"
    require(found.network.input_shape == shape, f"{key}.path", stage.path, right)
    _check_condition(f"{key}.path", stage, found, config)
    if brings_own_network(config):
        for name in ("network", "schedule", "prediction"):
            fits = getattr(config, name) == getattr(Config(), name)
            require(fits, name, getattr(config, name), f"left out: {key} brings its own")


def _check_kind(key: str, stage: PretrainedConfig, found: NetworkDenoiser) -> None:
    kind = "guided" if found.takes_guidance else "teacher" if found.trained is None else found.trained.kind
    require(kind == "teacher", key, stage.path, f"a teacher, without input for w; this is a model of kind {kind}")


def _check_condition(key: str, stage: PretrainedConfig, found: NetworkDenoiser, config: Config) -> None:
    """Classes or text, as the data have them, and what stands for neither."""
    data = config.data
    if config.text is None and not found.takes_text:
        classes = found.network.num_classes
        has = "none" if classes is None else f"{classes} and that one"
        right = f"a model of {data.num_classes} classes and one more index, the last, for none; this one has {has}"
        return require(bool(classes == data.num_classes), key, stage.path, right)
    text = f"a model of {'classes' if config.text is None else 'text'}, as data={data.name} asks"
    require(found.takes_text == (config.text is not None), key, stage.path, text)
    if found.text_encoder is None:
        right = "saved with a fewstep.models.TextEncoder, or with CLIP's text_encoder/ and tokenizer/ in its folder; "
        right += "this one takes embeddings of an encoder that is not here"
        raise ConfigError(f"{key}={stage.path}: must be a model {right} ({OTHERWISE})")
    assert config.text is not None  # as it takes text
    asks = config_of(found).get("settings", {}).get("cross_attention_dim", found.text_encoder.width)
    right = f"a model that takes embeddings of its encoder's {found.text_encoder.width} channels; this one takes {asks}"
    require(asks == found.text_encoder.width, key, stage.path, right)
    if config.text.tokenizer == PRETRAINED:
        return
    if isinstance(found.text_encoder, ClipTextEncoder):
        right = f"{PRETRAINED}: {key}={stage.path} brings CLIP's encoder"
        raise ConfigError(f"text.tokenizer={config.text.tokenizer}: must be {right}; use text={PRETRAINED}")
    for name, value in found.text_encoder.config.items():
        asked = getattr(config.text, name)
        require(asked == value, f"text.{name}", asked, f"{value}, as the encoder of {key}={stage.path} has")


def check_convert(key: str, stage: ConvertConfig, config: Config) -> None:
    """The fine-tuning of a teacher to another prediction."""
    needs_one(key, stage, config, "teacher", "pretrained")
    one_of(f"{key}.to", stage.to, ("v", "x", "flow"))


def check_distillable(key: str, stage: StageConfig, config: Config) -> StageConfig:
    """The teacher that `stage` needs: of any prediction but eps, which says nothing of x where there is only noise."""
    teacher: StageConfig = needs_one(key, stage, config, *TEACHERS)
    right = f"x, v or flow for {key}: let it need a stage of kind convert, which fine-tunes the teacher to v"
    if isinstance(teacher, PretrainedConfig):
        found = read_checkpoint(teacher, config.data.image_size, weights=False).prediction
        require(found != "eps", f"stages.{teacher.name}.path", teacher.path, f"of a model that predicts {right}")
    elif not isinstance(teacher, ConvertConfig):
        require(config.prediction != "eps", "prediction", "eps", right)
    return teacher


def check_student(key: str, stage: GuideConfig | HalveConfig, config: Config) -> None:
    """A network of its own is the experiment's, with changes; a teacher that is read is none of that kind."""
    source = source_of(stage, config)
    if source is not None and stage.student.network != StudentNetworkConfig():
        right = f"left out: students of {source.name} are copies of its network"
        raise ConfigError(f"{key}.student.network: must be {right}")


def check_other_schedule(key: str, schedule: dict[str, object], teacher: StageConfig, config: Config) -> None:
    """One that the teacher can go on to: between VP and VE the scale of z is all that changes."""
    if not schedule:
        return
    new, old = check_schedule(key, schedule), check_schedule("schedule", config.schedule)
    source = source_of(teacher, config)
    if source is not None:
        found = read_checkpoint(source, config.data.image_size, weights=False)
        old = found.schedule
        right = f"{{}}: {source.name} is a network that takes indices, which stays on the schedule of these"
        require(found.time_input != "index" or new == old, key, schedule["type"], right)
    right = f"of a kind that a network on schedule={type(old).__name__} can go on to (vp and ve, or flow alike)"
    require(new.kind == old.kind or "flow" not in (new.kind, old.kind), key, schedule["type"], right)


def source_of(stage: StageConfig, config: Config) -> PretrainedConfig | None:
    """The stage that read the checkpoint which `stage` rests on, if one did."""
    before = (config.stages[name] for name in ancestry(config, stage.name))
    return next((found for found in before if isinstance(found, PretrainedConfig)), None)
