"""A COCO annotation file read into arrays, cleaned and checked; the label map.

Both data pipelines and the scoring work on these arrays.  They hold no Python object per image or box, so worker
processes share them instead of copying them page by page.
Shapes: I images, B boxes, K categories, M entries of `annotations` before cleaning.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from .coco_file import AnnotationEntry, CategoryEntry, ImageEntry, decode_file
from .errors import DataError

FIRST_IDS = 5  # how many a warning names


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
    names: bytes  # all file names, one after another
    first_byte: np.ndarray  # int64 [I + 1]: file name i is names[first_byte[i] : first_byte[i + 1]]
    first_box: np.ndarray  # int64 [I + 1]: the boxes of image i are boxes[first_box[i] : first_box[i + 1]]
    boxes: np.ndarray  # float32 [B, 4] ltrb in pixels, inside the image, of positive area
    labels: np.ndarray  # int64 [B] in 1..K: label k is the k-th entry of `categories`
    crowd: np.ndarray  # bool [B]
    areas: np.ndarray  # float64 [B] the file's `area`, the segmentation's; else width x height
    annotation_ids: np.ndarray  # int64 [B], no two alike
    categories: tuple[Category, ...]  # of the training file, in its order
    warnings: tuple[str, ...]  # a line each

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, i: int) -> str:
        """The file name of image `i` as the annotation file has it, perhaps with subfolders."""
        return self.names[self.first_byte[i] : self.first_byte[i + 1]].decode()

    def image_path(self, i: int) -> Path:
        return self.image_folder / self.file_name(i)

    def of_image(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the boxes [G, 4] and labels [G] of image `i`."""
        own = slice(self.first_box[i], self.first_box[i + 1])
        return self.boxes[own].copy(), self.labels[own].copy()

    def with_boxes(self) -> np.ndarray:
        """int64 indices of the images that have at least one box."""
        return np.flatnonzero(np.diff(self.first_box))


def read_annotations(
    path: Path | str, image_folder: Path | str, *, categories: tuple[Category, ...] | None = None
) -> Annotations:
    """Reads and cleans an annotation file.

    categories: the training file's, whose order gives the labels; None for the training file itself, which must then
    have a usable box.  Boxes are clipped to their image; those without area there are dropped, with a warning.
    Raises DataError for what cannot be trained on or scored.
    """
    path, image_folder = Path(path), Path(image_folder)
    content = decode_file(path)
    own = _categories(path, content.categories)
    if categories is not None:
        _check_same_categories(path, own, categories)
    image_ids, sizes, names = _images(path, content.images, image_folder)
    columns = _columns(content.annotations)
    del content  # a million objects
    return _assemble(
        path, image_folder, image_ids, sizes, names, columns, categories or own, training=categories is None
    )


# --- categories and images -------------------------------------------------------------------------------------------


def _categories(path: Path, entries: list[CategoryEntry]) -> tuple[Category, ...]:
    if not entries:
        raise DataError(f"{path}: `categories` is empty: it must name what is to be detected")
    repeated = _first_repeated(entry.id for entry in entries)
    if repeated is not None:
        raise DataError(f"{path}: category id {repeated} occurs more than once in `categories`")
    return tuple(Category(entry.id, entry.name) for entry in entries)


def _check_same_categories(path: Path, own: tuple[Category, ...], training: tuple[Category, ...]) -> None:
    def listed(categories: Iterable[Category]) -> str:
        return ", ".join(f"{category.id} {category.name!r}" for category in sorted(categories)) or "none"

    here, there = set(own) - set(training), set(training) - set(own)
    if here or there:
        raise DataError(
            f"{path}: its categories are not the training file's: only here: {listed(here)}; only there: "
            f"{listed(there)}: give both files the same ids and names"
        )


def _images(path: Path, entries: list[ImageEntry], image_folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if not entries:
        raise DataError(f"{path}: `images` is empty: it must list the pictures in {image_folder.absolute()}")
    ids = np.fromiter((entry.id for entry in entries), np.int64, len(entries))
    repeated = _first_repeated(ids.tolist())
    if repeated is not None:
        first, second = np.flatnonzero(ids == repeated)[:2]
        raise DataError(f"{path}: images[{first}] and images[{second}] have the same id {repeated}: give each its own")
    names = [entry.file_name for entry in entries]
    _check_names(path, names, image_folder)
    sizes = np.array([(entry.width, entry.height) for entry in entries], np.int32)
    return ids, sizes, names


def _check_names(path: Path, names: list[str], image_folder: Path) -> None:
    """Raises DataError for a name that is not a path below the folder, and for two names of one file."""
    together = "\0".join(names)
    if together.count("\0") != len(names) - 1 or "/" in together:
        for index, name in enumerate(names):
            if name.startswith("/") or "\0" in name or ".." in name.split("/"):
                raise DataError(
                    f"{path}: images[{index}].file_name is {name!r}: it must be a path below {image_folder.absolute()}"
                )
        names = [posixpath.normpath(name) for name in names]
    repeated = _first_repeated(names)
    if repeated is not None:
        first = names.index(repeated)
        second = names.index(repeated, first + 1)
        raise DataError(
            f"{path}: images[{first}] and images[{second}] have the same file_name {repeated!r}: make them one image"
        )


def _first_repeated(values: Iterable):
    """The first of the values that occurs twice, or None."""
    values = list(values)
    if len(set(values)) == len(values):
        return None
    counts = Counter(values)
    return next(value for value in values if counts[value] > 1)


# --- boxes -----------------------------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """The entries of `annotations`, a column a field."""

    image_ids: np.ndarray  # int64 [M]
    category_ids: np.ndarray  # int64 [M]
    boxes: np.ndarray  # float64 [M, 4] x, y, width, height
    crowd: np.ndarray  # bool [M]
    areas: np.ndarray  # float64 [M]
    ids: np.ndarray  # int64 [M]
    renumbered: bool  # the file's ids were missing or not unique


def _columns(entries: list[AnnotationEntry]) -> _Columns:
    def column(field: str, dtype: type) -> np.ndarray:
        return np.fromiter(map(attrgetter(field), entries), dtype, len(entries))

    boxes = np.stack([column(f"bbox.{side}", np.float64) for side in ("x", "y", "width", "height")], axis=1)
    areas = np.fromiter((np.nan if entry.area is None else entry.area for entry in entries), np.float64, len(entries))
    ids = [entry.id for entry in entries]
    renumbered = None in ids or len(set(ids)) < len(ids)
    with np.errstate(over="ignore"):
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    return _Columns(
        image_ids=column("image_id", np.int64),
        category_ids=column("category_id", np.int64),
        boxes=boxes,
        crowd=column("iscrowd", np.bool_),
        areas=areas,
        ids=np.arange(1, len(entries) + 1) if renumbered else np.array(ids, np.int64),
        renumbered=renumbered,
    )


def _positions(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each value stands in `among`, whose values differ; -1 where it does not."""
    order = np.argsort(among)
    nearest = order[np.searchsorted(among, values, sorter=order).clip(max=len(among) - 1)]
    return np.where(among[nearest] == values, nearest, -1)


def _clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """float32 [M, 4] ltrb inside the image of float64 [M, 4] x, y, width, height; sizes [M, 2]."""
    with np.errstate(over="ignore"):
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return np.clip(corners, 0, np.tile(sizes, 2)).astype(np.float32)


def _assemble(
    path: Path,
    image_folder: Path,
    image_ids: np.ndarray,
    sizes: np.ndarray,
    names: list[str],
    columns: _Columns,
    categories: tuple[Category, ...],
    *,
    training: bool,
) -> Annotations:
    labels = 1 + _positions(columns.category_ids, np.array([category.id for category in categories]))
    if not labels.all():
        first = int(np.argmin(labels != 0))
        raise DataError(
            f"{path}: annotations[{first}].category_id is {columns.category_ids[first]}, which no entry of "
            "`categories` has"
        )
    image = _positions(columns.image_ids, image_ids)  # [M]
    boxes = _clipped(columns.boxes, sizes[image])
    area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    usable = np.flatnonzero((image >= 0) & area)
    if not len(usable) and (training or (len(image) and (image < 0).all())):
        _raise_nothing_usable(path, image_folder, image_ids, columns, image)
    order = usable[np.argsort(image[usable], kind="stable")]
    encoded = [name.encode() for name in names]
    return Annotations(
        path=path,
        image_folder=image_folder,
        image_ids=image_ids,
        sizes=sizes,
        names=b"".join(encoded),
        first_byte=_starts(np.array([len(name) for name in encoded])),
        first_box=_starts(np.bincount(image[order], minlength=len(image_ids))),
        boxes=boxes[order],
        labels=labels[order],
        crowd=columns.crowd[order],
        areas=columns.areas[order],
        annotation_ids=columns.ids[order],
        categories=categories,
        warnings=_warnings(path, columns, image, area, sizes),
    )


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _raise_nothing_usable(path: Path, image_folder: Path, image_ids, columns: _Columns, image: np.ndarray) -> None:
    unmatched = columns.image_ids[image < 0]
    cause = f"first image_id without an image: {unmatched[0]}" if len(unmatched) else "none has a box with an area"
    raise DataError(
        f"{path}: 0 of {len(image_ids)} images have a usable annotation ({cause}; images in "
        f"{image_folder.absolute()}): is it the annotation file of these images?"
    )


def _warnings(path: Path, columns: _Columns, image: np.ndarray, area: np.ndarray, sizes: np.ndarray) -> tuple[str, ...]:
    """A line for each kind of fault that was mended."""
    known = image >= 0
    flat = (columns.boxes[:, 2:] <= 0).any(axis=1)
    kinds = (
        (~known, "name an image_id that no image has and are left out", columns.image_ids, "image ids"),
        (known & flat, "have a box whose width or height is not positive and are left out", columns.ids, "ids"),
        (known & ~flat & ~area, "have a box outside their image and are left out", columns.ids, "ids"),
    )
    lines = []
    for which, what, ids, name in kinds:
        if which.any():
            first = ", ".join(map(str, ids[which][:FIRST_IDS]))
            lines.append(f"{path}: {which.sum()} of {len(which)} annotations {what} (first {name}: {first})")
    if columns.renumbered:
        lines.append(f"{path}: annotations without an id, or with one that is not theirs alone: numbered from 1")
    return tuple(lines)


# --- files -----------------------------------------------------------------------------------------------------------


def check_images_exist(annotations: Annotations) -> None:
    """Raises DataError, with its full path, for the first image whose file is not there; one listing a folder."""
    listed: dict[str, set[str]] = {}
    for index in range(len(annotations)):
        folder, name = posixpath.split(annotations.file_name(index))
        if folder not in listed:
            listed[folder] = _files_in(annotations, folder)
        # Not every file system tells upper and lower case apart, so the listing alone is no proof.
        if name not in listed[folder] and not annotations.image_path(index).is_file():
            raise DataError(
                f"{annotations.image_path(index).absolute()}: no such image file: {annotations.path} names it for "
                f"image {annotations.image_ids[index]}"
            )


def _files_in(annotations: Annotations, folder: str) -> set[str]:
    path = (annotations.image_folder / folder).absolute()
    try:
        with os.scandir(path) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError as error:
        raise DataError(
            f"{path}: the image folder cannot be read ({error.strerror}): {annotations.path} names images in it"
        ) from None


class _CleanImage(msgspec.Struct):
    id: int
    file_name: str
    width: int
    height: int


class _CleanAnnotation(msgspec.Struct):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    iscrowd: int = 0  # crowds are trained as ordinary boxes


def write_clean_file(annotations: Annotations, path: Path | str) -> None:
    """Writes a COCO file of the images that have boxes: image ids are their positions in `with_boxes()`, category ids
    the labels."""
    chosen = annotations.with_boxes()
    images = [_CleanImage(i, annotations.file_name(k), *annotations.sizes[k].tolist()) for i, k in enumerate(chosen)]
    counts = np.diff(annotations.first_box)[chosen]
    corners = annotations.boxes.astype(np.float64)
    sides = corners[:, 2:] - corners[:, :2]
    rows = zip(
        np.repeat(np.arange(len(chosen)), counts).tolist(),
        annotations.labels.tolist(),
        np.concatenate([corners[:, :2], sides], axis=1).tolist(),
        sides.prod(axis=1).tolist(),
        strict=True,
    )
    boxes = [_CleanAnnotation(number, *row) for number, row in enumerate(rows, 1)]
    categories = [{"id": label, "name": category.name} for label, category in enumerate(annotations.categories, 1)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    Path(path).write_bytes(msgspec.json.encode(content))
