"""How far a measured share may lie from the true one."""

from __future__ import annotations

import math

NORMAL_95 = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a probability of which `successes` of `trials` were seen (Wilson 1927), in [0, 1].

    Unlike the normal approximation it holds for shares near 0 and 1 too.

    Raises:
        ValueError: not 0 <= successes <= trials, or no trial.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes={successes} of trials={trials}: must be 0 to trials, of at least one")
    share, square = successes / trials, NORMAL_95**2
    centre = share + square / (2 * trials)
    reach = NORMAL_95 * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    low, high = ((centre + sign * reach) / (1 + square / trials) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)
