"""Images without annotations: finds them, reads them upright, and reads them no larger than they are drawn."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from src.data.images.decode import (
    DAMAGE,
    HEADER_BYTES,
    UnreadableError,
    decode,
    decode_content,
    image_format,
    open_image,
    pixels,
    read_file,
    unreadable_error,
)
from src.data.images.exif import STORED, apply_orientation, picture_orientation, read_orientation
from src.runtime.errors import DataError, UserError

REFUSED = ("AVIF", "HEIC")
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff"),
    ".webp",
)
SUBFILE_TYPE, REDUCED = 254, 1  # TIFF 6.0, section 8: the picture is a smaller version of another one in the file


class Images(NamedTuple):
    """What there is in a folder and the folders below it."""

    folder: Path
    files: list[Path]  # images, and whatever has an image's suffix: broken links and named pipes too; sorted
    others: int  # files that are neither
    unreadable: list[UserError]  # one for each folder that cannot be listed and each link that may have led to one
    marked: int = 0  # folders that hold the file `marker`, left out


def find_images(path: Path, *, leave_out: Path | None = None, marker: str | None = None) -> Images:
    """The image at `path`, whatever its name, or all images in the folder at `path` and the folders below it.

    Leaves out hidden files and folders, whose names begin with a dot, and the folder `leave_out`.  Counts and leaves
    out folders below `path` with a file named `marker`.  Raises UserError where there is no image.
    """
    # os.path gives False where Path.is_file raises, before Python 3.14: in folders that may not be entered.
    if os.path.isfile(path):
        return Images(path.parent, [path], 0, [])
    if not os.path.isdir(path):
        raise UserError(f"{path.absolute()}: no such image or folder")
    walk = _Walk(path, leave_out, marker)
    files = list(walk.files())
    images = sorted(file for file in files if file.suffix.lower() in SUFFIXES or format_of(file))
    if not images:
        others = f"{len(files)} other files"
        if walk.marked:
            others += f" and {walk.marked} folders that hold {marker}"
        errors = "".join(f"; {error}" for error in walk.unreadable)
        raise UserError(f"{path.absolute()}: no image in this folder or below it, but {others}{errors}")
    return Images(path, images, len(files) - len(images), walk.unreadable, walk.marked)


class _Walk:
    """Lists the files below a folder, each folder once whatever links lead to it."""

    def __init__(self, folder: Path, leave_out: Path | None, marker: str | None) -> None:
        self.folder = folder
        self.leave_out = leave_out
        self.marker = marker
        self.unreadable: list[UserError] = []
        self.marked = 0

    def files(self) -> Iterator[Path]:
        """All that is no folder: files, named pipes, and links that lead to nothing or where one may not enter."""
        seen = {os.path.realpath(self.folder)} | ({os.path.realpath(self.leave_out)} if self.leave_out else set())
        for place, folders, names in os.walk(self.folder, followlinks=True, onerror=self._note):
            if place != str(self.folder) and self.marker in names:
                self.marked += 1
                folders.clear()
                continue
            shown = sorted((name for name in folders if not name.startswith(".")), reverse=True)
            inside = {os.path.realpath(os.path.join(place, name)): name for name in shown}  # the first of equal links
            folders[:] = [name for real, name in inside.items() if real not in seen]
            seen.update(inside)
            for path in (Path(place, name) for name in names if not name.startswith(".")):
                try:
                    path.stat()
                except OSError as error:
                    if not path.suffix:  # a link that may have led to a folder of images
                        self._note(error)
                        continue
                yield path

    def _note(self, error: OSError) -> None:
        self.unreadable.append(DataError(f"{Path(error.filename).absolute()}: {error.strerror}"))


def format_of(path: Path) -> str | None:
    """The format that a file's first bytes announce; None for another file and one that cannot be opened."""
    if not os.path.isfile(path):  # opening a named pipe waits for its writer
        return None
    try:
        with path.open("rb") as file:
            return image_format(file.read(HEADER_BYTES))
    except OSError:
        return None


def decode_any(path: Path) -> Tensor:
    """The picture in a file, the first of several, turned upright by its orientation tag; [3, H, W] uint8 RGB.

    Raises DataError, with the full path, for a file that cannot be read.
    """
    try:
        content = read_file(path)
        kind = image_format(content)
        if kind in REFUSED:
            raise DataError(f"{path.absolute()}: is a picture in {kind} format, which cannot be read: store it as JPEG")
        if kind is None:
            raise UnreadableError("it is no JPEG, PNG, WebP, GIF, BMP or TIFF file")
        image = decode_content(content, kind) if kind == "JPEG" else None
        with open_image(content, kind) as picture:
            if getattr(picture, "tag_v2", {}).get(SUBFILE_TYPE) == REDUCED:
                raise UnreadableError("of the camera's raw data only a small preview can be read: store it as JPEG")
            image = pixels(picture) if image is None else image
            return apply_orientation(image, picture_orientation(picture))
    except UnreadableError as error:
        raise unreadable_error(path, error) from None


def decode_thumbnail(path: Path, longest: int, *, any_format: bool, upright: bool = False) -> Tensor:
    """The picture in a file, scaled down where a side is longer than `longest` pixels; [3, H, W] uint8 RGB.

    any_format: as `decode_any` reads it; otherwise as `decode` does, turned only where `upright` says so.
    A JPEG is scaled down while it is decoded, in a fraction of the time and the memory.  Raises DataError.
    """
    upright = upright or any_format
    smaller = _smaller_jpeg(path, longest, upright=upright) if format_of(path) == "JPEG" else None
    if smaller is not None:
        return smaller
    if any_format:
        image = decode_any(path)
    else:
        image = apply_orientation(decode(path), read_orientation(path) if upright else STORED)
    height, width = image.shape[1:]
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    return F.resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True)


def _smaller_jpeg(path: Path, longest: int, *, upright: bool) -> Tensor | None:
    """None for a picture that is small enough already, and for a damaged one, which `decode` judges."""
    try:
        with open_image(read_file(path), "JPEG") as picture:
            if max(picture.size) <= longest:
                return None
            picture.thumbnail((longest, longest))
            return apply_orientation(pixels(picture), picture_orientation(picture) if upright else STORED)
    except (UnreadableError, *DAMAGE):
        return None


def size_of(path: Path) -> tuple[int, int]:
    """Width and height that an image file's header tells; (0, 0) where it cannot be read."""
    try:
        kind = format_of(path)
        if kind is None or kind in REFUSED:
            return 0, 0
        with open_image(read_file(path), kind) as picture:
            return picture.size
    except UnreadableError:
        return 0, 0
