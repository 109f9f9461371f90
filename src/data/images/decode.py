"""Decodes image files; the only module that calls an image decoder.

simplejpeg decodes undamaged JPEG files to the same pixels as torchvision and Pillow, in 0.93 of torchvision's time;
Pillow takes 1.15 (176 photographs of COCO).  Pillow decodes other formats, CMYK, and JPEG files with damaged data.
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

# Headers that announce more pixels are refused.  Pillow decodes 300 megapixels in 2.1 GB: 4 bytes a pixel, and 3 in the
# tensor.  Photographs of 12,000 x 9,000 and panoramas of 30,000 x 10,000 stay below the limit.
MAX_PIXELS = 300_000_000
JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # markers: SOI, SOS, EOI
# Regular expressions of a file's first bytes, by Pillow's name of the format.  Pillow itself detects a format only if
# the whole header is undamaged, and never HEIC; but a damaged image has to be reported, not skipped.
MAGIC_BYTES = {
    "JPEG": JPEG_START + b"\xff",
    "PNG": rb"\x89PNG",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8",
    "BMP": rb"BM....\0\0\0\0",
    "TIFF": rb"II\*\0|MM\0\*",
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)",
}
HEADER_BYTES = 12  # of a file, enough for every pattern above
DATASET_FORMATS = ("JPEG", "PNG", "WEBP")  # that both pipelines read
DAMAGE_ERRORS = (  # what Pillow raises for damaged files
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, MemoryError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class UnreadableError(Exception):
    """A file cannot be read as an image; the message says why."""


def decode(path: Path, *, warn: Callable[[str], None] | None = None) -> Tensor:
    """The picture of a data set's JPEG, PNG or WebP file, not turned; [3, H, W] uint8 RGB.

    warn: called with the decoder's message if data in the middle of a JPEG file are damaged.
    Raises DataError, with the full path, for a file that cannot be read.
    """
    try:
        content = read_file(path)
        kind = detect_format(content)
        if kind is None:
            raise UnreadableError("it is no JPEG, PNG or WebP file")
        if kind not in DATASET_FORMATS:
            raise DataError(f"{path.absolute()}: is a {kind}, which DALI cannot read: store it as JPEG, PNG or WebP")
        return decode_content(content, kind, warn=warn)
    except UnreadableError as error:
        raise unreadable_error(path, error) from None


def detect_format(content: bytes) -> str | None:
    """The format by a file's first HEADER_BYTES, a key of MAGIC_BYTES; None if no pattern matches."""
    return next((kind for kind, magic in MAGIC_BYTES.items() if re.match(magic, content, re.DOTALL)), None)


def unreadable_error(path: Path, reason: object) -> DataError:
    return DataError(f"{path.absolute()}: cannot be read as an image ({reason})")


def decode_content(content: bytes, kind: str, *, warn: Callable[[str], None] | None = None) -> Tensor:
    """The first picture of a file in the format `kind`; [3, H, W] uint8 RGB.  Raises UnreadableError."""
    damage = None
    if kind == "JPEG":
        image, damage = _decode_undamaged_jpeg(content)
        if image is not None:
            return image
        if content.rfind(JPEG_END) < content.rfind(JPEG_SCAN):  # Pillow reads some of these files
            raise UnreadableError("it is cut off")
    with open_image(content, kind) as picture:
        image = decode_pixels(picture)
    if damage is not None and warn is not None:
        warn(damage)
    return image


def _decode_undamaged_jpeg(content: bytes) -> tuple[Tensor | None, str | None]:
    """simplejpeg's picture, None if Pillow has to read the file, and its message about damage, if any."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    except (ValueError, KeyError):  # KeyError: a chroma subsampling that simplejpeg does not know
        return None, None
    check_size(width, height)
    is_cmyk = colours == "CMYK"  # simplejpeg rounds its conversion to RGB otherwise than Pillow
    try:
        decoded = simplejpeg.decode_jpeg(content, "CMYK" if is_cmyk else "RGB", strict=True)
    except (ValueError, MemoryError) as error:
        return None, str(error)
    return None if is_cmyk else torch.from_numpy(decoded).permute(2, 0, 1), None


def open_image(content: bytes, kind: str) -> ImageFile:
    """Pillow's image of a file in the format `kind`; only the header is decoded.  Raises UnreadableError."""
    # Pillow warns without the file's name, and its own limit of 89 megapixels is too low for photographs.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = None
    try:
        if kind == "PNG":
            content = png.keep_needed_chunks(content)
        picture = Image.open(io.BytesIO(content), formats=[kind])
    except UnidentifiedImageError:
        raise UnreadableError("its header is damaged") from None
    except DAMAGE_ERRORS as error:
        raise UnreadableError(str(error) or type(error).__name__) from None
    check_size(*picture.size)
    return picture


def check_size(width: int, height: int) -> None:
    """Raises UnreadableError for more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        limit = f"more than the {MAX_PIXELS // 10**6} million that are read: make it smaller"
        raise UnreadableError(f"it has {width} x {height} pixels, {limit}")


def decode_pixels(picture: ImageFile) -> Tensor:
    """The first picture of an opened file; [3, H, W] uint8 RGB, the upper 8 bits of samples with 16.

    Raises UnreadableError, also for pixels that are measurements instead of colours.
    """
    if picture.mode in ("I", "F"):
        raise UnreadableError("its pixels are numbers of 32 bits, no colours")
    try:
        if picture.mode.startswith("I;16"):  # grey
            grey = (np.asarray(picture) >> 8).astype(np.uint8)
            return torch.from_numpy(grey).expand(3, -1, -1)
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except DAMAGE_ERRORS as error:
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
    """Raises UnreadableError unless the path is a regular file: reading a named pipe would wait for its writer."""
    if not is_utf8_path(path):
        raise UnreadableError("its path is not UTF-8 text: rename it")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UnreadableError("no such file") from None
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    if not stat.S_ISREG(mode):
        raise UnreadableError("it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")


def is_utf8_path(path: Path) -> bool:
    """Whether the path's bytes are UTF-8: DALI cannot open other paths."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def resize(image: Tensor) -> Tensor:
    """The image [3, H, W] at 300 x 300, resized by the same antialiased triangular filter as DALI's."""
    return F.resize(image, [IMAGE_SIZE, IMAGE_SIZE], antialias=True)
