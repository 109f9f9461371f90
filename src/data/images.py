"""Image files read and decoded without DALI; the resizing that both pipelines share."""

import io
import os
import re
import struct
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2 import functional as F

from src.errors import DataError
from src.ssd.default_boxes import IMAGE_SIZE

from .coco import Annotations

GIF = b"GIF8"  # how such a file begins
ORIENTATION_TAG = 0x0112  # EXIF 2.32, table 4
STORED = 1  # the orientation of a picture that is shown as it is stored
TRANSPOSED = (5, 6, 7, 8)  # the orientations of pictures whose stored rows are columns
# The dimensions of [3, H, W] that are then mirrored.
MIRRORED = {2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}


def decode(path: Path, *, gif: bool = True, upright: bool = False) -> Tensor:
    """The picture in a file, a film's first one; [3, H, W] uint8 RGB.

    upright: turned as its EXIF orientation tag says, which is ignored otherwise.

    Raises DataError, with the full path, for a file that is missing or that torchvision cannot decode, and without
    `gif` for a GIF too.
    """
    try:
        content = read_file(str(path))
        if not gif and bytes(content[: len(GIF)].tolist()) == GIF:
            raise DataError(f"{path.absolute()}: is a GIF, which DALI cannot read: store it as JPEG, PNG or WebP")
        image = decode_image(content, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise DataError(f"{path.absolute()}: cannot be read as an image ({_reason(path, error)})") from None
    if image.dim() == 4:  # a film
        image = image[0]
    if image.dtype == torch.uint16:  # a 16-bit PNG
        image = (image.int() >> 8).byte()
    return turned(image, orientation(path.read_bytes())) if upright else image


def orientation(content: bytes) -> int:
    """The EXIF orientation of an image file's content, 1 to 8; 1 where it has none that is readable."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            exif = Image.Exif()
            exif.load(picture.info.get("exif", b""))
            value = exif.get(ORIENTATION_TAG)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError):
        return STORED
    return value if value in MIRRORED else STORED


def turned(image: Tensor, orientation: int) -> Tensor:
    """A stored picture [3, H, W] as it is to be shown: [3, H, W], or [3, W, H] for a `TRANSPOSED` one."""
    if orientation in TRANSPOSED:
        image = image.transpose(1, 2)
    return image.flip(MIRRORED.get(orientation, ()))


def _reason(path: Path, error: RuntimeError) -> str:
    """Why torchvision did not read the file; its own message begins with a place in its source."""
    if not is_text(path):
        return "its path is not UTF-8 text: rename it"
    if not os.path.exists(path):
        return "no such file"
    if os.path.isdir(path):
        return "it is a folder"
    if os.path.getsize(path) == 0:
        return "it is empty"
    return re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0]).split(". For ")[0].rstrip(".")


def is_text(path: Path) -> bool:
    """Whether the path's bytes are UTF-8, without which neither torchvision nor DALI can open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_image(annotations: Annotations, index: int) -> Tensor:
    """`decode` of an image of the annotation file, whose size must be the one given there."""
    image = decode(annotations.image_path(index), gif=False)  # both pipelines read the same files
    width, height = annotations.sizes[index]
    if image.shape[1:] != (height, width):
        raise DataError(
            f"{annotations.image_path(index).absolute()}: the picture is {image.shape[2]} x {image.shape[1]}, but "
            f"{annotations.path} says width {width}, height {height}: correct the entry of image "
            f"{annotations.image_ids[index]}"
        )
    return image


def resize(image: Tensor) -> Tensor:
    """The image [3, H, W] at 300 x 300, by an antialiased triangular filter, as both pipelines do it."""
    return F.resize(image, [IMAGE_SIZE, IMAGE_SIZE], antialias=True)
