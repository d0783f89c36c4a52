"""How figures look: one font, colours that colour-blind readers tell apart, the same for a step count everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes

# Okabe and Ito (2008), cold to warm as steps get fewer; markers say the same again.
STEP_STYLES = {
    16: ("#0072b2", "o"),
    8: ("#56b4e9", "D"),
    4: ("#009e73", "s"),
    2: ("#e69f00", "^"),
    1: ("#d55e00", "v"),
}
OTHER_STYLES = (("#cc79a7", "P"), ("#7a5195", "X"), ("#8c564b", "h"))
INK, FAINT = "#1a1a1a", "#767676"
BASELINE_STYLES = {"ddim": ("#8c8c8c", "--", "o"), "dpmpp_2m": ("#555555", ":", "s")}
SAMPLER_NAMES = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)", "heun": "Heun"}

DIGITS = ((1.0,), (1.0, 2.0, 5.0), (1.0, 2.0, 3.0, 5.0, 7.0))  # of ticks on a logarithmic axis
ENOUGH = 4  # ticks to read a value by

SETTINGS: Any = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#4d4d4d",
    "axes.linewidth": 0.6,
    "xtick.color": "#4d4d4d",
    "ytick.color": "#4d4d4d",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 1.6,
    "ytick.minor.size": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.06,
}


@contextmanager
def style() -> Iterator[None]:
    """Within, figures are drawn in the house style."""
    with mpl.rc_context(SETTINGS):
        yield


def step_style(steps: int) -> tuple[str, str]:
    """Colour and marker of a step count, the same in every figure."""
    return STEP_STYLES.get(steps) or OTHER_STYLES[steps % len(OTHER_STYLES)]


def step_axis(axes: Axes, steps: list[int]) -> None:
    """Steps on a logarithmic axis, marked where there are students and nowhere else."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(steps), [str(n) for n in sorted(steps)])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(steps) / 1.25, max(steps) * 1.25)


class Few(ticker.Locator):
    """Ticks of a logarithmic axis: the fewest of 1, 10, ... or 1, 2, 5, ... that suffice, else round numbers."""

    def __call__(self) -> Any:
        """Values at which ticks stand now."""
        low, high = sorted(self.axis.get_view_interval())  # type: ignore[union-attr]  # set by matplotlib before use
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """Values at which ticks stand on an axis from vmin to vmax."""
        for digits in DIGITS:
            powers = range(math.floor(math.log10(vmin)), math.ceil(math.log10(vmax)) + 1)
            ticks = [digit * 10.0**power for power in powers for digit in digits]
            if sum(vmin <= tick <= vmax for tick in ticks) >= ENOUGH:
                return ticks
        return ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(vmin, vmax)


def plain_log(axes: Axes) -> None:
    """A logarithmic value axis with its numbers written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(Few())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def count_steps(steps: int) -> str:
    """ "1 step", "4 steps"."""
    return "1 step" if steps == 1 else f"{steps} steps"
