"""Reads the data set in a folder for training."""

import os
from collections.abc import Callable
from pathlib import Path

from src.data.annotations.coco import (
    ROBOFLOW_FILE,
    ROBOFLOW_FOLDERS,
    Annotations,
    check_images_exist,
    locations,
    read_annotations,
)
from src.runtime.errors import DataError

NO_VALIDATION = (
    f"no validation split (annotations/instances_val2017.json or {ROBOFLOW_FOLDERS['val']}/{ROBOFLOW_FILE}): "
    "--evaluation without epochs trains without one"
)


def read_dataset(
    folder: Path, *, evaluating: bool, upright: bool, log_progress: Callable[[str], None] | None = None
) -> tuple[Annotations, Annotations | None]:
    """The training annotations and, if `evaluating`, the validation annotations; the files of all images exist.

    upright: see `read_annotations`.  log_progress: is called with a line of progress every few seconds.
    Raises DataError if the data set cannot be trained on.
    """
    training = read_annotations(*locations(folder, "train"), upright=upright)
    validation = None
    if evaluating:
        files = locations(folder, "val")
        if not os.path.lexists(files[0]):
            raise DataError(f"{folder.absolute()}: {NO_VALIDATION}")
        validation = read_annotations(*files, categories=training.categories, upright=upright, for_scoring=True)
    for annotations in (training, validation):
        if annotations is not None:
            check_images_exist(annotations, log_progress=log_progress)
    return training, validation
