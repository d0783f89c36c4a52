"""One sampler update from a network's raw outputs: guidance, conversion to x, clipping and step in one operation."""

from typing import Literal, get_args

from torch import Tensor

from fewstep.kernels.backend import implementation
from fewstep.kernels.guided_update import reference  # noqa: F401  # registers itself
from fewstep.kernels.guided_update.reference import RawLike, ScheduleLike

UpdateKind = Literal["ddim", "renoise", "posterior"]
PREDICTIONS = ("x", "eps", "v", "flow")


def guided_update(
    raw: RawLike, z: Tensor, t: Tensor, s: Tensor | None, schedule: ScheduleLike, w: Tensor | float | None = None, *,
    kind: UpdateKind = "ddim", noise: Tensor | None = None, clip: tuple[float, float] | None = None,
    jump: Tensor | None = None,
) -> Tensor:
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

    Shape: -> like z, float32 or wider whatever the dtype of z and raw.

    Raises:
        ValueError: for an unknown kind or prediction, missing noise, or outputs not shaped like z.
    """
    if kind not in get_args(UpdateKind):
        raise ValueError(f"kind={kind!r} is unknown; known: {', '.join(get_args(UpdateKind))}")
    if raw.prediction not in PREDICTIONS:
        raise ValueError(f"prediction={raw.prediction!r} is unknown; known: {', '.join(PREDICTIONS)}")
    if kind != "ddim" and noise is None and s is not None:
        raise ValueError(f"kind={kind!r} needs noise, a tensor shaped like z {tuple(z.shape)}")
    if raw.cond_output.shape != z.shape:
        raise ValueError(f"outputs {tuple(raw.cond_output.shape)} must be shaped like z {tuple(z.shape)}")
    result: Tensor = implementation("guided_update")(raw, z, t, s, schedule, w, kind, noise, clip, jump)
    return result
