"""What can be wrong with latent space: the autoencoder, and who is to work on its latents."""

from fewstep.lab.autoencoding import ERRORS
from fewstep.lab.checks import one_of, positive, require
from fewstep.lab.config import (
    AutoencoderConfig,
    Config,
    ConfigError,
    PretrainedAutoencoderConfig,
    PretrainedConfig,
    TrainingConfig,
)
from fewstep.lab.latents import LATENT, PICTURES, AutoencoderStage, read_autoencoder
from fewstep.lab.record import ancestry

PIXELS_ONLY = ("invert",)  # kinds of stages that know images alone


def check_autoencoder(key: str, stage: AutoencoderConfig, config: Config) -> None:
    """The autoencoder's training."""
    positive(key, stage, "latent_channels", "channels", "blocks", "chunk")
    one_of(f"{key}.error", stage.error, tuple(ERRORS))
    require(stage.kl >= 0, f"{key}.kl", stage.kl, "0 or more")
    fits = bool(stage.channel_mult) and all(mult >= 1 for mult in stage.channel_mult)
    require(fits, f"{key}.channel_mult", stage.channel_mult, "at least one number, each 1 or more")
    size, halvings = config.data.image_size, len(stage.channel_mult) - 1
    right = f"of fewer levels: image_size={size} does not halve {halvings} times"
    require(size % 2**halvings == 0, f"{key}.channel_mult", stage.channel_mult, right)


def check_pretrained_autoencoder(key: str, stage: PretrainedAutoencoderConfig, config: Config) -> None:
    """The autoencoder of a checkpoint, by its settings."""
    positive(key, stage, "chunk")
    require(config.space == LATENT, "space", config.space, f"{LATENT} with {key}")
    found, channels = read_autoencoder(stage, config.data.image_size, weights=False), config.data.channels
    right = f"an autoencoder of {channels} channels, as data={config.data.name} has; this one's are"
    fits = found.image_shape[0] == channels
    require(fits, f"{key}.path", stage.path, f"{right} {found.image_shape[0]}")


def check_space(config: Config) -> None:
    """In latent space there is one autoencoder, and whatever trains a denoiser rests on it."""
    if config.space is None:
        return
    one_of("space", config.space, (LATENT,))
    flips = config.data.files is not None and config.data.files.flips
    require(not flips, "data.files.flips", "true", f"false with space={LATENT}: latents are kept of images as they are")
    found = [name for name, stage in config.stages.items() if isinstance(stage, AutoencoderStage)]
    if len(found) != 1:
        raise ConfigError(f"space={LATENT}: must have exactly one stage of kind autoencoder, not {len(found)}")
    trained = isinstance(config.stages[found[0]], AutoencoderConfig)
    refused = (*PIXELS_ONLY, "pretrained") if trained else PIXELS_ONLY  # a checkpoint knows its own latents alone
    for name, stage in config.stages.items():
        require(stage.kind not in refused, f"stages.{name}.kind", stage.kind, f"left out with space={LATENT}")
        trains = isinstance(stage, TrainingConfig) and not isinstance(stage, PICTURES)
        if trains or isinstance(stage, PretrainedConfig):
            right = f"such that {name} rests on {found[0]}, whose latents it works on"
            require(found[0] in ancestry(config, name), f"stages.{name}.needs", stage.needs, right)
