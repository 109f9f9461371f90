"""Image files read and decoded without DALI; the resizing that both pipelines share."""

import re
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from src.data.images.exif import orientation, turned
from src.data.images.png import PNG, DamagedPngError, decode_png
from src.runtime.errors import DataError
from src.ssd.default_boxes import IMAGE_SIZE

GIF = b"GIF8"  # how such a file begins


class UnreadableError(Exception):
    """Why a file cannot be read, in words."""


def decode(path: Path, *, gif: bool = True, upright: bool = False) -> Tensor:
    """The picture in a file, a film's first one; [3, H, W] uint8 RGB.

    upright: turned as its EXIF orientation tag says, which is ignored otherwise.
    Raises DataError, with the full path, for a file that cannot be read or decoded, and without `gif` for a GIF too.
    """
    try:
        content = _content(path)
        if not gif and content.startswith(GIF):
            raise DataError(f"{path.absolute()}: is a GIF, which DALI cannot read: store it as JPEG, PNG or WebP")
        image = decode_png(content) if content.startswith(PNG) else _by_torchvision(content)
    except (UnreadableError, DamagedPngError, RuntimeError) as error:
        raise DataError(f"{path.absolute()}: cannot be read as an image ({_reason(error)})") from None
    return turned(image, orientation(content)) if upright else image


def _content(path: Path) -> bytearray:
    """The file's bytes.  Raises UnreadableError."""
    if not is_text(path):
        raise UnreadableError("its path is not UTF-8 text: rename it")
    try:
        content = bytearray(path.read_bytes())  # not bytes, which torch cannot share
    except FileNotFoundError:
        raise UnreadableError("no such file") from None
    except IsADirectoryError:
        raise UnreadableError("it is a folder") from None
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    if not content:
        raise UnreadableError("it is empty")
    return content


def is_text(path: Path) -> bool:
    """Whether the path's bytes are UTF-8, without which DALI cannot open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _by_torchvision(content: bytearray) -> Tensor:
    """The picture of a file that is no PNG; RuntimeError where torchvision cannot decode it."""
    image = decode_image(torch.frombuffer(content, dtype=torch.uint8), mode=ImageReadMode.RGB)
    return image[0] if image.dim() == 4 else image  # a film


def _reason(error: Exception) -> str:
    """The error's first line; torchvision's begins with a place in its source."""
    return re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0]).split(". For ")[0].rstrip(".")


def resize(image: Tensor) -> Tensor:
    """The image [3, H, W] at 300 x 300, by an antialiased triangular filter, as both pipelines do it."""
    return F.resize(image, [IMAGE_SIZE, IMAGE_SIZE], antialias=True)
