"""Images without annotations, of any format: finds them, and reads them upright and scaled down."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from src.data.images.decode import (
    DAMAGE_ERRORS,
    HEADER_BYTES,
    UnreadableError,
    decode,
    decode_content,
    decode_pixels,
    detect_format,
    open_image,
    read_file,
    unreadable_error,
)
from src.data.images.exif import STORED, apply_orientation, pillow_orientation, read_orientation
from src.runtime.errors import DataError, UserError

UNSUPPORTED = ("AVIF", "HEIC")
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff"),
    ".webp",
)
# TIFF 6.0, section 8: the tag, and its value for a picture that is a smaller version of another one in the file.
SUBFILE_TYPE, REDUCED_IMAGE = 254, 1


class ImageFiles(NamedTuple):
    """What `find_images` found in a folder and the folders below it."""

    folder: Path
    files: list[Path]  # images, and everything with an image's suffix, broken links and named pipes too; sorted
    others: int  # number of other files
    unreadable: list[UserError]  # for each folder that cannot be listed and each broken link that may lead to one
    marked: int = 0  # number of folders left out because they hold the file `marker`


def find_images(path: Path, *, leave_out: Path | None = None, marker: str | None = None) -> ImageFiles:
    """The file `path`, whatever its name, or all images in the folder `path` and the folders below it.

    Leaves out files and folders whose names begin with a dot, and the folder `leave_out`.  Counts and leaves out
    folders below `path` that hold a file named `marker`.  Raises UserError if there is no image.
    """
    # In a folder that may not be entered, os.path returns False; Path.is_file raises before Python 3.14.
    if os.path.isfile(path):
        return ImageFiles(path.parent, [path], 0, [])
    if not os.path.isdir(path):
        raise UserError(f"{path.absolute()}: no such image or folder")
    walk = _Walk(path, leave_out, marker)
    files = list(walk.files())
    images = sorted(file for file in files if file.suffix.lower() in SUFFIXES or read_format(file))
    if not images:
        others = [f"{len(files)} other files"] if files else []
        if walk.marked:
            others.append(f"{walk.marked} folders that hold {marker}")
        found = f", but {' and '.join(others)}" if others else ""
        errors = "".join(f"; {error}" for error in walk.unreadable)
        raise UserError(f"{path.absolute()}: no image in this folder or below it{found}{errors}")
    return ImageFiles(path, images, len(files) - len(images), walk.unreadable, walk.marked)


class _Walk:
    """Lists the files below a folder; visits each folder once, however many links lead to it."""

    def __init__(self, folder: Path, leave_out: Path | None, marker: str | None) -> None:
        self.folder = folder
        self.leave_out = leave_out
        self.marker = marker
        self.unreadable: list[UserError] = []
        self.marked = 0

    def files(self) -> Iterator[Path]:
        """Everything but folders: files, named pipes, broken links, and links into folders that may not be entered."""
        seen = {os.path.realpath(self.folder)} | ({os.path.realpath(self.leave_out)} if self.leave_out else set())
        for parent, folders, names in os.walk(self.folder, followlinks=True, onerror=self._record_error):
            if parent != str(self.folder) and self.marker in names:
                self.marked += 1
                folders.clear()
                continue
            # In reverse order, so that of several links to a folder the first by name remains.
            visible = sorted((name for name in folders if not name.startswith(".")), reverse=True)
            by_target = {os.path.realpath(os.path.join(parent, name)): name for name in visible}
            folders[:] = [name for target, name in by_target.items() if target not in seen]
            seen.update(by_target)
            for path in (Path(parent, name) for name in names if not name.startswith(".")):
                try:
                    path.stat()
                except OSError as error:
                    if not path.suffix:  # a broken link, perhaps to a folder of images
                        self._record_error(error)
                        continue
                yield path

    def _record_error(self, error: OSError) -> None:
        self.unreadable.append(DataError(f"{Path(error.filename).absolute()}: {error.strerror}"))


def read_format(path: Path) -> str | None:
    """The format by a file's first bytes; None if no pattern matches or the file cannot be opened."""
    if not os.path.isfile(path):  # opening a named pipe waits for its writer
        return None
    try:
        with path.open("rb") as file:
            return detect_format(file.read(HEADER_BYTES))
    except OSError:
        return None


def decode_any(path: Path) -> Tensor:
    """The first picture in a file, turned upright by its orientation tag; [3, H, W] uint8 RGB.

    Raises DataError, with the full path, for a file that cannot be read.
    """
    try:
        content = read_file(path)
        kind = detect_format(content)
        if kind in UNSUPPORTED:
            raise DataError(f"{path.absolute()}: is a picture in {kind} format, which cannot be read: store it as JPEG")
        if kind is None:
            raise UnreadableError("it is no JPEG, PNG, WebP, GIF, BMP or TIFF file")
        image = decode_content(content, kind) if kind == "JPEG" else None
        with open_image(content, kind) as picture:
            if getattr(picture, "tag_v2", {}).get(SUBFILE_TYPE) == REDUCED_IMAGE:
                raise UnreadableError("of the camera's raw data only a small preview can be read: store it as JPEG")
            image = decode_pixels(picture) if image is None else image
            return apply_orientation(image, pillow_orientation(picture))
    except UnreadableError as error:
        raise unreadable_error(path, error) from None


def decode_thumbnail(path: Path, longest: int, *, any_format: bool, upright: bool = False) -> Tensor:
    """The picture in a file, scaled down to at most `longest` pixels a side; [3, H, W] uint8 RGB.

    any_format: read by `decode_any`, else by `decode` and turned only if `upright`.  libjpeg scales a JPEG while it
    decodes it, in a fraction of the time and the memory.  Raises DataError.
    """
    upright = upright or any_format
    smaller = _smaller_jpeg(path, longest, upright=upright) if read_format(path) == "JPEG" else None
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
    """The JPEG scaled down; None if it is small enough already, or damaged: `decode` raises the error."""
    try:
        with open_image(read_file(path), "JPEG") as picture:
            if max(picture.size) <= longest:
                return None
            picture.thumbnail((longest, longest))
            return apply_orientation(decode_pixels(picture), pillow_orientation(picture) if upright else STORED)
    except (UnreadableError, *DAMAGE_ERRORS):
        return None


def read_size(path: Path) -> tuple[int, int]:
    """Width and height by an image file's header; (0, 0) if it cannot be read."""
    try:
        kind = read_format(path)
        if kind is None or kind in UNSUPPORTED:
            return 0, 0
        with open_image(read_file(path), kind) as picture:
            return picture.size
    except UnreadableError:
        return 0, 0
