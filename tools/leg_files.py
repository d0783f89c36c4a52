"""The folder of a run as a few small files that travel between machines, and back to the same bits.

`run.zip` has what is small: configs, records, metrics, results, pictures, the judge. Beside it lie the weights of
each model in bfloat16, `<stage>.safetensors` or `<stage>.steps_<N>.safetensors`: exact, since a run with
`weights=bf16` saves no others.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECORDS = "run.zip"
MOST_FILES, MOST_BYTES = 8, 15 * 2**20     # what comes back from the machine
WEIGHTS, SETTINGS = "model.safetensors", "config.json"
LEFT_BEHIND = {"checkpoints", "cache", "tensorboard", ".lock"}


class LegError(ValueError):
    """A mistake of the user's: its message is one line."""


def pack(run: Path, out: Path, known: set[str]) -> list[Path]:
    """Write the files of `run` to `out`: the records of all stages, and the models that are finished and not `known`.

    known: names of models, as `models` gives them.

    Raises:
        LegError: too many files, a file too large, or weights that bfloat16 does not hold.
    """
    out.mkdir(parents=True, exist_ok=True)
    new = {name: folder for name, folder in models(run).items() if name not in known}
    made = [_pack_weights(folder, out / f"{name}.safetensors") for name, folder in new.items()]
    made.append(_pack_records(run, out / RECORDS))
    large = [path.name for path in made if path.stat().st_size > MOST_BYTES]
    if large:
        most = f"{MOST_BYTES / 2**20:g} MiB"
        raise LegError(f"{out}: {', '.join(large)} over {most} would not come back: take a smaller network")
    if len(made) > MOST_FILES:
        raise LegError(f"{out}: {len(made)} files, of which {MOST_FILES} come back: train fewer students in a leg")
    return made


def models(run: Path) -> dict[str, Path]:
    """Folders of the denoisers of `run` whose trainings are finished, by the names of their files."""
    settings = sorted(run.glob(f"*/model/{SETTINGS}")) + sorted(run.glob(f"*/steps_*/model/{SETTINGS}"))
    folders = [path.parent for path in settings if _is_denoiser(path.read_bytes())]
    done = [folder for folder in folders if (folder.parent / "DONE").is_file()]
    return {".".join(folder.parent.relative_to(run).parts): folder for folder in done}


def recorded(files: Path) -> tuple[set[str], set[str]]:
    """The finished stages, and the names of finished models, of which the records in `files` tell."""
    with _opened(files) as archive:
        names = set(archive.namelist())
        done = {name.split("/")[0] for name in names if name.count("/") == 1 and name.endswith("/DONE")}
        ends = f"/model/{SETTINGS}"
        folders = [name.removesuffix(ends) for name in names if name.endswith(ends)]
        trained = [folder for folder in folders if f"{folder}/DONE" in names]
        models = {folder.replace("/", ".") for folder in trained if _is_denoiser(archive.read(folder + ends))}
    return done, models


def restore(files: Path, run: Path) -> None:
    """Put what `pack` wrote to `files` back in place; models whose weights are not there stay without.

    Raises:
        LegError: no records there, or weights that are not those that were packed.
    """
    with _opened(files) as archive:
        archive.extractall(run)
    for name, folder in models(run).items():
        if (files / f"{name}.safetensors").is_file():
            _restore_weights(files / f"{name}.safetensors", folder)


def _opened(files: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(files / RECORDS)
    except (OSError, zipfile.BadZipFile) as error:
        raise LegError(f"{files / RECORDS}: missing or damaged; give the folder of files that a leg left") from error


def _pack_records(run: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in _small(run):
            archive.write(file, file.relative_to(run))
    return path


def _small(run: Path) -> Iterator[Path]:
    """All but checkpoints, samples, and weights of denoisers."""
    for file in sorted(run.rglob("*")):
        parts = file.relative_to(run).parts
        heavy = file.suffix == ".safetensors" and not _is_judge(file)
        if file.is_file() and not heavy and not LEFT_BEHIND & set(parts) and not any(p.startswith(".") for p in parts):
            yield file


def _is_judge(weights: Path) -> bool:
    settings = weights.with_name(SETTINGS)
    return weights.name == WEIGHTS and settings.is_file() and "classifier" in json.loads(settings.read_text())


def _is_denoiser(settings: bytes) -> bool:
    return "schedule" in json.loads(settings)


def _pack_weights(folder: Path, path: Path) -> Path:
    from safetensors.torch import load_file, save_file

    halves = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        halves[name] = weight.bfloat16() if weight.is_floating_point() else weight
        if not halves[name].to(weight.dtype).equal(weight):
            raise LegError(f"{folder}: its weights are no bfloat16 numbers; legs need weights=bf16")
    save_file(halves, path)
    return path


def _restore_weights(path: Path, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    settings: Mapping[str, Any] = json.loads((folder / SETTINGS).read_text())
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LegError(f"{path}: damaged") from error
    content = save({name: each.float() if each.is_floating_point() else each for name, each in tensors.items()})
    if hashlib.sha256(content).hexdigest() != settings["sha256"]:
        raise LegError(f"{path}: not the weights that {RECORDS} tells of")
    (folder / WEIGHTS).write_bytes(content)
