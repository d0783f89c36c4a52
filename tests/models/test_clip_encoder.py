"""CLIP's text encoder: what transformers makes of the same folders is the truth, through saving and back."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from clip_models import PROMPTS, clip_folder
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, CLIPTokenizerFast

from fewstep.models import ClipTextEncoder


def theirs(folder: Path, prompts: list[str]) -> torch.Tensor:
    """What StableDiffusionPipeline gives its UNet."""
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    model = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    length = tokenizer.model_max_length
    found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(found.input_ids)[0]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])
def test_it_is_that_of_transformers(act: str, padding: str, tmp_path: Path) -> None:
    """Stable Diffusion 1 and 2 differ in both: another padding or activation is a teacher that heard another prompt."""
    clip_folder(tmp_path, padding=padding, hidden_act=act)
    encoder = ClipTextEncoder.read(tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(encoder.encode(PROMPTS)["text"], theirs(tmp_path, PROMPTS), rtol=1e-4, atol=1e-5)
    assert set(encoder.encode(["a"])) == {"text"}
    torch.testing.assert_close(encoder.null_cond["text"], theirs(tmp_path, [""])[0], rtol=1e-4, atol=1e-5)


def test_vocabulary_and_merges_are_enough(tmp_path: Path) -> None:
    """Checkpoints of the time of Stable Diffusion 1 have no tokenizer.json, and other names of weights."""
    clip_folder(tmp_path)
    expected = theirs(tmp_path, PROMPTS)
    described = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    (tmp_path / "tokenizer/vocab.json").write_text(json.dumps(described["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in described["merges"])
    (tmp_path / "tokenizer/merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    weights = load_file(tmp_path / "text_encoder/model.safetensors")
    older = {f"text_model.{name}": weight.half() for name, weight in weights.items()}
    older["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    save_file(older, tmp_path / "text_encoder/model.safetensors")
    encoder = ClipTextEncoder.read(tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(encoder.encode(PROMPTS)["text"], expected, rtol=1e-2, atol=1e-2)
        tokens = encoder.tokenize(PROMPTS)["tokens"]
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokens.tolist() == tokenizer(PROMPTS, padding="max_length", max_length=9, truncation=True).input_ids


def test_what_is_cut_is_said(tmp_path: Path) -> None:
    """A style at the end of a prompt that nobody reads is a mystery to its writer."""
    encoder = ClipTextEncoder.read(clip_folder(tmp_path))
    with pytest.warns(UserWarning, match=r"has 9 tokens, more than the 7 that this encoder reads: 'b c' was cut off"):
        encoder.encode(["a b c a b c a b c"])


def test_saved_and_written_again(tmp_path: Path) -> None:
    """By our own format bit for bit, and as a pipeline's folders for transformers."""
    encoder = ClipTextEncoder.read(clip_folder(tmp_path / "theirs", padding="!"))
    encoder.save(tmp_path / "ours")
    again = ClipTextEncoder.load(tmp_path / "ours")
    assert again.digest == encoder.digest
    assert torch.equal(again.encode(["a b"])["text"], encoder.encode(["a b"])["text"])
    again.write(tmp_path / "written")
    expected = theirs(tmp_path / "theirs", ["a b", "c"])
    torch.testing.assert_close(theirs(tmp_path / "written", ["a b", "c"]), expected)


def test_mistakes(tmp_path: Path) -> None:
    """Named before anything is trained; settings are enough to see most of them."""
    folder = clip_folder(tmp_path)
    assert ClipTextEncoder.read(folder, weights=False).device.type == "meta"
    with pytest.raises(ValueError, match="mask must be None"):
        ClipTextEncoder.read(folder)(torch.zeros(1, 9, dtype=torch.int64), torch.ones(1, 9))
    settings = folder / "text_encoder/config.json"
    content = json.loads(settings.read_text())
    for change, message in (
        ({"model_type": "t5"}, "a text encoder of type 't5'; CLIP's alone is known"),
        ({"hidden_act": "relu"}, "hidden_act='relu': must be one of quick_gelu, gelu"),
        ({"vocab_size": 3}, "vocab_size=3: the tokenizer has"),
    ):
        settings.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            ClipTextEncoder.read(folder, weights=False)
    settings.write_text(json.dumps(content | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"model.safetensors does not fit its config.json"):
        ClipTextEncoder.read(folder)
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json, nor vocab.json and merges.txt"):
        ClipTextEncoder.read(folder)
    settings.unlink()
    with pytest.raises(FileNotFoundError, match=r"the folder must hold CLIP's text encoder"):
        ClipTextEncoder.read(folder)
