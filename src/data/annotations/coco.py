"""A COCO annotation file read into arrays, cleaned and checked; the label map.

Both data pipelines and the scoring work on these arrays.  They hold no Python object per image or box, so worker
processes share them instead of copying them page by page.
Shapes: I images, B boxes, K categories, M entries of `annotations` before cleaning.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.data.annotations.annotation_table import CROWD, HAS_AREA, AnnotationTable, GroundTruth, listed, warnings_of
from src.data.annotations.array_builders import first_repeated, starts
from src.data.annotations.coco_json import CategoryEntry, pieces
from src.data.annotations.image_table import Images
from src.runtime.errors import DataError

BLOCK = 2**16  # images or boxes that are worked on together
ROBOFLOW_FILE = "_annotations.coco.json"  # beside the pictures
ROBOFLOW_FOLDERS = {"train": "train", "val": "valid"}
TELL_EVERY = 5.0  # seconds
TELL_LOOKS = 1000  # files between looks at the clock
PLACE_BITS = 32  # of a row's place among the annotations, beside that of its image


class Category(NamedTuple):
    id: int
    name: str


@dataclass(frozen=True, eq=False)
class Annotations:
    """The images of an annotation file and their cleaned boxes."""

    path: Path  # the annotation file
    image_folder: Path
    image_ids: np.ndarray  # int64 [I], in the file's order
    sizes: np.ndarray  # int32 [I, 2] width, height in pixels
    names: np.ndarray  # uint8: all file names, one after another
    first_byte: np.ndarray  # int64 [I + 1]: file name i is names[first_byte[i] : first_byte[i + 1]]
    first_box: np.ndarray  # int64 [I + 1]: the boxes of image i are boxes[first_box[i] : first_box[i + 1]]
    boxes: np.ndarray  # float32 [B, 4] ltrb in pixels, inside the image, of positive area
    labels: np.ndarray  # int64 [B] in 1..K: label k is the k-th entry of `categories`
    crowd: np.ndarray  # bool [B]
    areas: np.ndarray  # float64 [B] the file's `area`, the segmentation's; else width x height
    annotation_ids: np.ndarray  # int64 [B], no two alike
    categories: tuple[Category, ...]  # of the training file, in its order
    warnings: tuple[str, ...]  # a line each
    upright: bool = False  # sizes and boxes are those of the pictures turned as their orientation tags say
    ground_truth: GroundTruth | None = None  # what is scored against; None where the file was read for training

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, i: int) -> str:
        """The file name of image `i` as the annotation file has it, perhaps with subfolders."""
        return self.names[self.first_byte[i] : self.first_byte[i + 1]].tobytes().decode()

    def file_names(self, images: range) -> list[str]:
        """The file names of successive images."""
        start, stop = self.first_byte[images.start], self.first_byte[images.stop]
        together = self.names[start:stop].tobytes()
        ends = (self.first_byte[images.start : images.stop + 1] - start).tolist()
        return [together[first:last].decode() for first, last in pairwise(ends)]

    def packed_names(self, images: np.ndarray, end: bytes) -> bytes:
        """The file names of some images, each with one byte after it; fast where those of all are wanted."""
        lengths = self.first_byte[images + 1] - self.first_byte[images]
        before = np.cumsum(lengths) - lengths  # bytes of the earlier names
        source = np.repeat(self.first_byte[images] - before, lengths)
        target = np.repeat(np.arange(len(images)), lengths)
        place = np.arange(lengths.sum())
        joined = np.full(lengths.sum() + len(images), ord(end), np.uint8)
        joined[place + target] = self.names[place + source]
        return joined.tobytes()

    def image_path(self, i: int) -> Path:
        return self.image_folder / self.file_name(i)

    def of_image(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the boxes [G, 4] and labels [G] of image `i`."""
        own = slice(self.first_box[i], self.first_box[i + 1])
        return self.boxes[own].copy(), self.labels[own].copy()

    @cached_property
    def digest(self) -> str:
        """A short text that differs where another network would be trained, or other figures scored.

        For training: where the images with boxes, or their boxes and labels, differ.
        """
        images = self.with_boxes() if self.ground_truth is None else np.arange(len(self))
        content = hashlib.blake2b(digest_size=8)
        for start in range(0, len(images), BLOCK):
            names = self.packed_names(images[start : start + BLOCK], b"\0")
            content.update(names if start + BLOCK < len(images) else names[:-1])
        scored = () if self.ground_truth is None else (self.image_ids, *self.ground_truth)
        for array in (self.sizes[images], np.diff(self.first_box)[images], self.boxes, self.labels, *scored):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def with_boxes(self) -> np.ndarray:
        """int64 indices of the images that have at least one box."""
        return np.flatnonzero(np.diff(self.first_box))


def read_annotations(
    path: Path | str,
    image_folder: Path | str,
    *,
    categories: tuple[Category, ...] | None = None,
    categories_of: str = "the training file",
    upright: bool = False,
    for_scoring: bool = False,
) -> Annotations:
    """Reads and cleans an annotation file.

    categories: the training file's, whose order gives the labels; None: the file's own.
    categories_of: what they are called in an error.
    for_scoring: the file's boxes are kept as `ground_truth`, too.  Otherwise at least one box must be usable.
    upright: sizes and boxes are those of pictures turned as their orientation tags say, not of the stored ones.
    Boxes are clipped to their image; those without area there are dropped, with a warning.
    Raises DataError for what cannot be trained on or scored.
    """
    path, image_folder = Path(path), Path(image_folder)
    images, rows, own = _read(path, for_scoring=for_scoring)
    own_categories = _categories(path, own)
    if categories is not None:
        _check_same_categories(path, own_categories, categories, categories_of)
    images.check(path, image_folder)
    images.spell_as_on_disk(image_folder)
    categories = own_categories if categories is None else tuple(categories)
    rows.finish(path, [category.id for category in categories])
    ground_truth = rows.ground_truth()
    annotations = _clean(path, image_folder, images, rows, categories)
    annotations = replace(annotations, upright=upright, ground_truth=ground_truth)
    _check_usable(annotations, rows, training=not for_scoring)
    return annotations


def _read(path: Path, *, for_scoring: bool) -> tuple[Images, AnnotationTable, list[CategoryEntry]]:
    """The file's three lists; nothing is checked yet but the entries' fields."""
    images, categories = Images(), list[CategoryEntry]()
    rows = AnnotationTable(images, for_scoring=for_scoring)
    for part, first, entries in pieces(path):
        if part == "images":
            images = images if first else Images()
            images.add(entries)
        elif part == "annotations":
            if not first:
                images.finish()
                rows = AnnotationTable(images, for_scoring=for_scoring)
            rows.add(entries)
        else:
            categories = categories + entries if first else entries
    return images, rows, categories


# --- categories ------------------------------------------------------------------------------------------------------


def _categories(path: Path, entries: list[CategoryEntry]) -> tuple[Category, ...]:
    if not entries:
        raise DataError(f"{path}: `categories` is empty: it must name what is to be detected")
    repeated = first_repeated(np.array([entry.id for entry in entries], np.int64))
    if repeated is not None:
        raise DataError(f"{path}: category id {repeated} occurs more than once in `categories`")
    return tuple(Category(entry.id, entry.name) for entry in entries)


def _namesakes(categories: tuple[Category, ...]) -> Iterator[str]:
    """A line for each name that several categories have."""
    for name, count in Counter(category.name for category in categories).items():
        if count > 1:
            ids = listed([category.id for category in categories if category.name == name])
            yield f"the categories {ids} have the same name {name!r}: they are kept apart"


def _check_same_categories(path: Path, own: tuple[Category, ...], wanted: tuple[Category, ...], wanted_of: str) -> None:
    def named(categories: Iterable[Category]) -> str:
        return listed([f"{category.id} {category.name!r}" for category in sorted(categories)]) or "none"

    here, there = set(own) - set(wanted), set(wanted) - set(own)
    if here or there:
        raise DataError(
            f"{path}: its categories are not those of {wanted_of}: only here: {named(here)}; only there: "
            f"{named(there)}: give both the same ids and names"
        )


# --- boxes -----------------------------------------------------------------------------------------------------------


def _clean(
    path: Path, image_folder: Path, images: Images, rows: AnnotationTable, categories: tuple[Category, ...]
) -> Annotations:
    """The Annotations of the rows that can be used, grouped by image; takes the rows' columns away."""
    usable = (rows.image >= 0) & rows.has(HAS_AREA)
    warnings = tuple(f"{path}: {line}" for line in (*_namesakes(categories), *warnings_of(rows, usable)))
    counts = np.bincount(rows.image[usable], minlength=len(images.ids))
    order = _by_image(vars(rows).pop("image"), usable)
    crowd = rows.has(CROWD)[order]
    del rows.flags, usable  # the columns that follow are large, and each is for a while there twice

    def chosen(name: str, dtype: type) -> np.ndarray:
        column = vars(rows).pop(name)
        taken = np.empty((len(order), *column.shape[1:]), dtype)
        for start in range(0, len(order), BLOCK):
            taken[start : start + BLOCK] = column[order[start : start + BLOCK]]
        return taken

    return Annotations(
        path=path,
        image_folder=image_folder,
        image_ids=images.ids,
        sizes=images.sizes,
        names=images.names,
        first_byte=images.first_byte,
        first_box=starts(counts),
        boxes=chosen("boxes", np.float32),
        labels=chosen("labels", np.int64),
        crowd=crowd,
        areas=chosen("areas", np.float64),
        annotation_ids=chosen("ids", np.int64),
        categories=categories,
        warnings=warnings,
    )


def _by_image(image: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """The places of the usable rows, grouped by image, in their order within an image; uint32.

    The same as a stable argsort, but in place, and five times as fast.
    """
    order = np.flatnonzero(usable)
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        block |= image[block].astype(np.int64) << PLACE_BITS
    order.sort()
    return order.astype(np.uint32)  # the lower half: PLACE_BITS


def _check_usable(annotations: Annotations, rows: AnnotationTable, *, training: bool) -> None:
    """Raises DataError for a training file without a box, and for annotations that are all of other images."""
    if len(annotations.boxes) or not (training or 0 < rows.count == rows.num_strange):
        return
    cause = "none has a box with an area inside its image" if rows.count else "`annotations` is empty"
    if rows.num_strange:
        cause = f"the first image_id that no image has is {rows.strange[0]}"
    raise DataError(
        f"{annotations.path}: 0 of {len(annotations)} images have a usable annotation ({cause}; images in "
        f"{annotations.image_folder.absolute()}): give the annotation file of these images"
    )


# --- files -----------------------------------------------------------------------------------------------------------


def locations(folder: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split, `train` or `val`: in the COCO 2017 layout or, if that has no such
    file, in that of Roboflow's COCO export.

    Where neither has one, reading the file is an error that names both layouts.
    """
    file = folder / "annotations" / f"instances_{split}2017.json"
    images = folder / ROBOFLOW_FOLDERS[split]
    if not os.path.exists(file) and os.path.lexists(images / ROBOFLOW_FILE):
        return images / ROBOFLOW_FILE, images
    return file, folder / f"{split}2017"


def check_images_exist(annotations: Annotations, *, tell: Callable[[str], None] | None = None) -> None:
    """Raises DataError, with its full path, for the first image whose file is not there; one listing a folder.

    tell: gets a line now and then while the folders take long to list.
    """
    listed: dict[str, set[str]] = {}
    told = ScanProgress(annotations, tell)
    for start in range(0, len(annotations), BLOCK):
        names = annotations.file_names(range(start, min(start + BLOCK, len(annotations))))
        for index, path in enumerate(names, start):
            folder, _, name = path.rpartition("/")
            if folder not in listed:
                listed[folder] = _files_in(annotations, folder, told)
            # Not every file system tells upper and lower case apart, so the listing alone is no proof.
            if name not in listed[folder] and not os.path.isfile(annotations.image_path(index)):
                raise _missing(annotations, index)


def _missing(annotations: Annotations, index: int) -> DataError:
    """Why the image's file is of no use, and which entry names it."""
    path = annotations.image_path(index).absolute()
    why = "no such image file"
    try:
        path.stat()
        why = "no such image file (it is a folder)" if path.is_dir() else "no image file (it is a pipe or a device)"
    except FileNotFoundError:
        if path.is_symlink():
            why = f"no such image file (it is a link to {os.readlink(path)}, which is not there)"
    except (OSError, ValueError) as error:
        why = f"no such image file that can be read ({getattr(error, 'strerror', None) or error})"
    name = annotations.file_name(index)
    slashes = name.replace("\\", "/")
    hint = ""
    if slashes != name and os.path.isfile(annotations.image_folder / slashes):
        hint = f" by file_name {name!r}; there is a file {slashes!r}: write slashes in file_name"
    return DataError(f"{path}: {why}: {annotations.path} names it for image {annotations.image_ids[index]}{hint}")


class ScanProgress:
    """Counts files and tells how many there are, every few seconds."""

    def __init__(self, annotations: Annotations, tell: Callable[[str], None] | None) -> None:
        self.annotations = annotations
        self.tell = tell
        self.found = 0
        self.next_time = time.monotonic() + TELL_EVERY

    def count(self) -> None:
        self.found += 1
        if self.tell is not None and self.found % TELL_LOOKS == 0 and time.monotonic() > self.next_time:
            self.next_time = time.monotonic() + TELL_EVERY
            folder, wanted = self.annotations.image_folder, len(self.annotations)
            self.tell(f"Looking for the {wanted} images of {folder}: {self.found} files so far")


def _files_in(annotations: Annotations, folder: str, told: ScanProgress) -> set[str]:
    path = (annotations.image_folder / folder).absolute()
    names = set()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                with suppress(OSError):  # a link to itself, or into a folder that may not be entered
                    if entry.is_file():
                        names.add(entry.name)
                told.count()
        return names
    except OSError as error:
        raise DataError(
            f"{path}: the image folder cannot be read ({error.strerror}): {annotations.path} names images in it"
        ) from None
