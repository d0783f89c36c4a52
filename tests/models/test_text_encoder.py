"""Tokenizers and the text encoder: what a prompt's embedding depends on, what is cut, files."""

import json
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import perturbed

from fewstep.models import BPETokenizer, ByteTokenizer, TextEncoder
from fewstep.models.tokenizer import END, PADDING, Tokenizer, tokenizer_from_config

CORPUS = [f"a {kind} circle left of a blue square" for kind in ("large red", "large green", "small red", "small green")]
STRANGE = ["naïve café ☕", "日本語", "[PAD] </s> [END]", "  two  spaces ", ""]


def encoder(tokenizer: Tokenizer, **overrides: int) -> TextEncoder:
    torch.manual_seed(0)
    made = TextEncoder(tokenizer, **{"width": 16, "depth": 2, "heads": 2, "length": 24, **overrides})
    perturbed(made, std=0.1)
    return made.eval()


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(CORPUS, 300)


def test_tokenizers_know_every_text(bpe: BPETokenizer) -> None:
    """A word outside the corpus must not become an unknown token, nor special words the end of a prompt."""
    for tokenizer in (ByteTokenizer(), bpe, tokenizer_from_config(json.loads(json.dumps(bpe.to_config())))):
        for text in (*CORPUS, *STRANGE):
            numbers = tokenizer.encode(text)
            assert tokenizer.decode(numbers) == text
            assert not {PADDING, END} & set(numbers)
            assert all(number < tokenizer.size for number in numbers)


def test_bpe_learns_the_words(bpe: BPETokenizer) -> None:
    """Otherwise prompts are as long as bytes; trained twice it must be the same, or a run could not be repeated."""
    assert len(bpe.encode(CORPUS[0])) <= 12
    assert len(ByteTokenizer().encode(CORPUS[0])) == len(CORPUS[0])
    assert bpe.size <= 300
    assert BPETokenizer.train(CORPUS, 300).to_config() == bpe.to_config()
    with pytest.raises(ValueError, match="size=100: must be at least 258"):
        BPETokenizer.train(CORPUS, 100)


def test_a_missing_library_names_the_extra(bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who installed without it must read what to install."""
    config = bpe.to_config()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: BPETokenizer.train(CORPUS), lambda: tokenizer_from_config(config)):
        with pytest.raises(ImportError, match=r"pip install 'fewstep-models\[text\]'"):
            call()
    assert ByteTokenizer().encode("a") == [99]


def test_a_prompt_depends_on_itself_alone() -> None:
    """On its own words in their order; not on the prompts beside it, nor on what pads it."""
    made = encoder(ByteTokenizer())
    prompts = ["red left of blue", "blue left of red", "", "a"]
    with torch.no_grad():
        together = made.encode(prompts)
        for i, prompt in enumerate(prompts):
            alone = made.encode([prompt])
            torch.testing.assert_close(alone["text"][0], together["text"][i], rtol=0, atol=1e-5)
        assert together["text_mask"].sum(1).tolist() == [17, 17, 1, 2]
        assert not together["text"][~together["text_mask"]].any()
        assert (together["text"][0, 16] - together["text"][1, 16]).abs().max() > 1e-3  # the same bytes, another order
        noisy = made.tokenize(prompts)
        noisy["tokens"] = torch.where(noisy["text_mask"], noisy["tokens"], 77)
        assert torch.equal(made(noisy["tokens"], noisy["text_mask"]), together["text"])


def test_the_empty_prompt_is_the_null_condition() -> None:
    """What dropping trains and what guidance uses must be one thing."""
    made = encoder(ByteTokenizer())
    with torch.no_grad():
        assert torch.equal(made.null_cond["text"], made.encode([""])["text"][0])
    assert made.null_tokens["tokens"].tolist() == [END] + [PADDING] * 23
    assert made.null_cond["text_mask"].tolist() == [True] + [False] * 23
    assert not made.null_cond["text"].requires_grad


@pytest.mark.filterwarnings("error")
def test_a_long_prompt_is_cut_and_said() -> None:
    """A prompt whose end has no effect is a riddle unless the warning says what was lost."""
    made = encoder(ByteTokenizer(), length=9)
    exact = made.encode(["12345678"])
    assert exact["text_mask"].all()
    with pytest.warns(UserWarning, match="'12345678 and more' has 17 tokens, more than the 8 .*: ' and more' was cut"):
        cut = made.encode(["12345678 and more"])
    assert torch.equal(cut["text"], exact["text"])


def test_saved_and_loaded(bpe: BPETokenizer, tmp_path: Path) -> None:
    """Bit for bit from the files, tokenizer included; whatever else lies there is refused."""
    made = encoder(bpe)
    made.save(tmp_path / "encoder")
    loaded = TextEncoder.load(tmp_path / "encoder")
    with torch.no_grad():
        assert torch.equal(loaded.encode([*CORPUS, "unseen ☕"])["text"], made.encode([*CORPUS, "unseen ☕"])["text"])
    assert loaded.digest == made.digest
    with torch.no_grad():
        loaded.positions[0, 0] += 1e-3
    assert loaded.digest != made.digest
    weights, config = (tmp_path / "encoder" / name for name in ("model.safetensors", "config.json"))
    content, text = weights.read_bytes(), config.read_text()
    for path, damaged in (
        (weights, content[:-1]), (config, text.replace('"heads": 2', '"heads": 3')), (config, "{"),
        (config, text.replace('"type": "bpe"', '"type": "words"')),
        (config, text.replace('"format": "fewstep-text-encoder"', '"format": "fewstep-denoiser"')),
    ):  # fmt: skip
        weights.write_bytes(content)
        config.write_text(text)
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        with pytest.raises(ValueError, match="does not hold a text encoder"):
            TextEncoder.load(tmp_path / "encoder")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        TextEncoder.load(tmp_path / "encoder")


@pytest.mark.parametrize(
    ("wrong", "message"), [({"heads": 3}, "width=16 must be a multiple"), ({"length": 1}, "length=1")]
)
def test_sizes_that_do_not_fit(wrong: dict[str, int], message: str) -> None:
    """Said at once."""
    with pytest.raises(ValueError, match=message):
        encoder(ByteTokenizer(), **wrong)
    with pytest.raises(ValueError, match="prompts must be a list of texts, got 'a red circle'"):
        encoder(ByteTokenizer()).encode("a red circle")


def test_positions_begin_as_waves_as_large_as_the_tokens() -> None:
    """From random ones the order of two words is learned three times as slowly; faint ones would drown."""
    torch.manual_seed(0)
    encoder = TextEncoder(ByteTokenizer(), width=64, length=16)
    first, slowest = encoder.positions[:, 0], encoder.positions[:, 31]
    torch.testing.assert_close(first, 0.02 * 2**0.5 * torch.arange(16.0).sin())
    torch.testing.assert_close(slowest, 0.02 * 2**0.5 * (torch.arange(16.0) / 1e4).sin())
    size = encoder.positions.square().mean().sqrt()
    torch.testing.assert_close(size, encoder.tokens.weight.std(), rtol=0.02, atol=0)
    assert TextEncoder(ByteTokenizer(), width=5, heads=1).positions.shape == (32, 5)
