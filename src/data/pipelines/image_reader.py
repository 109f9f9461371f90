"""Reads an image of an annotation file and compares it with its entry there."""

from torch import Tensor

from src.data.annotations.coco import Annotations
from src.data.images.decode import decode
from src.data.images.exif import TRANSPOSED, orientation
from src.runtime.errors import DataError


def read_image(annotations: Annotations, index: int) -> Tensor:
    """`decode` of an image of the annotation file, turned as that has it, whose size must be the one given there."""
    # Both pipelines read the same files.
    image = decode(annotations.image_path(index), gif=False, upright=annotations.upright)
    width, height = annotations.sizes[index]
    if image.shape[1:] != (height, width):
        raise DataError(
            f"{annotations.image_path(index).absolute()}: the picture is {image.shape[2]} x {image.shape[1]}, but "
            f"{annotations.path} says width {width}, height {height}: {_advice(annotations, index, image)}"
        )
    return image


def _advice(annotations: Annotations, index: int, image: Tensor) -> str:
    """What to do about a picture [3, H, W] whose size is not the annotation file's."""
    is_turned = orientation(annotations.image_path(index).read_bytes()) in TRANSPOSED
    if is_turned and tuple(image.shape[1:]) == tuple(annotations.sizes[index]):
        if annotations.upright:
            return "it is the stored picture's size, which --orientation stored reads"
        return "it is the size of the picture turned by its orientation tag, which --orientation upright reads"
    return f"correct the entry of image {annotations.image_ids[index]}"
