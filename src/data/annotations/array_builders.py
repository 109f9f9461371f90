"""Columns of numbers that are made a piece at a time, and values looked up in them."""

from collections.abc import Sequence
from operator import attrgetter

import numpy as np

LARGEST_TABLE = 2**21  # entries, and more where a tenth are in use; beyond, values are searched for, far more slowly
SPARSEST_TABLE = 10  # entries a value


def field(entries: Sequence, name: str, dtype: type) -> np.ndarray:
    """One field of all entries; None becomes NaN or False, or is a TypeError where the numbers are whole."""
    return np.fromiter(map(attrgetter(name), entries), dtype, len(entries))


def starts(counts: np.ndarray | Sequence[int]) -> np.ndarray:
    """Where each group of so many rows starts, and where the last ends; int64, one longer than the counts."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


class Column:
    """An array that grows at its end, in place: pieces that are joined at last would need twice the memory."""

    def __init__(self, dtype: type, *shape: int) -> None:
        """shape: of a row."""
        self.dtype = dtype
        self.shape = shape
        self._bytes = bytearray()

    def extend(self, values: np.ndarray) -> None:
        self._bytes += values.astype(self.dtype, copy=False).tobytes()

    def array(self) -> np.ndarray:
        """The rows so far; nothing can be added afterwards."""
        return np.frombuffer(self._bytes, self.dtype).reshape(-1, *self.shape)


class Positions:
    """Finds where values stand in an array."""

    def __init__(self, among: np.ndarray) -> None:
        """among: int64, whose values differ."""
        self.least, self.greatest = (int(among.min()), int(among.max())) if len(among) else (0, -1)
        self.table: np.ndarray | None = None
        if self.greatest - self.least < max(LARGEST_TABLE, SPARSEST_TABLE * len(among)):
            self.table = np.full(self.greatest - self.least + 2, -1, np.int32)  # the last: of what is beyond
            self.table[among - self.least] = np.arange(len(among))
        else:
            self.order = np.argsort(among)
            self.ordered = among[self.order]

    def of(self, values: np.ndarray) -> np.ndarray:
        """Where each value stands; -1 where it does not."""
        if self.table is not None:
            inside = (values >= self.least) & (values <= self.greatest)
            return self.table[np.where(inside, values - self.least, -1)]
        nearest = np.searchsorted(self.ordered, values).clip(max=len(self.ordered) - 1)
        return np.where(self.ordered[nearest] == values, self.order[nearest], -1)


def first_repeated(values: np.ndarray) -> int | None:
    """The first of the values that occurs twice, None where all differ."""
    ordered = np.sort(values)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(again):
        return None
    return int(values[np.flatnonzero(np.isin(values, again))[0]])
