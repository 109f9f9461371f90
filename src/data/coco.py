"""A COCO annotation file read into arrays, cleaned and checked; the label map.

Both data pipelines and the scoring work on these arrays.  They hold no Python object per image or box, so worker
processes share them instead of copying them page by page.
Shapes: I images, B boxes, K categories, M entries of `annotations` before cleaning.
"""

import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from src.errors import DataError

from .coco_file import CategoryEntry, ImageEntry, decode_file
from .coco_rows import Rows, listed, read_rows, warnings_of
from .file_names import spelled_as_on_disk

T = TypeVar("T")


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
    upright: bool = False  # sizes and boxes are those of the pictures turned as their orientation tags say

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

    @cached_property
    def digest(self) -> str:
        """A short text that differs where the images with boxes, or their boxes and labels, do."""
        images = self.with_boxes()
        content = hashlib.blake2b("\0".join(map(self.file_name, images.tolist())).encode(), digest_size=8)
        for array in (self.sizes[images], np.diff(self.first_box)[images], self.boxes, self.labels):
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
) -> Annotations:
    """Reads and cleans an annotation file.

    categories: the training file's, whose order gives the labels; None for the training file itself, which must then
    have a usable box.  categories_of: what they are called in an error.
    upright: sizes and boxes are those of pictures turned as their orientation tags say, not of the stored ones.
    Boxes are clipped to their image; those without area there are dropped, with a warning.
    Raises DataError for what cannot be trained on or scored.
    """
    path, image_folder = Path(path), Path(image_folder)
    content = decode_file(path)
    training = categories is None
    own = _categories(path, content.categories)
    if categories is not None:
        _check_same_categories(path, own, categories, categories_of)
    images = _images(path, content.images, image_folder)
    categories = own if categories is None else tuple(categories)
    ids = [category.id for category in categories]
    rows = read_rows(path, content.annotations, image_ids=images.ids, sizes=images.sizes, category_ids=ids)
    del content  # a million objects
    annotations = replace(_clean(path, image_folder, images, rows, categories), upright=upright)
    _check_usable(annotations, rows, training=training)
    return annotations


# --- categories and images -------------------------------------------------------------------------------------------


def _categories(path: Path, entries: list[CategoryEntry]) -> tuple[Category, ...]:
    if not entries:
        raise DataError(f"{path}: `categories` is empty: it must name what is to be detected")
    repeated = _first_repeated(entry.id for entry in entries)
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


class _Images(NamedTuple):
    ids: np.ndarray  # int64 [I]
    sizes: np.ndarray  # int32 [I, 2] width, height
    names: bytes
    first_byte: np.ndarray  # int64 [I + 1]


def _images(path: Path, entries: list[ImageEntry], image_folder: Path) -> _Images:
    if not entries:
        raise DataError(f"{path}: `images` is empty: it must list the pictures in {image_folder.absolute()}")
    ids = np.fromiter((entry.id for entry in entries), np.int64, len(entries))
    repeated = _first_repeated(ids.tolist())
    if repeated is not None:
        first, second = np.flatnonzero(ids == repeated)[:2]
        raise DataError(f"{path}: images[{first}] and images[{second}] have the same id {repeated}: give each its own")
    names = [entry.file_name for entry in entries]
    _check_names(path, names, image_folder)
    sizes = np.empty((len(entries), 2), np.int32)
    sizes[:, 0] = [entry.width for entry in entries]
    sizes[:, 1] = [entry.height for entry in entries]
    encoded = [name.encode() for name in spelled_as_on_disk(names, image_folder)]
    return _Images(ids, sizes, b"".join(encoded), _starts(np.array([len(name) for name in encoded])))


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


def _first_repeated(values: Iterable[T]) -> T | None:
    """The first of the values that occurs twice, or None."""
    values = list(values)
    if len(set(values)) == len(values):
        return None
    counts = Counter(values)
    return next(value for value in values if counts[value] > 1)


def _clean(
    path: Path, image_folder: Path, images: _Images, rows: Rows, categories: tuple[Category, ...]
) -> Annotations:
    """The Annotations of the rows that can be used, grouped by image."""
    usable = (rows.image >= 0) & rows.solid
    order = np.flatnonzero(usable)
    order = order[_by_image(rows.image[order])]
    return Annotations(
        path=path,
        image_folder=image_folder,
        image_ids=images.ids,
        sizes=images.sizes,
        names=images.names,
        first_byte=images.first_byte,
        first_box=_starts(np.bincount(rows.image[order], minlength=len(images.ids))),
        boxes=rows.boxes.take(order, axis=0),
        labels=rows.labels[order],
        crowd=rows.crowd[order],
        areas=rows.areas[order],
        annotation_ids=rows.ids[order],
        categories=categories,
        warnings=tuple(f"{path}: {line}" for line in (*_namesakes(categories), *warnings_of(rows, usable))),
    )


def _by_image(image: np.ndarray) -> np.ndarray:
    """`np.argsort(image, kind="stable")`, by the lower 16 bits, then the upper ones: four times as fast."""
    order = np.argsort(image.astype(np.uint16), kind="stable")
    return order[np.argsort((image >> 16).astype(np.uint16)[order], kind="stable")]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _check_usable(annotations: Annotations, rows: Rows, *, training: bool) -> None:
    """Raises DataError for a training file without a box, and for annotations that are all of other images."""
    if len(annotations.boxes) or not (training or 0 < len(rows.image) == len(rows.strange)):
        return
    cause = "none has a box with an area inside its image" if len(rows.image) else "`annotations` is empty"
    if len(rows.strange):
        cause = f"the first image_id that no image has is {rows.strange[0]}"
    raise DataError(
        f"{annotations.path}: 0 of {len(annotations)} images have a usable annotation ({cause}; images in "
        f"{annotations.image_folder.absolute()}): give the annotation file of these images"
    )


# --- files -----------------------------------------------------------------------------------------------------------


def locations(folder: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split, `train` or `val`, in the COCO 2017 layout."""
    return folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"


def check_images_exist(annotations: Annotations) -> None:
    """Raises DataError, with its full path, for the first image whose file is not there; one listing a folder."""
    listed: dict[str, set[str]] = {}
    for index in range(len(annotations)):
        folder, name = posixpath.split(annotations.file_name(index))
        if folder not in listed:
            listed[folder] = _files_in(annotations, folder)
        # Not every file system tells upper and lower case apart, so the listing alone is no proof.
        if name not in listed[folder] and not os.path.isfile(annotations.image_path(index)):
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


class _CleanImage(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _CleanAnnotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int = 0  # crowds are trained as ordinary boxes


def write_clean_file(annotations: Annotations, path: Path | str) -> None:
    """Writes a COCO file of the images that have boxes, for a parser that need not cope with anything.

    An image's id is its position in `with_boxes()`, a category's the label.
    """
    chosen = annotations.with_boxes()
    counts = np.diff(annotations.first_box)[chosen]
    boxes = annotations.boxes.astype(np.float64)  # so that left + width is right again in float32
    boxes[:, 2:] -= boxes[:, :2]
    columns = (
        np.arange(1, len(boxes) + 1),
        np.repeat(np.arange(len(chosen)), counts),
        annotations.labels,
        boxes,
        boxes[:, 2] * boxes[:, 3],
    )
    files = ((i, annotations.file_name(k), *annotations.sizes[k].tolist()) for i, k in enumerate(chosen))
    content = {
        "images": [_CleanImage(*file) for file in files],
        "annotations": list(map(_CleanAnnotation, *(column.tolist() for column in columns))),
        "categories": [{"id": k, "name": category.name} for k, category in enumerate(annotations.categories, 1)],
    }
    Path(path).write_bytes(msgspec.json.encode(content))
