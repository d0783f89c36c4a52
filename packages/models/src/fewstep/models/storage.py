"""A denoiser as a folder: `model.safetensors` and `config.json`, never a pickle, never half written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fewstep.models.clip_encoder import ClipTextEncoder
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.files import kind_of
from fewstep.models.network import Network, build_network
from fewstep.models.text_encoder import TextEncoder
from fewstep.schedules import Trained, schedule_from_config

FORMAT = "fewstep-denoiser"
VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
TEXT_ENCODER = "text_encoder"
ENCODERS: tuple[type[TextEncoder], ...] = (TextEncoder, ClipTextEncoder)
KEYS = ("network", "schedule", "prediction", "time_input", "trained", "sha256")


def save(denoiser: NetworkDenoiser, path: str | os.PathLike[str]) -> None:
    """Write the folder `path`: weights, every setting that `load` needs (the guidance form among them), text encoder.

    Written beside `path` and then renamed, so `path` is either the whole new model, the whole old one, or (for the
    moment between two renames) absent; never a mixture.

    Raises:
        ValueError: not a NetworkDenoiser around a UNet or DiT (of a GuidedDenoiser, save `.denoiser`).
        FileExistsError: path is a file.
    """
    path = Path(path)
    if not isinstance(denoiser, NetworkDenoiser) or not isinstance(denoiser.network, Network):
        raise ValueError(f"save takes a NetworkDenoiser around a UNet or DiT, got {type(denoiser).__name__}")
    weights = safetensors.torch.save({k: v.contiguous() for k, v in denoiser.network.state_dict().items()})
    config = json.dumps(_settings(denoiser, weights), indent=2) + "\n"
    with new_folder(path) as new:
        _write(new / WEIGHTS, weights)
        _write(new / CONFIG, config.encode())
        if denoiser.text_encoder is not None:
            denoiser.text_encoder.save(new / TEXT_ENCODER)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to write to; it takes the place of `path` at the end, unless there is an error.

    Raises:
        FileExistsError: path is a file.
    """
    _refuse_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / "new"
        new.mkdir()
        yield new
        if path.exists():
            path.rename(Path(folder) / "old")
        new.rename(path)


def _refuse_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: save writes a folder")


def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, weights: bool = True
) -> NetworkDenoiser:
    """Read what `save` wrote, bit for bit, in eval mode; nothing in the files is ever executed.

    weights: False reads the settings (and the text encoder) alone and gives a denoiser on the meta device: what it is,
    in no time.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is damaged, of a newer version, or does not fit the network that it describes.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file: load takes the folder that save wrote ({WEIGHTS} and {CONFIG}), no pickle")
    config = _read_config(path)
    tensors = _read_weights(path, config["sha256"]) if weights else None
    try:
        with torch.device("meta"):
            network = build_network(config["network"])
        schedule = schedule_from_config(config["schedule"])
        trained = None if config["trained"] is None else Trained(**config["trained"])
        denoiser = NetworkDenoiser(
            network, schedule, config["prediction"], time_input=config["time_input"], trained=trained
        )
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path / CONFIG} does not describe a denoiser: {error}") from None
    encoder = _read_text_encoder(path, config.get(TEXT_ENCODER))
    if tensors is None:
        return denoiser.to("meta").use_text_encoder(encoder).eval()
    _check_tensors(path, network, tensors)
    network.load_state_dict(tensors, assign=True)
    denoiser.use_text_encoder(encoder)
    return denoiser.to(device).to(memory_format=torch.channels_last).eval()


def _read_text_encoder(path: Path, digest: str | None) -> TextEncoder | None:
    if digest is None:
        return None
    encoder = kind_of(path / TEXT_ENCODER, ENCODERS).load(path / TEXT_ENCODER)
    if encoder.digest != digest:
        raise ValueError(f"{path / TEXT_ENCODER} is not the text encoder that {CONFIG} describes (SHA-256 differs)")
    return encoder


def _settings(denoiser: NetworkDenoiser, weights: bytes) -> dict[str, Any]:
    trained = denoiser.trained
    return {
        "format": FORMAT,
        "version": VERSION,
        "network": denoiser.network.config,
        "schedule": denoiser.schedule.to_config(),
        "prediction": denoiser.prediction,
        "time_input": denoiser.time_input,
        "trained": None if trained is None else dataclasses.asdict(trained),
        "sha256": hashlib.sha256(weights).hexdigest(),
        TEXT_ENCODER: None if denoiser.text_encoder is None else denoiser.text_encoder.digest,
    }


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing: load takes a folder with {WEIGHTS} and {CONFIG}") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path / CONFIG))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{path / CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path / CONFIG} was not written by fewstep.models.save (format is not {FORMAT!r})")
    if config.get("version") != VERSION:
        raise ValueError(
            f"{path / CONFIG} has format version {config.get('version')!r}, this fewstep reads {VERSION}: "
            "update fewstep, or save the model again"
        )
    missing = [key for key in KEYS if key not in config]
    if missing:
        raise ValueError(f"{path / CONFIG} lacks the keys {missing}")
    return config


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    content = _read(path / WEIGHTS)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path / WEIGHTS} is damaged or is not the file that {CONFIG} describes (SHA-256 differs)")
    try:
        return {name: tensor.clone() for name, tensor in safetensors.torch.load(content).items()}  # torch's alignment
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is not a safetensors file: {error}") from None


def _check_tensors(path: Path, network: Network, tensors: dict[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    both = sorted(expected.keys() & found.keys())
    shapes = [f"{name} {found[name]} instead of {expected[name]}" for name in both if found[name] != expected[name]]
    problems = [
        f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", extra), ("misshaped", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"{path / WEIGHTS} does not fit its network ({network.config['type']}): {'; '.join(problems)}")
