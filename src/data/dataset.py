"""A data set's folder as training needs it."""

from pathlib import Path

from .coco import Annotations, check_images_exist, locations, read_annotations


def read_dataset(folder: Path, *, evaluating: bool) -> tuple[Annotations, Annotations | None]:
    """The training annotations, and those of the validation images where they will be needed; all images are there.

    Raises DataError where they cannot be trained on.
    """
    training = read_annotations(*locations(folder, "train"))
    validation = read_annotations(*locations(folder, "val"), categories=training.categories) if evaluating else None
    for annotations in (training, validation):
        if annotations is not None:
            check_images_exist(annotations)
    return training, validation
