"""What the benchmarks have found: rows of a figure beside its yardstick, and the table of them."""

import operator
from collections.abc import Callable

WIDTH = 84  # of the names where they are not known beforehand


def speed(name: str, ours: float, yardstick: float, goal: float | None = None) -> dict:
    """A row of figures that should be large.  goal: the least ratio of ours to the yardstick."""
    return _row(name, ours, yardstick, goal, operator.ge)


def cost(name: str, ours: float, yardstick: float | None = None, goal: float | None = None) -> dict:
    """A row of figures that should be small.  goal: the greatest ratio of ours to the yardstick."""
    return _row(name, ours, yardstick, goal, operator.le)


def _row(
    name: str, ours: float, yardstick: float | None, goal: float | None, reaches: Callable[[float, float], bool]
) -> dict:
    ratio = None if yardstick is None else ours / yardstick
    met = None if goal is None or ratio is None else reaches(ratio, goal)
    return {"name": name, "ours": ours, "yardstick": yardstick, "ratio": ratio, "goal": goal, "met": met}


def table(rows: list[dict]) -> str:
    """The rows with columns for ours, yardstick, ratio, goal and whether it is met."""
    width = max(len(row["name"]) for row in rows)
    return "\n".join([header(width), *(line(row, width) for row in rows)])


def header(width: int = WIDTH) -> str:
    """The titles of a table's columns.  width: of the names."""
    return f"{'':{width}}  {'ours':>9}  {'yardstick':>9}  {'ratio':>6}  {'goal':>6}"


def line(row: dict, width: int = WIDTH) -> str:
    """A row of a table."""
    cells = [_cell(row["ours"], 9, 2), _cell(row["yardstick"], 9, 2), _cell(row["ratio"], 6, 3)]
    verdict = "" if row["goal"] is None else f"{row['goal']:6g}  {'met' if row['met'] else 'NOT MET'}"
    return "  ".join([f"{row['name']:{width}}", *cells, verdict]).rstrip()


def _cell(value: float | None, width: int, decimals: int) -> str:
    return " " * width if value is None else f"{value:{width}.{decimals}f}"
