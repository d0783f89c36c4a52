"""The cluster that a command line names where there is no experiment whose config would say it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fewstep.lab import conf
from fewstep.lab.cluster.config import ClusterConfig, problem
from fewstep.lab.config import ConfigError


def chosen(overrides: Sequence[str]) -> ClusterConfig:
    """The choice `cluster=NAME`, or `cluster=FILE.yaml` (local, if none), with keys (`cluster.time=120`) changed.

    Raises:
        ConfigError: no such choice or key, or a value that cannot be.
    """
    names = [override.removeprefix("cluster=") for override in overrides if override.startswith("cluster=")]
    folder = Path(conf.__path__[0]) / "cluster"
    name = names[-1] if names else "local"
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"cluster={name}: no such choice; known: {known}, or a file FILE.yaml")
    try:
        group = OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"cluster={name}: {str(error).splitlines()[0]}") from error
    keys = [override for override in overrides if not override.startswith("cluster=")]
    return changed(cast(ClusterConfig, OmegaConf.to_object(group)), keys)


def changed(cluster: ClusterConfig, overrides: Sequence[str]) -> ClusterConfig:
    """`cluster` with single keys changed.

    Raises:
        ConfigError: another key than those of cluster, or a value that cannot be.
    """
    refuse_others(overrides)
    try:
        changes = OmegaConf.from_dotlist([override.removeprefix("cluster.") for override in overrides])
        merged = OmegaConf.merge(OmegaConf.structured(cluster), changes)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cluster: {str(error).splitlines()[0]}") from error
    found = cast(ClusterConfig, OmegaConf.to_object(merged))
    wrong = problem(found)
    if wrong is not None:
        raise ConfigError(wrong)
    return found


def refuse_others(overrides: Sequence[str]) -> None:
    """Raise unless all are keys of cluster.

    Raises:
        ConfigError: names one that is not.
    """
    for override in overrides:
        if not override.startswith("cluster.") or "=" not in override:
            raise ConfigError(f"{override}: only keys of cluster, such as cluster.time=120, may be given here")
