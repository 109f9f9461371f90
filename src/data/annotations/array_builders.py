"""Arrays that grow a chunk at a time, and lookups of values in arrays."""

from collections.abc import Sequence
from operator import attrgetter

import numpy as np

# A lookup table has at most this many entries, or SPARSEST_TABLE for each value if that is more.  Beyond it, values are
# found by binary search, which is far slower.
LARGEST_TABLE = 2**21
SPARSEST_TABLE = 10


def field_array(entries: Sequence, name: str, dtype: type) -> np.ndarray:
    """One field of all entries as an array.

    None becomes NaN in a float array and False in a bool array; in an integer array it raises TypeError.
    """
    return np.fromiter(map(attrgetter(name), entries), dtype, len(entries))


def offsets(counts: np.ndarray | Sequence[int]) -> np.ndarray:
    """The first row of each group, then the number of all rows; int64, one longer than `counts`."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


class Column:
    """An array that grows in place: joining its parts at the end would need twice the memory."""

    def __init__(self, dtype: type, *shape: int) -> None:
        """shape: of a row."""
        self.dtype = dtype
        self.shape = shape
        self._bytes = bytearray()

    def extend(self, values: np.ndarray) -> None:
        self._bytes += values.astype(self.dtype, copy=False).tobytes()

    def array(self) -> np.ndarray:
        """All rows, as a view; nothing can be added afterwards."""
        return np.frombuffer(self._bytes, self.dtype).reshape(-1, *self.shape)


class IndexLookup:
    """Finds the indices of values in an array."""

    def __init__(self, values: np.ndarray) -> None:
        """values: int64, all different."""
        self.least, self.greatest = (int(values.min()), int(values.max())) if len(values) else (0, -1)
        self.table: np.ndarray | None = None
        if self.greatest - self.least < max(LARGEST_TABLE, SPARSEST_TABLE * len(values)):
            self.table = np.full(self.greatest - self.least + 2, -1, np.int32)  # the last entry: values outside it
            self.table[values - self.least] = np.arange(len(values))
        else:
            self.order = np.argsort(values)
            self.ordered = values[self.order]

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """The index of each wanted value; -1 for a value that is not in the array."""
        if self.table is not None:
            inside = (wanted >= self.least) & (wanted <= self.greatest)
            return self.table[np.where(inside, wanted - self.least, -1)]
        nearest = np.searchsorted(self.ordered, wanted).clip(max=len(self.ordered) - 1)
        return np.where(self.ordered[nearest] == wanted, self.order[nearest], -1)


def first_repeated(values: np.ndarray) -> int | None:
    """The first value that occurs twice; None if all differ."""
    ordered = np.sort(values)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(again):
        return None
    return int(values[np.flatnonzero(np.isin(values, again))[0]])
