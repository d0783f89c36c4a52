"""What was submitted, in `<run>/.cluster/`: a numbered folder per submission, open to its owner alone.

    0001/submission.json   the jobs, by stage          0001/config.yaml   the whole config, `out` absolute
    0001/code/             the code that they run      0001/jobs/         submitit's files and the logs

submitit's pickles lie in `jobs/`: no one else can put one there, a job reads its own when it starts, and nothing else
here ever reads one.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fewstep.lab.checkpoint import write_text
from fewstep.lab.compose import typed
from fewstep.lab.config import STAGES, Config, ConfigError

FOLDER = ".cluster"
PROBE = "probe"  # takes the place of a stage: the job that looks whether nodes see the folder


@dataclass(frozen=True)
class Job:
    """One job. stage: what it does, of its run. name: as Slurm shows it, unlike that of any other job. shards: into how
    many its work falls, 0 for a stage of an experiment; several are an array.
    """

    stage: str
    id: str
    name: str
    tasks: int = 1
    shards: int = 0

    @property
    def elements(self) -> list[str]:
        """Ids of its parts as squeue gives them."""
        return [f"{self.id}_{shard}" for shard in range(self.shards)] if self.shards > 1 else [self.id]


@dataclass
class Submission:
    """What one `fewstep submit` sent. kind: "slurm" or "local". cwd: where it was given: relative paths begin there.

    command: the words after `fewstep` that send the work again, of work that falls into shards.
    """

    folder: Path
    kind: str
    key: str = field(default_factory=lambda: secrets.token_hex(4))
    jobs: list[Job] = field(default_factory=list)
    submitted: float = field(default_factory=time.time)
    cwd: str = field(default_factory=os.getcwd)
    command: list[str] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Its place among the run's submissions, from 1."""
        return int(self.folder.name)

    @property
    def logs(self) -> Path:
        """Where submitit's files and the logs lie."""
        return self.folder / "jobs"

    def save(self) -> None:
        """Write `submission.json`."""
        tree = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_text(self.folder / "submission.json", json.dumps(tree, indent=1) + "\n")

    def job(self, stage: str) -> Job | None:
        """The job of that stage, if this submission has one."""
        return next((job for job in self.jobs if job.stage == stage), None)


def submissions(out: Path) -> list[Submission]:
    """The run's submissions, the oldest first."""
    folders = sorted((out / FOLDER).glob("[0-9]*"))
    return [read(folder) for folder in folders if (folder / "submission.json").is_file()]


def read(folder: Path) -> Submission:
    """The submission in that folder.

    Raises:
        ConfigError: its file is damaged.
    """
    path = folder / "submission.json"
    try:
        tree = json.loads(path.read_text())
        known = {each.name for each in fields(Submission)} & tree.keys()  # an older version wrote others
        return Submission(folder, **{**{key: tree[key] for key in known}, "jobs": [Job(**job) for job in tree["jobs"]]})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: delete {folder} and submit again") from error


def new(out: Path, kind: str) -> Submission:
    """The next submission of the run, its folder made and locked against others; not yet saved.

    Raises:
        ConfigError: the folder is not this user's alone.
    """
    root = out / FOLDER
    number = 1 + max((int(folder.name) for folder in root.glob("[0-9]*")), default=0)
    submission = Submission(root / f"{number:04d}", kind)
    for folder in (submission.folder, submission.logs):
        _make_private(folder)
    return submission


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One submission of a run at a time.

    Raises:
        ConfigError: another is under way.
    """
    _make_private(out / FOLDER)
    with (out / FOLDER / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"out={out}: another `fewstep submit` is at work there; see `fewstep status`") from error
        yield


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{folder}: must belong to you alone (mode 700), since jobs read pickles in it; delete it")


def write_config(submission: Submission, config: Config) -> None:
    """Keep the whole config for the jobs."""
    write_text(submission.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_config(submission: Submission) -> Config:
    """The config that was submitted, typed and checked anew.

    Raises:
        ConfigError: its file is damaged, or of a version that had other keys.
    """
    path = submission.folder / "config.yaml"
    try:
        tree = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
        for name, stage in tree.stages.items():
            tree.stages[name] = OmegaConf.merge(OmegaConf.structured(STAGES[stage.kind]), stage)
    except (OmegaConfBaseException, YAMLError, AttributeError, KeyError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{path}: not a config of this version of fewstep ({words}); submit again") from error
    return typed(tree)
