"""Extractors through torch-fidelity's registry: found, read without pickles, shown the bytes that papers show them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP
from torch_fidelity.feature_extractor_clip import CLIPVisual
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from fewstep.lab.classifier import Classifier, save_classifier
from fewstep.lab.config import ConfigError
from fewstep.lab.metrics.clip_score import ClipScore
from fewstep.lab.metrics.extractors import load_extractor

CPU = torch.device("cpu")
MEAN, STD = (torch.tensor(each)[:, None, None] for each in ((0.48145466, 0.4578275, 0.40821073),
                                                            (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip


def images(count: int = 3, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, size, size, generator=generator) * 2.4 - 1.2


def levels(x: Tensor) -> Tensor:
    """What an 8-bit file of these images holds."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().expand(-1, 3, -1, -1)


class TinyInception(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no type information
    """Inception's interface, and torch-fidelity's way to read weights, at eight by eight pixels."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object) -> None:
        super().__init__(name, features_list)
        self.fc = nn.Linear(192, 4)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    get_provided_features_list = staticmethod(FeatureExtractorInceptionV3.get_provided_features_list)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        assert x.dtype == torch.uint8
        features = x.flatten(1).float()
        found = {"2048": features, "logits_unbiased": self.fc(features)}
        return tuple(found[name] for name in self.features_list)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache, empty, no network, and Inception a tiny one."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "inception-v3-compat", TinyInception)

    def no_network(*_: object, **__: object) -> None:
        raise torch.hub.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub"


def tiny_weights(path: Path) -> Path:
    torch.manual_seed(0)
    torch.save({"fc.weight": torch.randn(4, 192), "fc.bias": torch.randn(4)}, path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_sees_rounded_bytes_in_three_channels(cache: Path, channels: int) -> None:
    """Papers measure 8-bit files: unrounded or unclamped images are another FID, and no error says so."""
    extractor = load_extractor("inception-v3-compat", CPU, tiny_weights(cache / "mine.pth"))
    x = images(channels=channels)
    found = extractor(x)
    assert torch.equal(found.features, levels(x).flatten(1))
    weights = torch.load(cache / "mine.pth", weights_only=True)
    torch.testing.assert_close(found.logits, levels(x).flatten(1) @ weights["fc.weight"].T + weights["fc.bias"])
    other = tiny_weights(cache / "other.pth")
    torch.save({**weights, "fc.bias": torch.zeros(4)}, other)
    assert load_extractor("inception-v3-compat", CPU, other).weights != extractor.weights


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("inception-v3-compat", "checkpoints/weights-inception-2015-12-05-6726825d.pth"),
        ("clip-vit-b-32", f"checkpoints/clip-vit-b-32-{CLIP['clip-vit-b-32']['hash']}.pt"),
        ("dinov2-vit-s-14", "facebookresearch_dinov2_main"),
    ],
)
def test_missing_weights_say_where_to_put_which_file(cache: Path, name: str, place: str) -> None:
    """On a cluster without a network a download that hangs, or a stack of urllib, helps nobody."""
    with pytest.raises(ConfigError, match=rf"{name}: {re.escape(str(cache / place))} is not there: put https://"):
        load_extractor(name, CPU)


def test_a_cut_file_in_the_cache_is_refused_and_no_pickle_is_run(cache: Path, tmp_path: Path) -> None:
    """A download that broke off would be another extractor; a pickle may run anything."""
    path = cache / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    tiny_weights(path)
    with pytest.raises(ConfigError, match=r"must have the SHA-256 6726825d"):
        load_extractor("inception-v3-compat", CPU)
    flag = tmp_path / "was-run"

    class Malicious:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return os.mkdir, (str(flag),)

    torch.save(Malicious(), tmp_path / "malicious.pth")
    with pytest.raises(ConfigError, match="no weights of inception-v3-compat"):
        load_extractor("inception-v3-compat", CPU, tmp_path / "malicious.pth")
    assert not flag.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    with pytest.raises(ConfigError, match=r"--weights .*gone.pth: must be a file"):
        load_extractor("inception-v3-compat", CPU, tmp_path / "gone.pth")


class TinyOpenAI(nn.Module):
    """The parameters that torch-fidelity looks for in OpenAI's archives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = CLIPVisual(6, 8, 1, 64, 4).visual
        self.text_projection = nn.Parameter(torch.zeros(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


def test_clip_reads_openais_archive_and_normalises_as_clip_does(cache: Path) -> None:
    """Another mean, or weights that were not read, give features of no CLIP."""
    tiny = TinyOpenAI().eval()
    for weight in tiny.parameters():  # torch-fidelity rounds them to 16 bits, as OpenAI's are
        weight.data = weight.data.half().float()
    torch.jit.trace(tiny, torch.zeros(1, 3, 8, 8)).save(str(cache / "tiny.pt"))
    extractor = load_extractor("clip-vit-b-32", CPU, cache / "tiny.pt")
    found = extractor(images())
    torch.testing.assert_close(found.features, tiny((levels(images()) / 255 - MEAN) / STD), atol=1e-5, rtol=1e-4)
    assert found.logits is None


HUBCONF = """
import torch

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(3.0))

    def forward(self, x):
        return x.mean((2, 3)) * self.w

def dinov2_vits14(pretrained=True):
    return Tiny()
"""


def test_dinov2_comes_from_torchs_hub(cache: Path) -> None:
    """The code path that loads the real one, with a tiny model in its place in the hub's cache."""
    repo = cache / "facebookresearch_dinov2_main"
    repo.mkdir()
    (repo / "hubconf.py").write_text(HUBCONF)
    with pytest.raises(ConfigError, match=r"dinov2_vits14_pretrain.pth is not there: put https://dl.fb.*its weights"):
        load_extractor("dinov2-vit-s-14", CPU)
    (cache / "checkpoints" / "dinov2_vits14_pretrain.pth").touch()
    found = load_extractor("dinov2-vit-s-14", CPU)(torch.full((2, 3, 8, 8), 1.0))
    normalised = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(found.features, (normalised * torch.arange(3.0)).repeat(2, 1))
    with pytest.raises(ConfigError, match=r"--weights w.pth: must be left out"):
        load_extractor("dinov2-vit-s-14", CPU, Path("w.pth"))


def test_a_classifier_of_our_own_sees_floats_and_is_known_by_its_weights(tmp_path: Path) -> None:
    """Rounded to bytes it would not be what the run's own judge sees; statistics of another one must be told apart."""
    torch.manual_seed(0)
    first, second = Classifier(1, 4, width=8).eval(), Classifier(1, 4, width=8).eval()
    for name, classifier in (("first", first), ("second", second)):
        save_classifier(classifier, tmp_path / name)
    found, other = (load_extractor(str(tmp_path / name), CPU) for name in ("first", "second"))
    x = images(channels=1)
    features, logits = first(x.clamp(-1, 1))
    seen = found(x)
    torch.testing.assert_close(seen.features, features)
    assert seen.logits is not None
    torch.testing.assert_close(seen.logits, logits)
    assert (found.name, other.name) == ("classifier", "classifier")
    assert found.weights != other.weights
    with pytest.raises(ConfigError, match="--features inception: must be one of inception-v3-compat, clip-rn50"):
        load_extractor("inception", CPU)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A CLIP of a few thousand weights with a tokenizer of a few letters, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [*"abc", *(f"{letter}</w>" for letter in "abc"), "<|startoftext|>", "<|endoftext|>"]
    text = {**small, "vocab_size": 8, "bos_token_id": 6, "eos_token_id": 7, "max_position_embeddings": 6}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=5)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    CLIPTokenizerFast(vocab=vocabulary, merges=[], model_max_length=6).save_pretrained(tmp_path / "clip")
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessor(**size).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("channels", [1, 3])
def test_clip_score_is_the_cosine_of_each_image_and_its_own_prompt(clip: Path, channels: int) -> None:
    """By the formula from the model's parts; if pairs are mixed up, or pixels scaled twice, alignment means nothing."""
    model = CLIPModel.from_pretrained(clip).eval()
    x, prompts = images(channels=channels), ["a b", "c", "b a c"]
    tokens = [[6, 3, 4, 7], [6, 5, 7], [6, 4, 3, 5, 7]]
    expected = []
    for image, ids in zip(levels(x), tokens, strict=True):
        seen = model.visual_projection(model.vision_model((image / 255 - MEAN)[None] / STD).pooler_output)
        said = model.text_projection(model.text_model(torch.tensor([ids])).pooler_output)
        expected.append(F.cosine_similarity(seen, said))
    torch.testing.assert_close(ClipScore.load(str(clip), CPU)(x, prompts), torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_clip_score_refuses_what_it_cannot_use(clip: Path, tmp_path: Path) -> None:
    """A prompt too few would shift every pair; a folder that is none must say so before anything is sampled."""
    with pytest.raises(ValueError, match="got 3 images and 1 prompts"):
        ClipScore.load(str(clip), CPU)(images(), ["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"--clip .*empty: must be a folder of transformers' CLIP"):
        ClipScore.load(str(tmp_path / "empty"), CPU)
