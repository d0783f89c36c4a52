"""Work on an experiment that falls into shards, each a job of an array: see `fewstep.lab.cluster.arrays.Shards`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from fewstep.lab.config import Config
    from fewstep.lab.progress import Tell


class ConfigShards(ABC):
    """Work whose jobs read the config that was kept when they were sent."""

    def __call__(
        self, folder: Path, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """The shard of a submission."""
        from fewstep.lab.cluster.ledger import Submission, read_config

        return self.make(read_config(Submission(folder, "slurm")), shard, shards, stop, console, tell)

    @abstractmethod
    def make(
        self, config: Config, shard: int, shards: int, stop: Callable[[], bool], console: Console, tell: Tell
    ) -> bool:
        """Make what is missing of this shard; False if stopped before the end."""
