"""Decodes image files; the only module that calls an image decoder.

simplejpeg decodes sound JPEG files, to the pixels of torchvision and Pillow: it takes 0.93 of torchvision's time and
Pillow 1.15 (176 photographs of COCO).  Pillow decodes the rest: other formats, CMYK, and JPEG files with damaged data.
"""

import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from src.data.images import png
from src.runtime.errors import DataError
from src.ssd.default_boxes import IMAGE_SIZE

# Larger pictures are refused by their header.  One of 300 megapixels takes 2.1 GB while Pillow decodes it: 4 bytes a
# pixel, and 3 in the tensor.  Photographs of 12,000 x 9,000 are read, and panoramas of 30,000 x 10,000.
MAX_PIXELS = 300_000_000
# How files begin, by format in Pillow's words, whatever their names.  Pillow itself tells the formats of whole headers
# only, and HEIC not at all; a damaged image is to be named, not passed over.
MAGIC_BYTES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8",
    "BMP": rb"BM....\0\0\0\0",
    "TIFF": rb"II\*\0|MM\0\*",
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)",
}
HEADER_BYTES = 12  # the longest of them
DATASET_FORMATS = ("JPEG", "PNG", "WEBP")  # which both pipelines read
JPEG_END = b"\xff\xd9"
JPEG_SCAN = b"\xff\xda"
DAMAGE = (  # what Pillow raises for damaged files
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, MemoryError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class UnreadableError(Exception):
    """Why a file cannot be read as an image."""


def decode(path: Path, *, warn: Callable[[str], None] | None = None) -> Tensor:
    """A picture of a data set, a JPEG, PNG or WebP file, as it is stored; [3, H, W] uint8 RGB.

    warn: gets the decoder's message where data in the middle of a JPEG file are damaged.
    Raises DataError, with the full path, for a file that cannot be read.
    """
    try:
        content = read_file(path)
        kind = image_format(content)
        if kind is None:
            raise UnreadableError("it is no JPEG, PNG or WebP file")
        if kind not in DATASET_FORMATS:
            raise DataError(f"{path.absolute()}: is a {kind}, which DALI cannot read: store it as JPEG, PNG or WebP")
        return decode_content(content, kind, warn=warn)
    except UnreadableError as error:
        raise unreadable_error(path, error) from None


def image_format(content: bytes) -> str | None:
    """The format that a file's first HEADER_BYTES announce, a key of MAGIC_BYTES; None for another file."""
    return next((kind for kind, magic in MAGIC_BYTES.items() if re.match(magic, content, re.DOTALL)), None)


def unreadable_error(path: Path, reason: object) -> DataError:
    return DataError(f"{path.absolute()}: cannot be read as an image ({reason})")


def decode_content(content: bytes, kind: str, *, warn: Callable[[str], None] | None = None) -> Tensor:
    """The first picture of a file of that format; [3, H, W] uint8 RGB.  Raises UnreadableError."""
    damage = None
    if kind == "JPEG":
        image, damage = _sound_jpeg(content)
        if image is not None:
            return image
        if content.rfind(JPEG_END) < content.rfind(JPEG_SCAN):  # Pillow reads some of these files
            raise UnreadableError("it is cut off")
    with open_image(content, kind) as picture:
        image = pixels(picture)
    if damage is not None and warn is not None:
        warn(damage)
    return image


def _sound_jpeg(content: bytes) -> tuple[Tensor | None, str | None]:
    """The picture of a JPEG file, None where only Pillow can read it, and what is damaged, None where nothing is."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    except (ValueError, KeyError):  # KeyError: it has no name for the subsampling
        return None, None
    check_size(width, height)
    is_cmyk = colours == "CMYK"  # Pillow converts it, and simplejpeg by other rounding
    try:
        decoded = simplejpeg.decode_jpeg(content, "CMYK" if is_cmyk else "RGB", strict=True)
    except (ValueError, MemoryError) as error:
        return None, str(error)
    return None if is_cmyk else torch.from_numpy(decoded).permute(2, 0, 1), None


def open_image(content: bytes, kind: str) -> ImageFile:
    """Pillow's reader of the content of a file of that format, which has read the header.  Raises UnreadableError."""
    # Pillow warns without the file's name, and its own limit of 89 megapixels is too low for photographs.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = None
    try:
        if kind == "PNG":
            content = png.needed_chunks(content)
        picture = Image.open(io.BytesIO(content), formats=[kind])
    except UnidentifiedImageError:
        raise UnreadableError("its header is damaged") from None
    except DAMAGE as error:
        raise UnreadableError(str(error) or type(error).__name__) from None
    check_size(*picture.size)
    return picture


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        limit = f"more than the {MAX_PIXELS // 10**6} million that are read: make it smaller"
        raise UnreadableError(f"it has {width} x {height} pixels, {limit}")


def pixels(picture: ImageFile) -> Tensor:
    """Decodes the first picture of an opened file; [3, H, W] uint8 RGB, of 16 bits the upper 8.

    Raises UnreadableError, also for pixels that are measurements and not colours.
    """
    if picture.mode in ("I", "F"):
        raise UnreadableError("its pixels are numbers of 32 bits, no colours")
    try:
        if picture.mode.startswith("I;16"):  # grey
            grey = (np.asarray(picture) >> 8).astype(np.uint8)
            return torch.from_numpy(grey).expand(3, -1, -1)
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except DAMAGE as error:
        raise UnreadableError(str(error) or type(error).__name__) from None


def read_file(path: Path) -> bytes:
    """The file's bytes, at least one.  Raises UnreadableError."""
    require_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    if not content:
        raise UnreadableError("it is empty")
    return content


def require_file(path: Path) -> None:
    """Raises UnreadableError for what is no regular file: reading a named pipe would wait for its writer."""
    if not is_text(path):
        raise UnreadableError("its path is not UTF-8 text: rename it")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UnreadableError("no such file") from None
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    if not stat.S_ISREG(mode):
        raise UnreadableError("it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")


def is_text(path: Path) -> bool:
    """Whether the path's bytes are UTF-8.  DALI opens no other path."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def resize(image: Tensor) -> Tensor:
    """The image [3, H, W] at 300 x 300, by the antialiased triangular filter that DALI uses too."""
    return F.resize(image, [IMAGE_SIZE, IMAGE_SIZE], antialias=True)
