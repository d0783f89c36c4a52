"""What a stage's folder says of itself: the config and commit it was made with, and whether it is finished.

`config.yaml`: the part of the resolved config that this stage rests on. `run.json`: commit, versions, processes,
threads. `DONE`: written last.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from fewstep.kernels.benchmark.results import commit_of
from fewstep.lab import distributed
from fewstep.lab.checkpoint import write_text
from fewstep.lab.config import Config, ConfigError
from fewstep.lab.sources import Source, refuse_changed

COMMIT = "fewstep.commit"  # beside a copy of the code that was taken at submission: the commit it was taken of
_SAME_BITS = ("world_size", "threads", "torch")  # what a call must share with the one before to give its bits


def relevant(config: Config, stage: str, *, results_only: bool = False) -> dict[str, Any]:
    """The config that `stage` rests on: all of it but the stages that it does not need, as nested dicts and lists.

    results_only: leave out the keys that may change between two calls (progress, logging, saving).
    """
    plain = _plain(config, results_only)
    return {**plain, "stages": {name: plain["stages"][name] for name in ancestry(config, stage)}}


def refuse_mixing(config: Config, stage: str, folder: Path) -> None:
    """Raise if `folder` was made with a config that gives other results.

    Raises:
        ConfigError: names the first such key, its old and its new value; or a file of the folder that is damaged, or of
            the checkpoint that it was made from and that is another now.
    """
    read_calls(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        return
    # Both as they read back from a file: two configs are equal exactly when their files are.
    old, new = _read(path, _from_yaml, _is_config), relevant(config, stage)
    free = set(_paths(relevant(config, stage))) - set(_paths(relevant(config, stage, results_only=True)))
    for key, before, now in _changes(old, _from_yaml(_to_yaml(new))):
        if key not in free:
            raise ConfigError(
                f"{key}={_show(now)}: {folder} was made with {_show(before)}; put that back, or choose another out=, "
                f"or delete the folder and those made from it"
            )
    made = config.stages[stage]
    if isinstance(made, Source):
        refuse_changed(made, folder)


def first_change(old: Config, new: Config) -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of the first key that changes a result; None if there is none."""
    trees = (_from_yaml(_to_yaml(_plain(config, True))) for config in (old, new))
    return next(_changes(*trees), None)


def begin(config: Config, stage: str, folder: Path) -> None:
    """Write `config.yaml` and `run.json`; the latter keeps a list with one entry per call."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", _to_yaml(relevant(config, stage)))
    calls = read_calls(folder)
    write_text(folder / "run.json", json.dumps([*calls, _circumstances()], indent=1) + "\n")


def interrupt(folder: Path, seconds: float) -> None:
    """Write to `run.json` how long the call lasted that `begin` entered there and that did not finish the stage."""
    *before, last = read_calls(folder)
    write_text(folder / "run.json", json.dumps([*before, {**last, "seconds": round(seconds, 3)}], indent=1) + "\n")


def finish(folder: Path, seconds: float) -> None:
    """Write `DONE`: nothing in the folder is touched after it."""
    write_text(folder / "DONE", json.dumps({"seconds": round(seconds, 3), "finished": _now()}) + "\n")


def is_done(folder: Path) -> bool:
    """Whether the stage in that folder is finished."""
    return (folder / "DONE").is_file()


def read_calls(folder: Path) -> list[dict[str, Any]]:
    """What `run.json` says of each call that worked in this folder, the oldest first.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / "run.json"
    return list(_read(path, json.loads, _are_calls)) if path.is_file() else []


def other_circumstances(folder: Path) -> str | None:
    """Why going on in this folder will not give the bits of an uninterrupted run, in a few words; None if it will."""
    calls = read_calls(folder)
    now = _circumstances()
    for key in _SAME_BITS:
        if calls and calls[-1][key] != now[key]:
            return f"{key} was {calls[-1][key]}, is {now[key]}"
    return None


def commit() -> str:
    """The git commit of the code that runs, with "+changes" where files differ from it; "unknown" outside a clone."""
    here = Path(__file__).parent
    copied = here.parents[1] / COMMIT
    if copied.is_file():
        return copied.read_text().strip()
    return commit_of(here)


def _circumstances() -> dict[str, Any]:
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "world_size": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "started": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def ancestry(config: Config, stage: str) -> list[str]:
    """The stages that `stage` rests on, each after those it rests on itself, and `stage` last."""
    found: list[str] = []
    for need in config.stages[stage].needs:
        found += [name for name in ancestry(config, need) if name not in found]
    return [*found, stage]


def _plain(value: Any, results_only: bool) -> Any:
    if is_dataclass(value):
        kept = [f for f in fields(value) if not results_only or f.metadata.get("result", True)]
        return {f.name: _plain(getattr(value, f.name), results_only) for f in kept}
    if isinstance(value, dict):
        return {key: _plain(item, results_only) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, results_only) for item in value]
    return value


def _to_yaml(tree: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _from_yaml(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.create(text))


def _read(path: Path, parse: Callable[[str], Any], fits: Callable[[Any], bool]) -> Any:
    """What a file of a stage's folder holds, if it can be parsed and fits."""
    try:
        found = parse(path.read_text())
    except OSError:
        raise
    except Exception:  # parsers of YAML raise errors of many types, even AssertionError
        found = None
    if fits(found):
        return found
    text = f"{path} is damaged: restore it, or delete {path.parent} and the stages made from it to do them anew"
    raise ConfigError(text)


def _is_config(found: Any) -> bool:
    return isinstance(found, dict) and "stages" in found


def _are_calls(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(_is_call(call) for call in found)


def _is_call(found: Any) -> bool:
    return isinstance(found, dict) and all(key in found for key in _SAME_BITS)


def _changes(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of every leaf in which two nested dicts differ; an absent one is None."""
    if isinstance(new, dict) and old is None:  # a part of the config that is newer than the folder
        old = {}
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield prefix, old, new
        return
    for key in dict.fromkeys([*old, *new]):
        yield from _changes(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))


def _paths(tree: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(tree, dict):
        yield prefix
        return
    for key, value in tree.items():
        yield from _paths(value, f"{prefix}.{key}" if prefix else str(key))


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
