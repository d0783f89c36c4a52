"""What a stage function is given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fewstep.lab.config import Config
from fewstep.lab.progress import PROGRESS, Tell, teller


def never() -> bool:
    """Of `stopping`: nobody asks to."""
    return False


def unfenced() -> None:
    """The fence of a folder that no other process can claim."""


@dataclass(frozen=True)
class StageContext:
    """The arguments of `run(ctx)`, the one function of every `fewstep.lab.stages.*` module.

    config: the whole experiment. stage: this stage's own entry (`GuideConfig`, `EvaluateConfig`, ...). inputs: name ->
    folder of each stage in `stage.needs`, all of them finished. out: this stage's folder; what lies in it from an
    interrupted call is to be gone on from. stopping: true once the user or the cluster asked to stop: save, then raise
    `Interrupted`. fence: called before every write, raises once another attempt has claimed the folder. instead: takes
    the place of training, given method and seed. strict: warnings about a model used outside what it was trained for
    are errors.
    """

    config: Config
    stage: Any
    inputs: dict[str, Path]
    out: Path
    device: torch.device
    console: Console = field(default_factory=Console)
    stopping: Callable[[], bool] = never
    fence: Callable[[], None] = unfenced
    instead: Callable[[Any, int], None] | None = None
    strict: bool = False

    @property
    def tell(self) -> Tell:
        """Says how far sampling is, for `fewstep status`."""
        return teller(self.out / PROGRESS)

    def inputs_of_kind(self, *kinds: str) -> dict[str, Path]:
        """The inputs whose stage is of such a kind ("teacher", "guide", "halve", ...), in the order of `needs`."""
        return {name: path for name, path in self.inputs.items() if self.config.stages[name].kind in kinds}


class Interrupted(Exception):
    """The stage saved its state and stopped because it was asked to; `fewstep run` again goes on from there."""
