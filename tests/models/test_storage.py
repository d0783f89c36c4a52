"""save and load: bit for bit, every setting, and every damaged or foreign file refused in one line."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from model_helpers import batch, denoiser, perturbed

from fewstep.models import GuidedDenoiser, NetworkDenoiser, load, save, with_guidance_input
from fewstep.schedules import Cosine, Discrete, Karras, RectifiedFlow, Trained

KINDS = pytest.mark.parametrize("kind", ["UNet", "DiT"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save(denoiser("UNet"), path)
    return path


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A saved model to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def rewrite(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json as a dict."""
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))


def rewrite_weights(model: Path, content: bytes) -> None:
    """Other weights with a checksum that fits them: the damage is in what they say."""
    (model / "model.safetensors").write_bytes(content)
    rewrite(model, lambda config: config.update(sha256=hashlib.sha256(content).hexdigest()))


def refused(model: Path, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load(model)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


@KINDS
@pytest.mark.parametrize("form", [None, "normalized", "diffusers"])
def test_round_trip_is_bitwise(kind: str, form: str | None, tmp_path: Path) -> None:
    """A model that comes back with other weights or settings samples other images."""
    before = denoiser(kind, dropout=0.1)
    if form:
        before = with_guidance_input(before, form, w_range=(2.0, 14.0))
        perturbed(before.network.conditioning.guidance)
    before.trained = Trained("deterministic", steps=4, w_range=(2.0, 14.0) if form else None)
    save(before.train(), tmp_path / "a" / "model")
    state = torch.random.get_rng_state()
    after = load(tmp_path / "a" / "model")
    assert torch.equal(torch.random.get_rng_state(), state)  # loading must not change what is drawn next
    z, t, y = batch()
    w = torch.tensor([2.0, 7.0, 14.0]) if form else None
    assert torch.equal(after(z, t, y, w), before.eval()(z, t, y, w))
    assert not after.training
    assert all(p.requires_grad for p in after.parameters())
    for setting in ("schedule", "prediction", "time_input", "trained"):
        assert getattr(after, setting) == getattr(before, setting)
    assert after.network.config == before.network.config
    theirs = before.network.state_dict()
    for name, value in after.network.state_dict().items():
        assert torch.equal(value, theirs[name])
        assert value.stride() == theirs[name].stride()  # channels_last stays


@pytest.mark.parametrize(
    ("schedule", "prediction", "time_input"),
    [
        (Cosine(-15.0, 10.0, shift=-1.4), "x", "angle"),
        (Discrete(torch.linspace(0.999, 0.01, 50).double()), "eps", "index"),
        (Karras(sigma_max=50.0), "x", "angle"),
        (RectifiedFlow(), "flow", "angle"),
    ],
    ids=["cosine", "discrete", "karras", "flow"],
)
def test_settings_round_trip(schedule, prediction, time_input, tmp_path: Path) -> None:
    """A schedule that is off by a rounding of its constants is another schedule."""
    before = NetworkDenoiser(denoiser("DiT").network, schedule, prediction, time_input=time_input).eval()
    save(before, tmp_path / "model")
    after = load(tmp_path / "model")
    assert (after.schedule, after.prediction, after.time_input) == (schedule, prediction, time_input)
    z, t, y = batch()
    assert torch.equal(after(z, t, y), before(z, t, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights kept in another precision must come back in it, not rounded through float32."""
    before = denoiser("DiT").to(dtype)
    save(before, tmp_path / "model")
    state, after = before.state_dict(), load(tmp_path / "model").state_dict()
    assert all(after[name].dtype == dtype and torch.equal(after[name], value) for name, value in state.items())


def test_overwrites_whole(tmp_path: Path) -> None:
    """Saving again replaces both files, and nothing else stays in the folder or beside it."""
    save(denoiser("UNet"), tmp_path / "model")
    (tmp_path / "model" / "stray").write_text("from before")
    second = denoiser("DiT")
    save(second, tmp_path / "model")
    assert load(tmp_path / "model").network.config == second.network.config
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of writing must cost the new model only."""
    first = denoiser("UNet")
    save(first, tmp_path / "model")

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save(denoiser("DiT"), tmp_path / "model")
    assert load(tmp_path / "model").network.config == first.network.config
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    """A GuidedDenoiser saved as its inside would come back unguided; a folder must not replace somebody's file."""
    plain = denoiser("UNet")
    with pytest.raises(ValueError, match="save takes a NetworkDenoiser around a UNet or DiT, got GuidedDenoiser"):
        save(GuidedDenoiser(plain, plain.null_cond), tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file: save writes a folder"):
        save(plain, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_files(model: Path, tmp_path: Path) -> None:
    """A path that is wrong must be named."""
    refused(tmp_path / "nowhere", FileNotFoundError, r"nowhere.config.json is missing")
    (model / "model.safetensors").unlink()
    refused(model, FileNotFoundError, r"model.safetensors is missing")
    (model / "config.json").unlink()
    refused(model, FileNotFoundError, r"config.json is missing")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(model: Path, keep: int) -> None:
    """A copy that broke off must not load as far as it goes."""
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:keep])
    refused(model, ValueError, "model.safetensors is damaged")
    rewrite_weights(model, content[:keep])
    refused(model, ValueError, "model.safetensors is not a safetensors file")


@pytest.mark.parametrize("place", [20, 20_000, -1])
def test_flipped_bit(model: Path, place: int) -> None:
    """One wrong bit in a weight gives a model that looks right and is not."""
    content = bytearray((model / "model.safetensors").read_bytes())
    content[place] ^= 1
    (model / "model.safetensors").write_bytes(content)
    refused(model, ValueError, "SHA-256 differs")


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def test_pickles_are_refused(model: Path, tmp_path: Path) -> None:
    """A pickle can run any program: it must never be opened, whatever its name and checksum."""
    content = pickle.dumps(Malicious())
    (tmp_path / "model.pt").write_bytes(content)
    refused(tmp_path / "model.pt", ValueError, "is a file: load takes the folder that save wrote .* no pickle")
    rewrite_weights(model, content)
    refused(model, ValueError, "not a safetensors file")
    torch.save({"a": torch.zeros(3)}, model / "model.safetensors")
    rewrite_weights(model, (model / "model.safetensors").read_bytes())
    refused(model, ValueError, "not a safetensors file")
    (model / "config.json").write_bytes(content)
    refused(model, ValueError, "config.json is not JSON")


def test_wrong_tensors(model: Path) -> None:
    """Weights of another network must be refused by name, not loaded as far as they fit."""
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    name = "conv_out.weight"
    cases = {
        rf"UNet\): missing: {name}$": {k: v for k, v in tensors.items() if k != name},
        r"UNet\): unexpected: extra$": tensors | {"extra": torch.zeros(2)},
        rf"UNet\): misshaped: {name} \(1, 16, 3\) instead of \(1, 16, 3, 3\)$": tensors | {name: torch.zeros(1, 16, 3)},
        r"missing: .*, .*, .* \.\.\.; unexpected: a, b$": {"a": torch.zeros(2), "b": torch.zeros(2)},
    }
    for message, content in cases.items():
        rewrite_weights(model, safetensors.torch.save(content))
        refused(model, ValueError, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["network"].update(type="UViT"), r"'UViT' is unknown: use one of DiT, DiffusersNetwork, UNet"),
        (lambda c: c["network"].update(widht=3), r"unknown keys \['widht'\]"),
        (lambda c: c["network"].pop("channels"), r"missing keys \['channels'\]"),
        (lambda c: c.update(network=3), "does not describe a denoiser"),
        (lambda c: c["network"].update(channels="many"), "does not describe a denoiser"),
        (lambda c: c["network"].update(heads=0), "does not describe a denoiser"),
        (lambda c: c["schedule"].update(type="Sine"), "schedule type='Sine' is unknown"),
        (lambda c: c["schedule"].update(sihft=1), "no setting 'sihft'"),
        (lambda c: c.update(prediction="epsilon"), "'epsilon' is unknown"),
        (lambda c: c.update(time_input="hours"), "'hours' is unknown"),
        (lambda c: c.update(trained={"kind": "pupil"}), "'pupil' is unknown"),
        (lambda c: c.update(version=2), "has format version 2, this fewstep reads 1: update fewstep"),
        (lambda c: c.update(format="other"), "was not written by fewstep.models.save"),
        (lambda c: c.pop("sha256"), r"lacks the keys \['sha256'\]"),
        (lambda c: c.pop("time_input"), r"lacks the keys \['time_input'\]"),
        (lambda c: c["network"].update(guidance={"form": "fourier", "w_range": [0, 4]}), "'fourier' is unknown"),
        (lambda c: c["network"].update(guidance={"form": "normalized"}), "does not describe a denoiser"),
    ],
)
def test_wrong_config(model: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """A config that another program or version wrote must be refused by the key that is wrong."""
    rewrite(model, change)
    refused(model, ValueError, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "fewstep-denoiser"', "\x80\x81"])
def test_config_that_is_none(model: Path, text: str) -> None:
    """A truncated config, or one that is something else, is an error about config.json."""
    (model / "config.json").write_bytes(text.encode("latin-1"))
    refused(model, ValueError, "config.json (is not JSON|was not written by)")
