"""Reads an image of an annotation file, and refuses images that the two pipelines would read differently."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from src.data.annotations.coco import Annotations
from src.data.images.decode import MAX_PIXELS, UnreadableError, check_size, decode, unreadable_error
from src.data.images.exif import STORED, TRANSPOSED, apply_orientation, read_orientation
from src.runtime.errors import DataError

TAG_THREADS = 16  # that read orientation tags: on a network file system they mostly wait
TAGS_PER_TASK = 1024


def read_image(annotations: Annotations, index: int, *, warn: Callable[[str], None] | None = None) -> Tensor:
    """An image of the annotation file, in the orientation of its boxes; [3, H, W] uint8 RGB.  warn: as for `decode`.

    Raises DataError for a file that cannot be read, and for a picture whose size differs from its entry's.
    """
    path = annotations.image_path(index)
    orientation = read_orientation(path) if annotations.upright else STORED
    image = apply_orientation(decode(path, warn=warn), orientation)
    width, height = annotations.sizes[index]
    if image.shape[1:] != (height, width):
        raise DataError(
            f"{path.absolute()}: the picture is {image.shape[2]} x {image.shape[1]}, but {annotations.path} says width "
            f"{width}, height {height}: {_size_hint(annotations, index, image)}"
        )
    return image


def _size_hint(annotations: Annotations, index: int, image: Tensor) -> str:
    """What to do about a picture [3, H, W] whose size differs from the annotation file's."""
    if tuple(image.shape[1:]) == tuple(annotations.sizes[index]) and _is_transposed(annotations.image_path(index)):
        if annotations.upright:
            return "it is the stored picture's size, which --orientation stored reads"
        return "it is the size of the picture turned by its orientation tag, which --orientation upright reads"
    return f"correct the entry of image {annotations.image_ids[index]}"


def _is_transposed(path: Path) -> bool:
    try:
        return read_orientation(path) in TRANSPOSED
    except DataError:
        return False


def check_headers(annotations: Annotations, images: np.ndarray | range) -> None:
    """Raises DataError for the first of these images that is too large or has an unusual orientation tag.

    Takes the sizes from the annotation file.  Reads the tags only if pictures are turned by them: DALI and Pillow turn
    a picture with an unusual tag differently.
    """
    images = np.asarray(images, np.int64)  # a rank may have none
    too_large = images[annotations.sizes[images].astype(np.int64).prod(axis=1) > MAX_PIXELS]
    if len(too_large):
        try:
            check_size(*annotations.sizes[too_large[0]].tolist())
        except UnreadableError as error:
            raise unreadable_error(annotations.image_path(too_large[0]), error) from None
    if annotations.upright:
        tasks = [images[start : start + TAGS_PER_TASK] for start in range(0, len(images), TAGS_PER_TASK)]
        with ThreadPoolExecutor(TAG_THREADS) as pool:
            list(pool.map(lambda task: _read_orientations(annotations, task), tasks))  # raises the first error


def _read_orientations(annotations: Annotations, images: np.ndarray) -> None:
    for index in images.tolist():
        read_orientation(annotations.image_path(index))
