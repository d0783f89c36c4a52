"""Schedules to and from JSON-able settings."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fewstep.schedules.discrete import Discrete
from fewstep.schedules.families import Cosine, Karras, LinearBeta, RectifiedFlow
from fewstep.schedules.schedule import Schedule

SCHEDULES: dict[str, type[Schedule]] = {c.__name__: c for c in (Cosine, LinearBeta, Discrete, Karras, RectifiedFlow)}


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Build the schedule that `to_config` describes, e.g. {"type": "Cosine", "shift": -2.8}.

    Raises:
        ValueError: for an unknown type or key, naming those known.
    """
    settings = dict(config)
    name = settings.pop("type", None)
    if name not in SCHEDULES:
        raise ValueError(f"schedule type={name!r} is unknown; known: {', '.join(SCHEDULES)}")
    cls = SCHEDULES[name]
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]  # every schedule is a dataclass
    for key in settings:
        if key not in known:
            raise ValueError(f"schedule {name} has no setting {key!r}; known: {', '.join(known)}")
    return cls(**settings)
