"""The rows of the benchmarks and their table: a figure, its baseline, the ratio and whether it reaches the goal."""

import operator
from collections.abc import Callable

from benchmarks.turns import Pair

WIDTH = 84  # of the names, before they are known
STEADY = 0.1  # with a larger spread of the turns' ratios, a row is neither met nor missed


def speed(name: str, pair: Pair, goal: float | None = None) -> dict:
    """A row of figures that should be large.  goal: the least ratio of ours to the baseline."""
    return _row(name, pair, goal, operator.ge)


def cost(name: str, pair: Pair, goal: float | None = None) -> dict:
    """A row of figures that should be small.  goal: the greatest ratio of ours to the baseline."""
    return _row(name, pair, goal, operator.le)


def limit(name: str, value: float, most: float) -> dict:
    """A row of a figure that should not exceed a limit."""
    return cost(name, Pair(value, most, 0.0), 1.0)


def figure(name: str, value: float) -> dict:
    """A row of a figure without a baseline."""
    return {"name": name, "ours": value, "baseline": None, "ratio": None, "spread": None, "goal": None, "verdict": None}


def _row(name: str, pair: Pair, goal: float | None, reaches: Callable[[float, float], bool]) -> dict:
    ratio = pair.ours / pair.baseline
    verdict = None
    if goal is not None:
        verdict = "unsteady" if pair.spread > STEADY else "met" if reaches(ratio, goal) else "NOT MET"
    return {"name": name, **pair._asdict(), "ratio": ratio, "goal": goal, "verdict": verdict}


def table(rows: list[dict]) -> str:
    """The rows as text, one line each, below a header."""
    width = max(len(row["name"]) for row in rows)
    return "\n".join([header(width), *(line(row, width) for row in rows)])


def header(width: int = WIDTH) -> str:
    """The titles of the columns.  width: of the names."""
    return f"{'':{width}}  {'ours':>9}  {'baseline':>9}  {'ratio':>6}  {'spread':>6}  {'goal':>6}"


def line(row: dict, width: int = WIDTH) -> str:
    """A row as text."""
    cells = [
        _cell(row["ours"], 9, 2), _cell(row["baseline"], 9, 2), _cell(row["ratio"], 6, 3), _cell(row["spread"], 6, 3)
    ]  # fmt: skip
    verdict = "" if row["goal"] is None else f"{row['goal']:6g}  {row['verdict']}"
    return "  ".join([f"{row['name']:{width}}", *cells, verdict]).rstrip()


def _cell(value: float | None, width: int, decimals: int) -> str:
    return " " * width if value is None else f"{value:{width}.{decimals}f}"
