"""A folder of images with captions: what pairs with what, what is left out and said, the split by groups."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_configs import EXPERIMENTS
from PIL import Image

from fewstep.lab.compose import compose
from fewstep.lab.config import Config, ConfigError
from fewstep.lab.data import load_data

ROOT = EXPERIMENTS.parent


def config(folder: Path, *overrides: str) -> Config:
    more = ["data.num_classes=2", "data.heldout=8", "data.image_size=16", f"data.folder.path={folder}"]
    more += ["~stages.edits", "stages.grid.alignment=[]"]  # of pictures that the checker can read
    more += ["stages.grid.allow_few_samples=true", *overrides]
    return compose(EXPERIMENTS / "shapes_text", ["preset=debug", "data=emoji", *more])


def write(folder: Path, lines: list[dict[str, str] | str], images: list[str]) -> None:
    for i, name in enumerate(images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, 2 * i, 250)).save(folder / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text + "\n", encoding="utf-8")


def captions(names: list[str]) -> list[dict[str, str] | str]:
    """Two classes in turn, three images to a group; few images are a group each."""
    size = 3 if len(names) > 3 else 1
    return [
        {"file": n, "text": f"café number {i}", "group": f"group {i // size}", "class": "ab"[i % 2]}
        for i, n in enumerate(names)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = [f"sub/{i}.png" if i % 2 else f"{i}.png" for i in range(30)]
    lines = captions(names)
    write(tmp_path, [*lines, {"file": "gone.png", "text": "no image"}, ""], [*names, "silent.png", "sub/mute.png"])
    return tmp_path


def test_pairs_stay_pairs_and_the_rest_is_said(folder: Path) -> None:
    """Images beside other images' captions, or dropped without a word, spoil training unseen."""
    said = r"1 captions without an image \(gone.png\); 2 images without a caption \(silent.png, sub/mute.png\)"
    with pytest.warns(UserWarning, match=f"{said}; they are left out, 30 pairs remain"):
        data = load_data(config(folder).data)
    found = 0
    for split in (data.train, data.heldout):
        for image, label, text in zip(split.images, split.labels, split.captions, strict=True):
            number = int(text.removeprefix("café number "))
            expected = torch.tensor([number, 2 * number, 250.0]) / 127.5 - 1
            assert torch.allclose(image, expected[:, None, None].expand(3, 16, 16))
            assert label == number % 2
            found += 1
    assert found == 30


def test_groups_are_not_split(folder: Path) -> None:
    """The same emoji in another skin tone is no held-out image; and another order of lines is the same split."""
    with pytest.warns(UserWarning, match="left out"):
        data = load_data(config(folder).data)
    sides = [{int(text.split()[-1]) // 3 for text in split.captions} for split in (data.train, data.heldout)]
    assert not sides[0] & sides[1]
    assert len(data.heldout) == 6  # two groups of 3 fit into 8
    lines = (folder / "captions.jsonl").read_text().splitlines()
    (folder / "reversed.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.warns(UserWarning, match="left out"):
        again = load_data(config(folder, "data.folder.captions=reversed.jsonl").data)
    assert set(again.heldout.captions) == set(data.heldout.captions)


def test_images_of_other_sizes(tmp_path: Path) -> None:
    """On white where they are transparent, their middle square, not squeezed."""
    write(tmp_path, captions(["a.png", "b.png"]), ["b.png"])
    wide = Image.new("RGBA", (64, 32), (255, 0, 0, 255))
    wide.paste((0, 0, 255, 0), (16, 0, 48, 32))  # the middle is transparent
    wide.save(tmp_path / "a.png")
    data = load_data(config(tmp_path, "data.heldout=1").data)
    (image,) = [s.images[i] for s in (data.train, data.heldout) for i, t in enumerate(s.captions) if t.endswith("0")]
    assert torch.equal(image, torch.ones(3, 16, 16))


@pytest.mark.parametrize(
    ("lines", "override", "message"),
    [
        (["{"], "", r"captions.jsonl:1: must be a JSON object with \"file\" and \"text\""),
        ([{"file": "a.png"}], "", r"captions.jsonl:1: must be a JSON object"),
        ([{"file": "a.png", "text": 3}], "", r"captions.jsonl:1: .* must be texts"),
        ([{"file": "b.png", "text": "b"}], "", "data.folder.captions=captions.jsonl: must be captions of images in"),
        (captions(["a.png", "c.png"]), "data.num_classes=5", "data.num_classes=5: must be 2, those in the captions"),
        ([{"file": n, "text": "x", "group": "g", "class": n} for n in ("a.png", "c.png")], "",
         "must be of two groups or more"),
        (captions(["a.png", "c.png"]), "data.heldout=2", "data.heldout=2: must be between 1 and 1"),
        (captions(["a.png", "c.png"]), "data.folder.path=nowhere", "data.folder.path=nowhere: must be a folder"),
        (captions(["a.png", "c.png"]), "data.folder.captions=no.jsonl", "no.jsonl: must be a file of JSON lines"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be(lines: list[dict[str, str] | str], override: str, message: str, tmp_path: Path) -> None:
    """Named before any training."""
    write(tmp_path, lines, ["a.png", "c.png"])
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, *filter(None, [override]))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    """Which of ten thousand files it is."""
    write(tmp_path, captions(["a.png", "c.png"]), ["a.png", "c.png"])
    (tmp_path / "c.png").write_bytes(b"not a picture")
    with pytest.raises(ConfigError, match=r"c.png: not an image that can be read"):
        load_data(config(tmp_path, "data.heldout=1").data)


def test_the_emoji_tool(tmp_path: Path) -> None:
    """Skin tones of one emoji in one group, from an archive to a folder that loads."""
    spec = importlib.util.spec_from_file_location("emoji_folder", ROOT / "tools" / "emoji_folder.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    groups = {
        "waving hand: light skin tone": "waving hand", "waving hand": "waving hand", "keycap: #": "keycap: #",
        "man: dark skin tone, red hair": "man: red hair", "man: red hair": "man: red hair",
        "kiss: man, woman, light skin tone, medium-dark skin tone": "kiss: man, woman",
        "kiss: person, person, light skin tone, dark skin tone": "kiss",
    }  # fmt: skip
    assert {text: tool.without_tones(text) for text in groups} == groups
    pixels = np.random.default_rng(0).integers(0, 256, (len(groups), 16, 16, 3), dtype=np.uint8)
    names, classes = ([word.format(i=i, k="xy"[i % 2]) for i in range(len(groups))] for word in ("{i}.png", "{k}"))
    np.savez(tmp_path / "a.npz", x=pixels, caption=list(groups), group=classes, fname=names)
    assert tool.main(str(tmp_path / "a.npz"), str(tmp_path / "out")) == 0
    data = load_data(config(tmp_path / "out", "data.heldout=2").data)
    tones = [{tool.without_tones(text) for text in split.captions} for split in (data.train, data.heldout)]
    assert not tones[0] & tones[1]
    number = list(groups).index(data.train.captions[0])
    written = ((data.train.images[0] + 1) * 127.5).round().byte().permute(1, 2, 0)
    assert torch.equal(written, torch.tensor(pixels[number]))
