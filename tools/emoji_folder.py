"""Write a folder for `data=emoji` from an archive of emoji: PNGs and captions.jsonl, skin tones grouped.

    python tools/emoji_folder.py noto_emoji_64rgb.npz build/emoji

The archive holds x (N, H, W, 3) uint8, caption, group and fname (N,), as text.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def without_tones(caption: str) -> str:
    """The emoji's name without its skin tones: "waving hand: light skin tone" is "waving hand".

    Of two people in two tones the names say "person, person" too: "kiss: person, person, light skin tone, dark skin
    tone" is "kiss".
    """
    name, _, details = caption.partition(": ")
    kept = [detail for detail in details.split(", ") if detail and not detail.endswith("skin tone")]
    return f"{name}: {', '.join(kept)}" if kept not in ([], ["person", "person"]) else name


def main(archive: str, folder: str) -> int:
    """Write it; returns the exit code."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    found = np.load(archive, allow_pickle=False)
    lines = []
    names = zip(found["x"], found["caption"].tolist(), found["group"].tolist(), found["fname"].tolist(), strict=True)
    for pixels, caption, group, name in names:
        Image.fromarray(pixels).save(out / name)
        line = {"file": name, "text": caption, "group": without_tones(caption), "class": group}
        lines.append(json.dumps(line, ensure_ascii=False))
    (out / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} emoji in {out}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", help="an .npz file")
    parser.add_argument("folder", help="to be written, e.g. build/emoji")
    arguments = parser.parse_args()
    sys.exit(main(arguments.archive, arguments.folder))
