"""From `experiments/<name>/config.yaml` and `key=value` to one checked `Config`; errors are one line."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fewstep.lab.checks import trained_range
from fewstep.lab.config import STAGES, Config, ConfigError, GridConfig, HalveConfig, StageConfig
from fewstep.lab.pretrained import anchor
from fewstep.lab.sources import Source
from fewstep.lab.validate import validate
from fewstep.lab.validate_teachers import TEACHERS
from fewstep.models import PRESETS

_OPEN = re.compile(r"[\w.@]*\b(overrides\.|sbatch\.|(updates|weight)_at[.=]|stages\.\w+\.schedule[.=])")


def compose(experiment: str | Path, overrides: Sequence[str] = (), *, check: bool = True) -> Config:
    """The experiment's config with `overrides` ("key=value", "group=choice") applied, typed and checked.

    experiment: a folder with `config.yaml`. Its own groups (`preset/`) and those of `fewstep/lab/conf` are both found.
    check: False leaves values unchecked and paths ungiven: to look at an experiment whose data are not here.

    Raises:
        ConfigError: one line that names the key, its value and what would be right.
    """
    folder = Path(experiment)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"experiment={experiment}: no config.yaml in {folder.absolute()}")
    _register()
    GlobalHydra.instance().clear()
    # As an argument and not in every config.yaml: an experiment should not have to know where the groups lie.
    search = "hydra.searchpath=[pkg://fewstep.lab.conf]"
    try:
        with initialize_config_dir(str(folder.absolute()), version_base="1.3"):
            composed = hydra_compose("config", overrides=[search, *map(_open_key, overrides)])
        return typed(composed, check=check)
    except OverrideParseException as error:
        raise ConfigError(f"{error.override}: not what hydra reads as key=value or group=choice") from error
    except MissingConfigException as error:
        raise ConfigError(_missing(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error


def compose_grid(experiment: str | Path, overrides: Sequence[str] = (), *, check: bool = True) -> Config:
    """`compose` for an experiment that measures a grid of w x steps: with a stage `grid` if it has none of that kind.

    Such a stage takes what it needs, and how many samples, from the experiment's last stage of kind evaluate, and its w
    from the curve there; without one it measures the students of all stages of kind halve. `stages.grid.key=value`
    overrides it.

    Raises:
        ConfigError: as `compose`, or there are no students to measure.
    """
    try:
        config = compose(experiment, overrides, check=check)
        if any(stage.kind == "grid" for stage in config.stages.values()):
            return config
    except ConfigError as error:
        if not str(error).startswith("stages.grid: unknown key"):
            raise
    others = [override for override in overrides if not override.startswith("stages.grid.")]
    plain = compose(experiment, others, check=check)
    found = [name for name, stage in plain.stages.items() if stage.kind == "evaluate"]
    if found:
        same = {key: key for key in ("needs", "num_samples", "paired_noises", "steps", "reference", "chunk")}
        keys = {**same, "weights": "curve_weights"}
        taken = [f"stages.grid.{key}=${{stages.{found[-1]}.{source}}}" for key, source in keys.items()]
    else:
        taken = _all_students(plain)
    return compose(experiment, ["+stage@stages.grid=grid", *taken, *overrides], check=check)


def _all_students(config: Config) -> list[str]:
    """Overrides for a grid of every student of the experiment, by its own judge if it trains one.

    Its w are the usual ones or, where students do not know these, the nearest that they know.
    """
    stages = config.stages
    students = {
        name: stage for name, stage in stages.items() if isinstance(stage, HalveConfig) and stage.students != "encoder"
    }
    if not students:
        raise ConfigError(f"stages: {config.name} has no stage of kind grid, evaluate or halve: nothing to measure")
    teachers = [name for name, stage in stages.items() if stage.kind in TEACHERS]
    judges = [name for name, stage in stages.items() if stage.kind == "classifier"]
    steps = sorted({n for stage in students.values() for n in stage.steps}, reverse=True)
    needs = ",".join([*judges[:1], teachers[-1], *students])
    ranges = [trained_range(stage, config) for stage in students.values()]
    weights = sorted({min(max(w, low), high) for w in GridConfig().weights for low, high in ranges})
    return [f"stages.grid.needs=[{needs}]", f"stages.grid.steps={steps}", f"stages.grid.weights={weights}"]


def typed(composed: DictConfig, *, check: bool = True) -> Config:
    """The `Config` of a composed tree: interpolations resolved, stages named by their keys, values checked."""
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise ConfigError("config.yaml: its defaults must begin with `- experiment` (the schema)")
    for name, stage in config.stages.items():
        if not isinstance(stage, StageConfig):
            raise ConfigError(f"stages.{name}: add `- stage@stages.{name}: KIND` to defaults, KIND one of {_kinds()}")
        stage.name = name
        if isinstance(stage, Source):
            anchor(stage)
    if check:
        validate(config)
    return config


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="experiment_schema", node=Config)
    for kind, schema in STAGES.items():
        store.store(group="stage", name=kind, node=schema)


def _open_key(override: str) -> str:
    """Keys below `overrides:` and `updates_at:` are the user's own: hydra's `++` lets them be new."""
    override = re.sub(r"(\w+_at)\.(\d+)=(.+)", r"\1={\2: \3}", override)  # else its key would be a string
    return f"++{override}" if _OPEN.match(override) else override


def _missing(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if not error.options:
        return f"config.yaml: there is no {choice}"
    return f"{group}={choice}: no such choice; known: {', '.join(error.options)}"


def _kinds() -> str:
    return ", ".join(STAGES)


def _one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages span lines and end in type names; say key, value and the nearest known key."""
    cause = _omegaconf_cause(error)
    if cause is None:
        return str(error).splitlines()[0].strip()
    key = str(cause.full_key or cause.key)
    if isinstance(cause, MissingMandatoryValue):
        return f"{key}: must be given, {key}=..."
    first = str(cause.msg or cause).splitlines()[0]
    if cause.parent_node is None or "not in" not in first:
        return f"{key}: {first}"
    return f"{key}: unknown key{_suggestion(key, cause.parent_node)}"


def _omegaconf_cause(error: BaseException | None) -> OmegaConfBaseException | None:
    while error is not None:
        if isinstance(error, OmegaConfBaseException):
            return error
        error = error.__cause__
    return None


def _suggestion(key: str, parent: Any) -> str:
    """'; did you mean ...?' with the nearest key beside it or, failing that, anywhere in the config."""
    prefix, _, leaf = key.rpartition(".")
    siblings = [str(name) for name in parent if name != "hydra"]
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    if "overrides" in siblings:  # a network's arguments are no keys of the schema
        argument = difflib.get_close_matches(leaf, _network_arguments(), n=1)
        if argument:
            return f"; did you mean {prefix}.overrides.{argument[0]}?"
    everywhere = [path for path in _paths(parent._get_root()) if difflib.get_close_matches(leaf, [path.split(".")[-1]])]
    if everywhere:
        return f"; did you mean {' or '.join(everywhere[:3])}?"
    return f"; known: {', '.join(siblings)}"


def _network_arguments() -> list[str]:
    """Arguments of the networks that an experiment may set; the others are the data's affair."""
    presets = [preset for kind in PRESETS.values() for preset in kind.values()]
    return sorted({name for preset in presets for name in preset} - {"image_size", "in_channels", "num_classes"})


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(node, DictConfig) or node._is_none():
        return
    for key in node:
        path = prefix + str(key)
        if path != "hydra":
            yield path
            yield from _paths(node._get_node(key), f"{path}.")
