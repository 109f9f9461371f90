"""Pictures of which no annotation file tells: found, and read upright; and pictures read no larger than they are drawn.

Files are known by how they begin, whatever their names.
"""

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import DecompressionBombError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from src.data.images.decode import decode
from src.data.images.exif import ORIENTATION_TAG, orientation, turned
from src.data.images.png import pixels
from src.runtime.errors import DataError, UserError

BEGINNINGS = {  # of files by kind, as regular expressions
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "GIF": rb"GIF8",
    "WebP": rb"RIFF....WEBP",
    "BMP": rb"BM....\0\0\0\0",
    "TIFF": rb"II\*\0|MM\0\*",
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)",
}
LONGEST_BEGINNING = 12  # bytes
# Pillow's readers, called by name: Image.open refuses pictures of more than 180 megapixels.
READERS: dict[str, type[ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "GIF": GifImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
BY_PILLOW = ("BMP", "TIFF")  # which torchvision cannot decode
REFUSED = ("AVIF", "HEIC")
SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)
MOST_PIXELS = 500_000_000  # that Pillow is to read; a damaged file may claim any number, and take that much memory
SUBFILE_TYPE, REDUCED = 254, 1  # TIFF 6.0, section 8: the picture is a smaller version of another one in the file
DAMAGE = (  # what Pillow raises where a file is damaged
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, MemoryError),
    *(struct.error, zlib.error, DecompressionBombError),
)


class Images(NamedTuple):
    """What there is in a folder and the folders below it."""

    folder: Path
    files: list[Path]  # pictures, and what has a picture's suffix, sorted
    others: int  # files that are neither
    unreadable: list[UserError]  # one for each folder that cannot be listed


def find_images(path: Path, *, leave_out: Path | None = None) -> Images:
    """The image at `path`, which may have any name, or those in the folder at `path` and in all folders below it.

    Hidden files and folders, whose names begin with a dot, are not looked at, nor is the folder `leave_out`.
    Raises UserError where there is no image.
    """
    # Pillow's remarks about tags would stand between the lines; what cannot be read is told of by those who read it.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    if path.is_file():
        return Images(path.parent, [path], 0, [])
    if not path.is_dir():
        raise UserError(f"{path.absolute()}: no such image or folder")
    unreadable: list[UserError] = []
    files = [file for file in _files(path, leave_out, unreadable) if file.is_file()]
    images = sorted(file for file in files if file.suffix.lower() in SUFFIXES or kind_of(file))
    if not images:
        told = "".join(f"; {error}" for error in unreadable)
        raise UserError(f"{path.absolute()}: no image in this folder or below it, but {len(files)} other files{told}")
    return Images(path, images, len(files) - len(images), unreadable)


def _files(folder: Path, leave_out: Path | None, unreadable: list[UserError]) -> Iterator[Path]:
    """The files below a folder, each folder once whatever links lead to it; adds to `unreadable`."""

    def note(error: OSError) -> None:
        unreadable.append(DataError(f"{Path(error.filename).absolute()}: {error.strerror}"))

    seen = {os.path.realpath(folder)} | ({os.path.realpath(leave_out)} if leave_out else set())
    for place, folders, names in os.walk(folder, followlinks=True, onerror=note):
        shown = sorted((name for name in folders if not name.startswith(".")), reverse=True)
        inside = {
            os.path.realpath(os.path.join(place, name)): name for name in shown
        }  # of links to one place the first
        folders[:] = [name for real, name in inside.items() if real not in seen]
        seen.update(inside)
        yield from (Path(place, name) for name in names if not name.startswith("."))


def kind_of(path: Path) -> str | None:
    """The kind of picture that a file's first bytes announce, a key of BEGINNINGS; None for another file."""
    try:
        with path.open("rb") as file:
            start = file.read(LONGEST_BEGINNING)
    except OSError:
        return None
    return next((kind for kind, pattern in BEGINNINGS.items() if re.match(pattern, start, re.DOTALL)), None)


def decode_any(path: Path) -> Tensor:
    """The picture in a file, a film's first one, turned upright by its EXIF orientation tag; [3, H, W] uint8 RGB.

    Raises DataError, with the full path, for a file that cannot be read.
    """
    kind = kind_of(path)
    if kind in REFUSED:
        raise DataError(f"{path.absolute()}: is a picture in {kind} format, which cannot be read: store it as JPEG")
    return _by_pillow(path, READERS[kind]) if kind in BY_PILLOW else decode(path, upright=True)


def _by_pillow(path: Path, reader: type[ImageFile]) -> Tensor:
    try:
        with reader(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            if getattr(picture, "tag_v2", {}).get(SUBFILE_TYPE) == REDUCED:
                raise ValueError("of the camera's raw data only a small preview can be read: store it as JPEG")
            return turned(_pixels(picture), picture.getexif().get(ORIENTATION_TAG, 1))
    except DAMAGE as error:
        raise DataError(f"{path.absolute()}: cannot be read as an image ({error or type(error).__name__})") from None


def _pixels(picture: ImageFile) -> Tensor:
    """[3, H, W] uint8 RGB.  Raises ValueError for pixels that are no colours, measurements for example."""
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, no colours")
    return pixels(picture)


def decode_thumbnail(path: Path, longest: int, *, own: bool, upright: bool = False) -> Tensor:
    """The picture in a file, made smaller where a side is longer than `longest` pixels; [3, H, W] uint8 RGB.

    own: as `decode_any` reads it, otherwise as `decode` does, turned only where `upright` says so.
    A JPEG is made smaller while it is decoded, in a fraction of the time and the memory.  Raises DataError.
    """
    smaller = _smaller_jpeg(path, longest, upright=own or upright) if kind_of(path) == "JPEG" else None
    if smaller is not None:
        return smaller
    image = decode_any(path) if own else decode(path, upright=upright)
    height, width = image.shape[1:]
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    return F.resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True)


def _smaller_jpeg(path: Path, longest: int, *, upright: bool) -> Tensor | None:
    """None for a picture that is small enough already, and for one that only another decoder can judge."""
    try:
        content = path.read_bytes()
        with JpegImageFile(io.BytesIO(content)) as picture:
            if max(picture.size) <= longest:
                return None
            picture.thumbnail((longest, longest))
            image = _pixels(picture)
    except DAMAGE:
        return None
    return turned(image, orientation(content)) if upright else image


def size_of(path: Path) -> tuple[int, int]:
    """Width and height that a picture file's beginning tells; (0, 0) where it cannot be read."""
    kind = kind_of(path)
    if kind not in READERS:
        return 0, 0
    try:
        with READERS[kind](path) as picture:
            return picture.size
    except DAMAGE:
        return 0, 0
