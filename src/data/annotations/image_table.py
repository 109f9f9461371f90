"""The entries of `images` as arrays, and checks of their ids and file names.

Shapes: I images.
"""

import posixpath
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.data.annotations.array_builders import Column, field_array, first_repeated, offsets
from src.data.annotations.coco_entries import ImageEntry
from src.data.annotations.unicode_names import spelled_as_on_disk
from src.runtime.errors import DataError

FIRST_BEYOND_ASCII = 128


@dataclass(frozen=True, eq=False)
class ImageTable:
    """The images of an annotation file, in its order."""

    ids: np.ndarray  # int64 [I]
    sizes: np.ndarray  # int32 [I, 2] width, height in pixels
    names: np.ndarray  # uint8: all file names, one after another
    first_byte: np.ndarray  # int64 [I + 1]: file name i is names[first_byte[i] : first_byte[i + 1]]

    def name(self, i: int) -> str:
        return self.names[self.first_byte[i] : self.first_byte[i + 1]].tobytes().decode()

    def spelled_as_on_disk(self, image_folder: Path) -> "ImageTable":
        """The table with each file name in the Unicode form that the disk has."""
        if self.names.max() < FIRST_BEYOND_ASCII:
            return self
        names = spelled_as_on_disk([self.name(i) for i in range(len(self.ids))], image_folder)
        encoded = [name.encode() for name in names]
        packed = np.frombuffer(b"".join(encoded), np.uint8)
        return ImageTable(self.ids, self.sizes, packed, offsets([len(name) for name in encoded]))


class ImageTableBuilder:
    """Collects the entries of `images`, a chunk at a time."""

    def __init__(self) -> None:
        self._ids, self._sizes = Column(np.int64), Column(np.int32, 2)
        self._names, self._lengths = Column(np.uint8), Column(np.int32)
        self._hashes = Column(np.int64)  # of the names: texts would take ten times as much memory
        self._count = 0
        self._outside_folder: tuple[int, str] | None = None  # the first name that is no path below the image folder

    def add(self, entries: list[ImageEntry]) -> None:
        self._ids.extend(field_array(entries, "id", np.int64))
        self._sizes.extend(np.stack([field_array(entries, side, np.int32) for side in ("width", "height")], axis=1))
        names = [entry.file_name for entry in entries]
        joined = "".join(names)
        encoded = names if joined.isascii() else [name.encode() for name in names]
        self._names.extend(np.frombuffer(joined.encode(), np.uint8))
        self._lengths.extend(np.fromiter(map(len, encoded), np.int32, len(names)))
        separated = "\0".join(names)
        if "/" in separated or ".." in separated or separated.count("\0") != len(names) - 1:
            names = self._normalise(names)
        self._hashes.extend(np.fromiter(map(hash, names), np.int64, len(names)))
        self._count += len(entries)

    def _normalise(self, names: list[str]) -> list[str]:
        """The names without parts such as "."; records the first that leaves the image folder."""
        if self._outside_folder is None:
            outside = (
                (index, name)
                for index, name in enumerate(names, self._count)
                if name.startswith("/") or "\0" in name or ".." in name.split("/")
            )
            self._outside_folder = next(outside, None)
        return [posixpath.normpath(name) for name in names]

    def build(self) -> ImageTable:
        """The table of all entries, which `check` may yet refuse; nothing can be added afterwards."""
        return ImageTable(
            self._ids.array(), self._sizes.array(), self._names.array(), offsets(self._lengths.array())
        )  # fmt: skip

    def check(self, images: ImageTable, path: Path, image_folder: Path) -> None:
        """Raises DataError if `images`, the built table, is empty, or an id or a file name is wrong or repeated."""
        if not len(images.ids):
            raise DataError(f"{path}: `images` is empty: it must list the pictures in {image_folder.absolute()}")
        repeated = first_repeated(images.ids)
        if repeated is not None:
            first, second = np.flatnonzero(images.ids == repeated)[:2]
            raise DataError(
                f"{path}: images[{first}] and images[{second}] have the same id {repeated}: give each its own"
            )
        if self._outside_folder is not None:
            index, name = self._outside_folder
            raise DataError(
                f"{path}: images[{index}].file_name is {name!r}: it must be a path below {image_folder.absolute()}"
            )
        self._check_names_differ(images, path)

    def _check_names_differ(self, images: ImageTable, path: Path) -> None:
        hashes = self._hashes.array()
        ordered = np.sort(hashes)
        same_hash = np.flatnonzero(np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])).tolist()
        names = {index: posixpath.normpath(images.name(index)) for index in same_hash}  # different names may collide
        counts = Counter(names.values())
        repeated = next((name for name in names.values() if counts[name] > 1), None)
        if repeated is not None:
            first, second = [index for index in same_hash if names[index] == repeated][:2]
            raise DataError(
                f"{path}: images[{first}] and images[{second}] have the same file_name {repeated!r}: "
                "make them one image"
            )
