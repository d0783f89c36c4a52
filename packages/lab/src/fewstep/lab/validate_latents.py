"""What can be wrong with latent space: the autoencoder, and who is to work on its latents."""

from fewstep.lab.autoencoding import ERRORS
from fewstep.lab.checks import one_of, positive, require
from fewstep.lab.config import AutoencoderConfig, ClassifierConfig, Config, ConfigError, TrainingConfig
from fewstep.lab.latents import LATENT
from fewstep.lab.record import ancestry

PIXELS_ONLY = ("invert", "pretrained")  # kinds of stages that know images alone


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


def check_space(config: Config) -> None:
    """In latent space there is one autoencoder, and whatever trains a denoiser rests on it."""
    if config.space is None:
        return
    one_of("space", config.space, (LATENT,))
    flips = config.data.files is not None and config.data.files.flips
    require(not flips, "data.files.flips", "true", f"false with space={LATENT}: latents are kept of images as they are")
    found = [name for name, stage in config.stages.items() if isinstance(stage, AutoencoderConfig)]
    if len(found) != 1:
        raise ConfigError(f"space={LATENT}: must have exactly one stage of kind autoencoder, not {len(found)}")
    for name, stage in config.stages.items():
        require(stage.kind not in PIXELS_ONLY, f"stages.{name}.kind", stage.kind, f"left out with space={LATENT}")
        if isinstance(stage, TrainingConfig) and not isinstance(stage, ClassifierConfig | AutoencoderConfig):
            right = f"such that {name} rests on {found[0]}, whose latents it is trained on"
            require(found[0] in ancestry(config, name), f"stages.{name}.needs", stage.needs, right)
