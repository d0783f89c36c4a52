"""One sampler update from a network's raw outputs: guidance, conversion to x, clipping and step in one operation."""

from typing import Literal, get_args, overload

from torch import Tensor

from fewstep.kernels.backend import BACKENDS, declare, dispatch
from fewstep.kernels.guided_update import fused, reference  # noqa: F401  # they register themselves
from fewstep.kernels.guided_update.arguments import PREDICTIONS
from fewstep.kernels.guided_update.reference import RawLike, ScheduleLike

UpdateKind = Literal["ddim", "renoise", "posterior"]
Clip = tuple[float, float] | None


def _check(
    raw: RawLike, z: Tensor, clip: Clip, like_z: dict[str, Tensor | None], rows: dict[str, Tensor | float | None]
) -> None:
    if raw.prediction not in PREDICTIONS:
        raise ValueError(f"prediction={raw.prediction!r} is unknown; known: {', '.join(PREDICTIONS)}")
    for name, x in {"outputs": raw.cond_output, "unconditional outputs": raw.uncond_output, **like_z}.items():
        if x is not None and x.shape != z.shape:
            raise ValueError(f"{name} {tuple(x.shape)} must be shaped like z {tuple(z.shape)}")
        if x is not None and x.device != z.device:
            raise ValueError(f"{name} on {x.device} must be on the device of z, {z.device}")
    for name, row in rows.items():
        if isinstance(row, Tensor) and row.ndim and row.shape != z.shape[:1]:
            found = f"{name} {tuple(row.shape)} must be () or ({len(z)},)"
            raise ValueError(f"{found}, one per sample of z {tuple(z.shape)}")
    if clip is not None and not (len(clip) == 2 and clip[0] < clip[1]):
        raise ValueError(f"clip={clip!r} must be None or (low, high) with low < high")


@overload
def guided_update(
    raw: RawLike, z: Tensor, t: Tensor, s: Tensor | None, schedule: ScheduleLike, w: Tensor | float | None = None, *,
    kind: UpdateKind = "ddim", noise: Tensor | None = None, clip: Clip = None, jump: Tensor | None = None,
    return_x: Literal[False] = False,
) -> Tensor: ...


@overload
def guided_update(
    raw: RawLike, z: Tensor, t: Tensor, s: Tensor | None, schedule: ScheduleLike, w: Tensor | float | None = None, *,
    kind: UpdateKind = "ddim", noise: Tensor | None = None, clip: Clip = None, jump: Tensor | None = None,
    return_x: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def guided_update(
    raw: RawLike, z: Tensor, t: Tensor, s: Tensor | None, schedule: ScheduleLike, w: Tensor | float | None = None, *,
    kind: UpdateKind = "ddim", noise: Tensor | None = None, clip: Clip = None, jump: Tensor | None = None,
    return_x: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return z_s from z_t and a network's raw outputs, or with s=None the guided (and clipped) estimate of x.

    Kinds:
        "ddim": z_s = alpha_s x + sigma_s (z_t - alpha_t x) / sigma_t (arXiv 2202.00512, eq. 7).
        "renoise": one step of the stochastic sampler of arXiv 2210.03142: by DDIM to a time k < s, then forward
            noise from k to s: z_s = (alpha_s / alpha_k) z_k + sigma_{s|k} noise. k is `jump`; by default as far
            beyond s as s is from t, max(2 s - t, 0). At s = k = 0 it is the DDIM step.
        "posterior": a draw from q(z_s | z_t, x) (arXiv 2202.00512, eq. 3).

    Args:
        raw: `fewstep.schedules.Raw` or alike: cond_output, uncond_output (B, ...) or None, prediction. For an estimate
            of x itself, pass Raw(x, None, "x").
        z: (B, ...) at times t.
        t, s: (B,) or () in [0, 1], s <= t except for "ddim", which also goes back (encoding).
        schedule: gives `alpha_sigma(t)`.
        w: None, a float or (B,). w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). Not used where
            uncond_output is None: then w, if any, is already inside.
        kind: see above.
        noise: like z, N(0, 1); needed by "renoise" and "posterior".
        clip: None or (low, high) for x; the step then goes from the clipped x.
        jump: (B,) or (), k of "renoise".
        return_x: also return the guided and clipped estimate of x.

    Shape: -> like z, float32 or wider whatever the dtype of z and raw; with return_x a pair of these.

    Raises:
        ValueError: for an unknown kind or prediction, missing noise, outputs and noise not shaped like z or on another
            device, t, s, w or jump that are not one per sample, or a clip whose ends are not in order.
    """
    if kind not in get_args(UpdateKind):
        raise ValueError(f"kind={kind!r} is unknown; known: {', '.join(get_args(UpdateKind))}")
    if kind != "ddim" and noise is None and s is not None:
        raise ValueError(f"kind={kind!r} needs noise, a tensor shaped like z {tuple(z.shape)}")
    _check(raw, z, clip, {"noise": noise}, {"t": t, "s": s, "w": w, "jump": jump})
    result: Tensor | tuple[Tensor, Tensor] = dispatch(
        "guided_update", raw, z, t, s, schedule, w, kind, noise, clip, jump, return_x
    )
    return result


def two_step_target(
    raw: RawLike, z: Tensor, t: Tensor, schedule: ScheduleLike, first: Tensor, share: Tensor,
    w: Tensor | float | None = None, *, clip: Clip = None,
) -> Tensor:
    """Return share first + (1 - share) x, x the guided (and clipped) estimate at the second of two steps.

    This is the target of progressive distillation (arXiv 2202.00512, algorithm 2, and 2210.03142, algorithm 2): one
    step of the student with it lands where the teacher's two do, if `share` is the first step's part of the growth of
    alpha / sigma.

    Args:
        raw, z, t, schedule, w, clip: as in `guided_update`, of the second step. w = 0 is no guidance (Stable
            Diffusion's guidance scale is 1 + w).
        first: like z, the estimate of x at the first step: `guided_update` with return_x.
        share: (B,) or () in [0, 1].

    Shape: -> like z, float32 or wider.

    Raises:
        ValueError: for an unknown prediction, outputs and `first` not shaped like z or on another device, t, w or
            share that are not one per sample, or a clip whose ends are not in order.
    """
    _check(raw, z, clip, {"first": first}, {"t": t, "w": w, "share": share})
    result: Tensor = dispatch("guided_update", raw, z, t, None, schedule, w, "blend", first, clip, share, False)
    return result


declare("guided_update", BACKENDS, lambda raw, z, *rest: (z.shape[0], z.numel() // max(z.shape[0], 1)))
