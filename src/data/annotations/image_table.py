"""The entries of `images` as columns, and what may be wrong with their ids and names.

Shapes: I images.
"""

import posixpath
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from src.data.annotations.array_builders import Column, Positions, field, first_repeated, starts
from src.data.annotations.coco_json import ImageEntry
from src.data.annotations.unicode_names import spelled_as_on_disk
from src.runtime.errors import DataError

FIRST_BEYOND_ASCII = 128


class Images:
    """The images of an annotation file in its order; `finish` is to be called before the arrays are read."""

    ids: np.ndarray  # int64 [I]
    sizes: np.ndarray  # int32 [I, 2] width, height in pixels
    names: np.ndarray  # uint8: all file names, one after another
    first_byte: np.ndarray  # int64 [I + 1]
    position: Callable[[np.ndarray], np.ndarray]  # of image ids among `ids`, -1 where they are not there

    def __init__(self) -> None:
        self._ids, self._sizes = Column(np.int64), Column(np.int32, 2)
        self._names, self._lengths = Column(np.uint8), Column(np.int32)
        self._hashes = Column(np.int64)  # of the names, which would take ten times as much memory as texts
        self._count = 0
        self._strange: tuple[int, str] | None = None  # the first name that is no path below the folder

    def add(self, entries: list[ImageEntry]) -> None:
        self._ids.extend(field(entries, "id", np.int64))
        self._sizes.extend(np.stack([field(entries, side, np.int32) for side in ("width", "height")], axis=1))
        names = [entry.file_name for entry in entries]
        joined = "".join(names)
        encoded = names if joined.isascii() else [name.encode() for name in names]
        self._names.extend(np.frombuffer(joined.encode(), np.uint8))
        self._lengths.extend(np.fromiter(map(len, encoded), np.int32, len(names)))
        together = "\0".join(names)
        if "/" in together or ".." in together or together.count("\0") != len(names) - 1:
            names = self._plain(names)
        self._hashes.extend(np.fromiter(map(hash, names), np.int64, len(names)))
        self._count += len(entries)

    def _plain(self, names: list[str]) -> list[str]:
        """The names without "." and the like; notes the first that leaves the folder."""
        if self._strange is None:
            strange = (
                (index, name)
                for index, name in enumerate(names, self._count)
                if name.startswith("/") or "\0" in name or ".." in name.split("/")
            )
            self._strange = next(strange, None)
        return [posixpath.normpath(name) for name in names]

    def finish(self) -> None:
        """Makes the arrays, which may yet be wrong: see `check`."""
        self.ids, self.sizes, self.names = self._ids.array(), self._sizes.array(), self._names.array()
        self.first_byte = starts(self._lengths.array())
        self.position = Positions(self.ids).of

    def check(self, path: Path, image_folder: Path) -> None:
        """Raises DataError where there are no images, or two of one id or name, or a name is of another folder.

        Forgets what was for that and for `position`, so that nothing can be added or looked for afterwards.
        """
        if not len(self.ids):
            raise DataError(f"{path}: `images` is empty: it must list the pictures in {image_folder.absolute()}")
        repeated = first_repeated(self.ids)
        if repeated is not None:
            first, second = np.flatnonzero(self.ids == repeated)[:2]
            raise DataError(
                f"{path}: images[{first}] and images[{second}] have the same id {repeated}: give each its own"
            )
        if self._strange is not None:
            index, name = self._strange
            raise DataError(
                f"{path}: images[{index}].file_name is {name!r}: it must be a path below {image_folder.absolute()}"
            )
        self._check_differ(path)
        del self._ids, self._sizes, self._names, self._lengths, self._hashes, self.position

    def _check_differ(self, path: Path) -> None:
        hashes = self._hashes.array()
        ordered = np.sort(hashes)
        alike = np.flatnonzero(np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])).tolist()
        names = {index: posixpath.normpath(self.name(index)) for index in alike}  # hashes may be alike by chance
        counts = Counter(names.values())
        repeated = next((name for name in names.values() if counts[name] > 1), None)
        if repeated is not None:
            first, second = [index for index in alike if names[index] == repeated][:2]
            raise DataError(
                f"{path}: images[{first}] and images[{second}] have the same file_name {repeated!r}: "
                "make them one image"
            )

    def spell_as_on_disk(self, image_folder: Path) -> None:
        """Changes names of which the disk has another Unicode form."""
        if self.names.max() < FIRST_BEYOND_ASCII:
            return
        names = spelled_as_on_disk([self.name(i) for i in range(len(self.ids))], image_folder)
        encoded = [name.encode() for name in names]
        self.names = np.frombuffer(b"".join(encoded), np.uint8)
        self.first_byte = starts([len(name) for name in encoded])

    def name(self, i: int) -> str:
        return self.names[self.first_byte[i] : self.first_byte[i + 1]].tobytes().decode()
