"""Feature extractors by name: torch-fidelity's Inception, CLIP and DINOv2, and classifiers of our own.

Nothing is downloaded: weights lie at a given path or in torch's cache (`torch.hub.get_dir()`), else a message says
where they are to be had and to lie. No pickle is run: files of PyTorch are read with `weights_only`, CLIP's as
TorchScript.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP
from torch_fidelity.feature_extractor_clip import MODEL_URLS as CLIP_URLS
from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA as DINO
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from fewstep.lab.classifier import load_classifier
from fewstep.lab.config import ConfigError
from fewstep.lab.parts import digest_of
from fewstep.lab.pictures import to_levels

from .statistics import INCEPTION

CLASSIFIER = "classifier"
DINO_REPO, DINO_URL = "facebookresearch_dinov2_main", "https://dl.fbaipublicfiles.com/dinov2"
NAMES = (INCEPTION, *CLIP, *DINO)
OPTIONS = ("--features ", "--weights ")


class Seen(NamedTuple):
    """features (B, D) and class logits (B, K), or None of an extractor without classes; float32."""

    features: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Extractor:
    """A network that sees images.

    name: as statistics name it. network: takes images and gives a tuple of features and maybe logits. as_bytes: it
    takes 8-bit RGB, as published numbers have it; otherwise floats in [-1, 1].
    """

    name: str
    network: nn.Module
    device: torch.device
    as_bytes: bool

    @cached_property
    def weights(self) -> str:
        """Digest of the weights."""
        return digest_of({name: tensor.cpu() for name, tensor in self.network.state_dict().items()})

    def __call__(self, images: Tensor) -> Seen:
        """What it sees in images (B, C, H, W), C 1 or 3, clamped to [-1, 1]."""
        images = images.to(self.device)
        found = to_levels(images) if self.as_bytes else images.clamp(-1, 1)
        with torch.inference_mode():
            features, *logits = (layer.float().cpu() for layer in self.network(found))
        return Seen(features, logits[0] if logits else None)


def load_extractor(name: str, device: torch.device, weights: Path | None = None) -> Extractor:
    """The extractor of that name: one of NAMES, or the folder of a classifier of our own.

    weights: a file of them, in place of that in torch's cache; not of DINOv2, which torch.hub loads.

    Raises:
        ConfigError: unknown name, or weights that are not there or damaged; says where they are to lie.
    """
    path = (found := find_extractor(name, weights)) and str(found)
    if name not in NAMES:
        return Extractor(CLASSIFIER, load_classifier(Path(name)).to(device), device, as_bytes=False)
    layers = ["dinov2"] if name in DINO else ["clip"] if name in CLIP else ["2048", "logits_unbiased"]
    try:
        with _without_pickles():
            network = create_feature_extractor(
                name, layers, cuda=False, verbose=False, feature_extractor_weights_path=path
            )
    except Exception as error:  # of unpicklers, TorchScript and state dicts, many types
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path or torch.hub.get_dir()}: no weights of {name} ({reason})") from error
    return Extractor(name, network.to(device), device, as_bytes=True)


def find_extractor(name: str, weights: Path | None = None, options: tuple[str, str] = OPTIONS) -> Path | None:
    """The file of its weights, or None where there is no single one; loads nothing.

    options: what name and weights were given by, for messages.

    Raises:
        ConfigError: as `load_extractor`.
    """
    if name not in NAMES:
        if not Path(name).is_dir():
            raise ConfigError(f"{options[0]}{name}: must be one of {', '.join(NAMES)}, or the folder of a classifier")
        if weights is not None:
            raise ConfigError(f"{options[1]}{weights}: must be left out for the folder of a classifier, which has them")
        return None
    if name in DINO:
        _find_dino(name, weights, options[1])
        return None
    return _find(name, weights, options[1])


def _find(name: str, given: Path | None, option: str) -> Path:
    """The file of weights of Inception or CLIP; one in torch's cache must be what its name says."""
    if given is not None:
        if not given.is_file():
            raise ConfigError(f"{option}{given}: must be a file with the weights of {name}")
        return given
    url = URL_INCEPTION_V3 if name == INCEPTION else CLIP_URLS[name]
    file = Path(url).name if name == INCEPTION else f"{name}-{CLIP[name]['hash']}.pt"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    _require(path, name, url, f"or give it with {option.strip(' =')}")
    digest = Path(file).stem.split("-")[-1]
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise ConfigError(f"{path}: must have the SHA-256 {digest}...: it is cut short or damaged; fetch {url} again")
    return path


def _find_dino(name: str, given: Path | None, option: str) -> None:
    """Refuse what torch.hub would fetch: the repository with DINOv2's code, and the weights."""
    if given is not None:
        raise ConfigError(f"{option}{given}: must be left out for {name}: torch.hub looks in {torch.hub.get_dir()}")
    cache = Path(torch.hub.get_dir())
    _require(cache / DINO_REPO, name, "https://github.com/facebookresearch/dinov2", "its code, a clone")
    file = f"{DINO[name]}_pretrain.pth"
    _require(cache / "checkpoints" / file, name, f"{DINO_URL}/{DINO[name]}/{file}", "its weights")


def _require(path: Path, name: str, url: str, more: str) -> None:
    if not path.exists():
        raise ConfigError(f"{name}: {path} is not there: put {url} there ({more})")


@contextmanager
def _without_pickles() -> Iterator[None]:
    """Within, torch.load reads tensors alone, though torch-fidelity asks it to run any pickle."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
