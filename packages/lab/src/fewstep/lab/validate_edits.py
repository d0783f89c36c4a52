"""What can be wrong with the stage that measures editing and inpainting."""

from fewstep.lab.captioned import world_of
from fewstep.lab.checks import needs_one, one_of, positive, require, trained_range
from fewstep.lab.config import Config, EditsConfig
from fewstep.lab.validate_teachers import TEACHERS

WHOLE = 1e-6  # by which a number of steps may miss a whole one: rounding


def check_edits(key: str, stage: EditsConfig, config: Config) -> None:
    """Editing and inpainting by prompt, read back by the checker."""
    data = config.data
    right = f"captioned_shapes for {key}: nothing reads other pictures back"
    require(data.name == "captioned_shapes", "data.name", data.name, right)
    positive(key, stage, "prompts", "chunk")
    for name in ("margin", "reach"):
        require(getattr(stage, name) >= 0, f"{key}.{name}", getattr(stage, name), "0 or more pixels")
    needs_one(key, stage, config, *TEACHERS)
    halve = needs_one(key, stage, config, "halve")
    require(halve.students != "encoder", f"{key}.needs", stage.needs, f"without {halve.name}: encoders do not sample")
    require(bool(stage.steps), f"{key}.steps", stage.steps, "at least one number of steps")
    for steps in stage.steps:
        one_of(f"{key}.steps", steps, halve.steps)
    one_of(f"{key}.headline", stage.headline, stage.steps)
    one_of(f"{key}.reference.sampler", stage.reference.sampler, ("ddim", "dpmpp_2m", "heun"))
    positive(f"{key}.reference", stage.reference, "steps")
    low, high = trained_range(halve, config)
    right = f"in [{low:g}, {high:g}], for which {halve.name} is trained (w = 0 is no guidance)"
    require(low <= stage.w <= high, f"{key}.w", stage.w, right)
    _check_strengths(key, stage)
    _check_world(config)


def is_whole(steps: int, strength: float) -> bool:
    """Whether a strength is a whole number of steps, one at least."""
    return abs(steps * strength - round(steps * strength)) < WHOLE and round(steps * strength) >= 1


def _check_strengths(key: str, stage: EditsConfig) -> None:
    """Each is a part of the way that the teacher's steps, and the headline's the headline's, reach exactly."""
    require(bool(stage.strengths), f"{key}.strengths", stage.strengths, "at least one")
    for strength in stage.strengths:
        right = f"in (0, 1] and a whole number of the teacher's {stage.reference.steps} steps"
        require(0 < strength <= 1 and is_whole(stage.reference.steps, strength), f"{key}.strengths", strength, right)
    one_of(f"{key}.headline_strength", stage.headline_strength, stage.strengths)
    fits, right = is_whole(stage.headline, stage.headline_strength), f"a whole number of {stage.headline} steps"
    require(fits, f"{key}.headline_strength", stage.headline_strength, right)
    points = stage.points
    require(points is None or 0 <= points <= 1, f"{key}.points", points, "in [0, 1], or null")


def _check_world(config: Config) -> None:
    """Whatever a scene holds, some object can become what no other is."""
    shapes = config.data.shapes
    assert shapes is not None  # `check_data` asks for it
    world = world_of(shapes)
    for kind in (kind for kind in world.kinds if kind not in world.held_out):
        count = len(world.kinds_beside(kind))
        right = f"such that a {' '.join(kind)} can become {world.most_objects} others by one change, not {count}"
        require(count >= world.most_objects, "data.shapes.colours", shapes.colours, right)
