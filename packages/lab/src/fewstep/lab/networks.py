"""Networks as an experiment's config asks for them: built, fitted to the data, initialised from a teacher."""

from typing import Any, cast

from fewstep.lab.config import Config, ConfigError, NetworkConfig, StudentNetworkConfig
from fewstep.lab.latents import sample_shape
from fewstep.models import PRESETS, NetworkDenoiser, build_network, init_from, with_guidance_input
from fewstep.schedules import Prediction, schedule_from_config


def build_denoiser(config: Config, network: NetworkConfig, prediction: Prediction | None = None) -> NetworkDenoiser:
    """A freshly initialised denoiser of the experiment's data, schedule and (by default) prediction, on the CPU.

    Raises:
        ConfigError: unknown type, preset or override, or one that contradicts the data.
    """
    arguments = network_arguments(config, network)
    try:
        built = build_network(arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"network: {error}") from error
    predicts = prediction or cast(Prediction, config.prediction)
    return NetworkDenoiser(built, schedule_from_config(config.schedule), predicts)


def network_arguments(config: Config, network: NetworkConfig) -> dict[str, Any]:
    """What `build_network` is given: the preset, the overrides, and sizes that the data dictate.

    Raises:
        ConfigError: unknown type or preset, or an override that contradicts the data.
    """
    presets = PRESETS.get(network.type)
    if presets is None:
        raise ConfigError(f"network.type={network.type}: must be one of {', '.join(PRESETS)}")
    if network.preset not in presets:
        raise ConfigError(f"network.preset={network.preset}: {network.type} has {', '.join(presets)}")
    data = config.data
    known = {"num_classes": data.num_classes} if config.text is None else {
        "num_classes": None, "text_width": config.text.width
    }  # fmt: skip
    channels, size, _ = sample_shape(config)
    sizes = {"image_size": size, "in_channels": channels, **known}
    for key, value in sizes.items():
        if network.overrides.get(key, value) != value:
            raise ConfigError(f"network.overrides.{key}={network.overrides[key]}: {data.name} has {value}")
    return {"type": network.type, **presets[network.preset], **network.overrides, **sizes}


def own_network(config: Config, student: StudentNetworkConfig) -> NetworkConfig | None:
    """The student's network where `student.network` sets one of its own, else None: a copy of the teacher."""
    if student.type is None and student.preset is None and not student.overrides:
        return None
    return NetworkConfig(
        type=student.type or config.network.type,
        preset=student.preset or config.network.preset,
        overrides={**config.network.overrides, **student.overrides},
    )


def config_of(denoiser: NetworkDenoiser) -> dict[str, Any]:
    """The config of its network, as `build_network` reads it."""
    return cast(dict[str, Any], denoiser.network.config)


def guided_student(
    teacher: NetworkDenoiser, own: NetworkDenoiser | None, form: str, w_range: tuple[float, float]
) -> NetworkDenoiser:
    """A student that takes w: a copy of the teacher, or `own` with every layer of the teacher's that matches.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). A copy starts as exactly the teacher's
    conditional branch, whatever w.
    """
    if own is None:
        return with_guidance_input(teacher, form, w_range)
    student = with_guidance_input(own.use_text_encoder(teacher.text_encoder), form, w_range)
    init_from(student.network, teacher.network)
    return student


def on_schedule(denoiser: NetworkDenoiser, settings: dict[str, Any]) -> NetworkDenoiser:
    """The same network under another schedule, or itself for {}: what `schedules.reschedule` gives, but trainable and
    saved with that schedule.

    VP and VE differ only in the scale of z, and the network sees z at unit scale and the angle of its log-SNR.

    Raises:
        ConfigError: from a flow schedule to another kind or back, or a network that takes indices as times.
    """
    if not settings:
        return denoiser
    schedule = schedule_from_config(settings)
    if ("flow" in (schedule.kind, denoiser.schedule.kind) and schedule.kind != denoiser.schedule.kind) or (
        denoiser.time_input == "index" and schedule != denoiser.schedule
    ):
        raise ConfigError(f"schedule={settings}: a network on {denoiser.schedule} cannot go on from there unchanged")
    return NetworkDenoiser(
        denoiser.network, schedule, denoiser.prediction, time_input=denoiser.time_input, trained=denoiser.trained,
        text_encoder=denoiser.text_encoder,
    )  # fmt: skip


def with_dropout(denoiser: NetworkDenoiser, dropout: float | None) -> NetworkDenoiser:
    """The same denoiser with another probability of dropout, in [0, 1); None leaves what it has.

    Raises:
        ConfigError: its network has no dropout to set.
    """
    config = config_of(denoiser)
    arguments = config.get("settings", config)  # a network of diffusers has its own there
    if dropout is None or dropout == arguments.get("dropout", 0.0):
        return denoiser
    if "dropout" not in arguments:
        raise ConfigError(f"dropout={dropout}: {config['type']} has none; use null")
    changed = {**arguments, "dropout": dropout}
    network = build_network({**config, "settings": changed} if "settings" in config else changed)
    network.load_state_dict(denoiser.network.state_dict())
    trained, time_input = denoiser.trained, denoiser.time_input
    return NetworkDenoiser(
        network, denoiser.schedule, denoiser.prediction, time_input=time_input, trained=trained,
        text_encoder=denoiser.text_encoder,
    )  # fmt: skip
