"""Figures of measured kernels: how near each comes to its floor, the roofline, and times beside PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from fewstep.kernels.benchmark.ceilings import COPY, rates
from fewstep.kernels.benchmark.results import Row
from fewstep.kernels.benchmark.summary import Line, geometric_mean, is_ours
from fewstep.lab.profile.tables import CEILINGS, network_lines, operation_lines
from fewstep.lab.report.style import FAINT, INK, Few

# Okabe and Ito (2008): ours dark, PyTorch's light; markers say the same again.
STYLES = {
    "triton": ("#0072b2", "o"), "cuda": ("#d55e00", "s"), "reference": ("#555555", "D"), "auto": ("#0072b2", "o"),
    "auto+compile": ("#004a75", "P"), "auto+graph": ("#56b4e9", "X"), "eager": ("#8c8c8c", "v"),
    "compile": ("#e69f00", "^"), "flash": ("#009e73", "<"), "cudnn": ("#cc79a7", ">"), "efficient": ("#7a5195", "h"),
    "eager+graph": ("#bcbcbc", "v"), "cuda+cluster": ("#8b2500", "P"),
}  # fmt: skip
OPERATION_MARKERS = ("o", "s", "^", "D", "v", "P")
KINDS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#bcbcbc", "#7a5195")
LAYOUTS = {"channels_last": "NHWC", "contiguous": "NCHW"}
LINE_INCHES = 0.17  # of height per case


def ratio(lines: Sequence[Line]) -> Figure | None:
    """How near every backend comes to the floor of each shape of one operation: a column per pass."""
    lines = [line for line in lines if any(row.get("ratio") for row in line.rows.values())]
    if not lines:
        return None
    figure, columns = _columns(lines)
    for ax, group in columns:
        for y, line in enumerate(group):
            for backend, row in line.rows.items():
                if row.get("ratio"):
                    ax.plot(row["ratio"], y, **_marker(backend))
        ax.axvline(1.0, color=FAINT, lw=0.8, ls="--")
        ax.set_xlim(left=0)
        ax.set_title(group[0].place[1])
        ax.set_xlabel("floor / time")
    _legend(figure, [ax for ax, _ in columns])
    return figure


def against(lines: Sequence[Line]) -> Figure | None:
    """How many times as fast ours is as each of PyTorch's on each shape of one operation; bars: as the best of them."""
    lines = [line for line in lines if line.ours is not None and line.best_rival is not None]
    if not lines:
        return None
    figure, columns = _columns(lines)
    for ax, group in columns:
        best = [line.speed_up() or 1.0 for line in group]
        ax.barh(range(len(group)), [s - 1 for s in best], left=1.0, height=0.62, color="#cfe3f1", label="best of them")
        for y, line in enumerate(group):
            for backend in line.rows:
                over = line.speed_up(backend)
                if over is not None and not is_ours(backend):
                    ax.plot(over, y, **_marker(backend))
        ax.axvline(1.0, color=INK, lw=0.9)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.8), max(high, 1.25))
        ax.xaxis.set_major_locator(Few())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_title(f"{group[0].place[1]}: {geometric_mean(best):.2f}× the best")
        ax.set_xlabel("our speed over")
    _legend(figure, [ax for ax, _ in columns])
    return figure


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Rate against arithmetic intensity under the measured ceilings."""
    known = rates([row for row in rows if row["op"] in CEILINGS])
    lines = [line for line in operation_lines(rows) if line.ours is not None and line.ours["flops"]]
    if COPY not in known or len(known) < 2 or not lines:
        return None
    figure = Figure((5.8, 4.2))
    axes = figure.subplots()
    operations = list(dict.fromkeys(line.place[0] for line in lines))
    for line in lines:
        row = line.ours
        assert row is not None
        at = row["flops"] / row["bytes"], row["flops"] / row["us"] / 1e6
        index = operations.index(line.place[0])
        colour = list(STYLES.values())[(0, 1, 8, 7, 9, 10)[index % 6]][0]
        filled = "white" if line.place[1] == "backward" else colour
        axes.plot(*at, marker=OPERATION_MARKERS[index % 6], color=colour, mfc=filled, ls="", ms=5, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    dtypes = dict.fromkeys(line.place[3] for line in lines)
    for dtype in dtypes:
        if dtype in known:
            _roof(axes, low, max(high, 3 * known[dtype] / known[COPY]), known[COPY], known[dtype], dtype)
    axes.set_xlabel("floating-point operations per byte of memory traffic")
    axes.set_ylabel("TFLOP/s")
    for index, op in enumerate(operations):
        colour = list(STYLES.values())[(0, 1, 8, 7, 9, 10)[index % 6]][0]
        axes.plot([], [], marker=OPERATION_MARKERS[index % 6], color=colour, ls="", label=op)
    axes.plot([], [], marker="o", color=INK, mfc="white", ls="", label="backward (open)")
    axes.grid(True, axis="x")
    axes.legend(loc="lower right")
    return figure


def _roof(axes: Axes, low: float, high: float, copy: float, product: float, dtype: str) -> None:
    ridge = product / copy
    xs = [low, ridge, high]
    axes.plot(xs, [min(x * copy, product) / 1e12 for x in xs], color=INK, lw=1.1, zorder=2)
    axes.annotate(
        f"{dtype}, {product / 1e12:.3g} TFLOP/s", (high, product / 1e12), xytext=(-2, 3), textcoords="offset points",
        ha="right", fontsize=8.5,
    )  # fmt: skip
    axes.set_xlim(low, high)


def whole(rows: Sequence[Row]) -> Figure | None:
    """Training steps, targets and sampling: bars of time, the shorter the better, PyTorch's operators = 1."""
    found = [line for line in network_lines(rows) if any(name.startswith("eager") for name in line.rows)]
    if not found:
        return None
    count = sum(len(line.rows) + 1 for line in found)
    figure = Figure((6.4, LINE_INCHES * count + 0.6))
    axes = figure.subplots()
    y, ticks = 0.0, []
    for line in found:
        base = line.rows.get("eager") or next(r for n, r in line.rows.items() if n.startswith("eager"))
        middle = y + (len(line.rows) - 1) / 2
        ticks.append((middle, f"{line.place[0].replace('_', ' ')}\n{line.place[2]} {line.place[3]}"))
        for name, row in line.rows.items():
            share = row["us"] / base["us"]
            axes.barh(y, share, height=0.8, color=STYLES.get(name, (FAINT, "o"))[0])
            axes.annotate(f"{name}  {row['us'] / 1e3:,.3g} ms", (share, y), xytext=(3, 0), textcoords="offset points",
                          va="center", fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 0.6})
            y += 1
        y += 1
    axes.set_yticks(*map(list, zip(*ticks, strict=True)))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * axes.get_xlim()[1])
    axes.axvline(1.0, color=INK, lw=0.9)
    axes.set_xlabel("time, as a multiple of PyTorch's operators without a compiler")
    axes.grid(False)
    return figure


def shares(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Where the time of each job goes, by kind of work: a bar per way, microseconds by job, way and kind."""
    kinds = list(dict.fromkeys(kind for ways in found.values() for by in ways.values() for kind in by))
    bars = [(job, name, by) for job, ways in found.items() for name, by in ways.items()]
    figure = Figure((6.4, 0.34 * len(bars) + 0.9))
    axes = figure.subplots()
    for y, (job, _, by) in enumerate(bars):
        whole = sum(next(iter(found[job].values())).values())
        left = 0.0
        for i, kind in enumerate(kinds):
            width = by.get(kind, 0.0) / whole
            axes.barh(y, width, left=left, height=0.72, color=KINDS[i % len(KINDS)], label=kind if y == 0 else None)
            left += width
    axes.set_yticks(range(len(bars)), [f"{job.replace('_', ' ')}, {name}" for job, name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("time, as a multiple of that of PyTorch's operators")
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
    return figure


def _columns(lines: Sequence[Line]) -> tuple[Figure, list[tuple[Axes, list[Line]]]]:
    """A figure with a column per pass and a named line per shape, dtype and layout; the lines of each column."""
    passes: dict[str, list[Line]] = {}
    for line in lines:
        passes.setdefault(line.place[1], []).append(line)
    most = max(passes.values(), key=len)
    figure = Figure((2.6 + 2.4 * len(passes), LINE_INCHES * len(most) + 0.9))
    panels = figure.subplots(1, len(passes), sharey=len(set(map(len, passes.values()))) == 1, squeeze=False)[0]
    for axes, group in zip(panels, passes.values(), strict=True):
        _name_lines(axes, group)
    return figure, list(zip(panels, passes.values(), strict=True))


def _marker(backend: str) -> dict[str, Any]:
    colour, marker = STYLES.get(backend, (FAINT, "x"))
    return {"color": colour, "marker": marker, "ls": "", "ms": 5, "mec": "white", "mew": 0.4, "label": backend}


def _name_lines(axes: Axes, lines: Sequence[Line]) -> None:
    layouts = len({line.place[4] for line in lines}) > 1
    dtypes = len({line.place[3] for line in lines}) > 1
    places = [line.place for line in lines]
    names = [
        " ".join([p[2], *([p[3]] if dtypes else []), *([LAYOUTS.get(p[4], p[4])] if layouts else [])]) for p in places
    ]
    axes.set_yticks(range(len(lines)), names, fontsize=7.5)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(True, axis="x")


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.tight_layout()
    figure.legend(list(found.values()), list(found), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """Every figure that these rows allow, by the name of its file."""
    found: dict[str, Figure | None] = {"roofline": roofline(rows), "networks": whole(rows)}
    lines = operation_lines(rows)
    for op in dict.fromkeys(line.place[0] for line in lines):
        group = [line for line in lines if line.place[0] == op]
        found |= {f"ratio_{op}": ratio(group), f"against_{op}": against(group)}
    return {name: figure for name, figure in found.items() if figure is not None}
