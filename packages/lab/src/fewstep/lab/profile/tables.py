"""Measured rows as tables: every backend of every shape, ours beside the best of PyTorch's, whole networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Screen

from fewstep.kernels.benchmark.results import Row
from fewstep.kernels.benchmark.summary import Line, geometric_mean, is_ours, lines, place_of, wrong
from fewstep.lab.report.tables import DASH, Table, fixed, number, times

CEILINGS = ("copy", "product")
NETWORK_PASS = "step"
LEAST_WIDTH = 100  # characters that the widest table of figures takes


def operation_lines(rows: Iterable[Row]) -> list[Line]:
    """Timed operations, by operation and pass, each in the order of the rows."""
    found = [line for line in lines(rows) if line.place[0] not in CEILINGS and line.place[1] != NETWORK_PASS]
    places = list(dict.fromkeys(line.place[:2] for line in found))
    return sorted(found, key=lambda line: places.index(line.place[:2]))


def network_lines(rows: Iterable[Row]) -> list[Line]:
    """Timed training steps, targets and sampling."""
    return [line for line in lines(rows) if line.place[1] == NETWORK_PASS]


def backends(rows: Sequence[Row]) -> Table:
    """A row per backend; of the fastest of a case and pass the time is marked."""
    header = (
        "operation", "pass", "shape", "dtype", "layout", "backend", "us", "spread", "MB", "GFLOP", "floor us",
        "of floor's speed", "error",
    )  # fmt: skip
    body: list[list[str]] = []
    groups, marks = set(), {}
    for line in operation_lines(rows):
        groups.add(len(body))
        best = min(row["us"] for row in line.rows.values())
        for i, (name, row) in enumerate(line.rows.items()):
            if row["us"] == best:
                marks[len(body), 6] = "good"
            body.append([*(line.place if i == 0 else [""] * 5), name, *_measures(row)])
    return Table(header, body, text_columns=6, groups=frozenset(groups), marks=marks)


def _measures(row: Row) -> list[str]:
    bound = "*" if row.get("host_bound") else ""
    return [
        number(row["us"]) + bound, _percent(row["spread"]), number(row["bytes"] / 1e6), number(row["flops"] / 1e9),
        number(row.get("floor_us")), fixed(row.get("ratio"), 2), _error(row),
    ]  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _error(row: Mapping[str, Any]) -> str:
    if "rel_err" not in row:
        return DASH
    return f"{row['rel_err']:.1e}" + ("" if wrong(row) is None else " wrong")


def comparison(rows: Sequence[Row]) -> Table:
    """A row per case and pass, ours beside the fastest of PyTorch's; then geometric means per operation and pass."""
    header = (
        "operation", "pass", "shape", "dtype", "layout", "ours", "us", "of floor's speed", "bound", "best of PyTorch",
        "us", "speed-up",
    )  # fmt: skip
    found = [line for line in operation_lines(rows) if line.ours is not None and line.best_rival is not None]
    body = [[*line.place, *_beside(line)] for line in found]
    groups = {i for i, line in enumerate(found) if i == 0 or line.place[:2] != found[i - 1].place[:2]}
    marks = {(i, 11): "good" if (line.speed_up() or 0) >= 1 else "bad" for i, line in enumerate(found)}
    groups.add(len(body))
    for op, name in dict.fromkeys(line.place[:2] for line in found):
        group = [line for line in found if line.place[:2] == (op, name)]
        mean = f"geometric mean of {len(group)}"
        body.append([op, name, mean, *[""] * 8, times(geometric_mean(line.speed_up() or 1.0 for line in group))])
        own = [s for line in group if (s := line.own_speed_up()) is not None]
        if own and any(line.own is not line.ours for line in group):
            won = f"own kernels alone, {sum(s >= 1 for s in own)} of {len(own)} won"
            body.append([op, name, won, *[""] * 8, times(geometric_mean(own))])
    return Table(header, body, text_columns=6, groups=frozenset(groups), marks=marks)


def _beside(line: Line) -> list[str]:
    ours, rival = line.ours, line.best_rival
    assert ours is not None
    assert rival is not None
    return [
        ours["backend"], number(ours["us"]), fixed(ours.get("ratio"), 2), ours.get("bound", DASH), rival["backend"],
        number(rival["us"]), times(line.speed_up()),
    ]  # fmt: skip


def networks(rows: Sequence[Row]) -> Table:
    """A row per way of running a network: time, images per second, memory, speed-up over PyTorch's operators."""
    header = (
        "what", "network", "dtype", "how", "ms", "spread", "images/s", "peak memory", "over eager", "over compile",
    )  # fmt: skip
    body: list[list[str]] = []
    groups = set()
    for line in network_lines(rows):
        groups.add(len(body))
        op, _, shape, dtype, _ = line.place
        for i, (name, row) in enumerate(line.rows.items()):
            peak = row.get("peak_bytes")
            over = [_over(line, name, rival) for rival in ("eager", "compile")]
            body.append(
                [
                    *((op, shape, dtype) if i == 0 else ("", "", "")), name, number(row["us"] / 1e3),
                    _percent(row["spread"]), number(row["per_second"]),
                    DASH if peak is None else f"{peak / 2**30:.1f} GiB", *over,
                ]
            )  # fmt: skip
    return Table(header, body, text_columns=4, groups=frozenset(groups))


def _over(line: Line, name: str, rival: str) -> str:
    """How many times as fast as the rival; graphs are compared with graphs."""
    graphed = f"{rival}+graph" if name.endswith("+graph") else rival
    if graphed not in line.rows or graphed == name or not is_ours(name):
        return DASH
    return times(line.rows[graphed]["us"] / line.rows[name]["us"])


def ceilings(rows: Sequence[Row]) -> list[str]:
    """What the device was measured to do at best, a sentence each."""
    found = []
    for row in rows:
        if row["op"] == "copy":
            found.append(f"copy of {row['shape']}: {row['bytes'] / row['us'] / 1e3:,.0f} GB/s read and written")
        if row["op"] == "product":
            rate = row["flops"] / row["us"] / 1e6
            found.append(f"{row['dtype']} matrix product {row['shape']}: {rate:,.3g} TFLOP/s")
    return found


def circumstances(rows: Sequence[Row]) -> list[str]:
    """Device, versions and commits that the rows were made with, a line each."""
    made = dict.fromkeys((row["device"], tuple(row["versions"].items()), row["commit"]) for row in rows)
    return [
        f"{device}; {', '.join(f'{name} {version}' for name, version in versions)}; commit {commit[:10]}"
        f"{' with changes' if commit.endswith('+changes') else ''}"
        for device, versions, commit in made
    ]


def unmeasured(notes: Mapping[str, str]) -> list[str]:
    """What could not be measured: reasons, each with how many tasks and the first of them."""
    by: dict[str, list[str]] = {}
    for task, text in notes.items():
        by.setdefault(text, []).append(task)
    few = {text: [*names[:3], *["..."] * (len(names) > 3)] for text, names in by.items()}
    return [f"{text} ({len(names)}: {'; '.join(few[text])})" for text, names in by.items()]


def incorrect(rows: Sequence[Row]) -> list[str]:
    """Results of ours that are wrong, a line each."""
    return [f"{' '.join(place_of(row))} {row['backend']}: {text}" for row in rows if (text := wrong(row)) is not None]


def all_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Those that have rows, by title."""
    found = {
        "Every backend": backends(rows), "Ours beside the best of PyTorch's": comparison(rows),
        "Whole networks": networks(rows),
    }  # fmt: skip
    return {title: table for title, table in found.items() if table.rows}


def markdown(rows: Sequence[Row], notes: Mapping[str, str]) -> str:
    """All tables for a README, with what they were measured on, and what is wrong or missing."""
    parts = [f"### {title}\n\n{table.markdown()}" for title, table in all_tables(rows).items()]
    facts = [*circumstances(rows), *(f"ceilings: {line}" for line in ceilings(rows))]
    facts += ["`*`: the device waited for the host, so this is no time of the device alone"] * any(
        row.get("host_bound") for row in rows
    )
    facts += [f"not there: {line}" for line in unmeasured(notes)] + [f"wrong: {line}" for line in incorrect(rows)]
    return "\n".join([*parts, *(f"- {fact}" for fact in facts), ""])


def show(console: Console, table: Table, title: str) -> None:
    """Print a table; beyond the edge of a narrow terminal rather than without some of its figures."""
    console.print(_on_screen(table, title), width=max(console.width, LEAST_WIDTH), crop=False)


def _on_screen(table: Table, title: str) -> Screen:
    """All text columns but the last make one, which is folded if need be; figures are not."""
    styles = {"good": "green", "bad": "red", "aim": "yellow"}
    screen = Screen(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    joined = max(1, table.text_columns - 1)
    screen.add_column(" ".join(table.header[:joined]), overflow="fold", min_width=12)
    for j, name in enumerate(table.header[joined:], joined):
        widest = max([len(row[j]) for row in table.rows], default=0)
        screen.add_column(name, justify="left" if j == joined else "right", overflow="fold", min_width=widest)
    for i, row in enumerate(table.rows):
        if i in table.groups and i:
            screen.add_section()
        cells = [f"[{styles[m]}]{c}[/]" if (m := table.marks.get((i, j))) else c for j, c in enumerate(row)]
        screen.add_row(" ".join(cells[:joined]).rstrip(), *cells[joined:])
    return screen
