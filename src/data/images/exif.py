"""The EXIF orientation tag: how a viewer has to turn the picture that the camera stored.

`pillow_orientation` reads every tag that Pillow understands, for pictures without annotations.  `read_orientation` is
for data sets, whose pictures both pipelines must turn alike: it refuses tags that decoders interpret differently.
"""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL.ImageFile import ImageFile
from torch import Tensor

from src.data.images.decode import (
    DAMAGE_ERRORS,
    HEADER_BYTES,
    UnreadableError,
    detect_format,
    require_file,
    unreadable_error,
)
from src.data.images.png import ORIENTATION, SIGNATURE
from src.runtime.errors import DataError

ORIENTATION_TAG = 0x0112  # EXIF 2.32, table 4
STORED = 1  # the orientation of a picture that is shown as it is stored
TRANSPOSED = (5, 6, 7, 8)  # the orientations that exchange rows and columns
# The dimensions of [3, H, W] to mirror after that exchange, by orientation.
MIRRORED = {1: (), 2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}
BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
SHORT = 3  # the type code of 16-bit values
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # of a value, by type
INLINE_BYTES = 4  # a tag holds so many bytes itself; larger values are stored elsewhere in the block
# The orientation in XMP or in a text chunk.  Pillow and viewers read it there, DALI does not.
ORIENTATION_IN_TEXT = re.compile(rb'tiff:Orientation(?:="|>)[2-9]|^Raw profile type (?:exif|APP1)\0')

JPEG_EXIF = b"Exif\0\0"
APP1, START_OF_SCAN = 0xE1, 0xDA
WEBP_EXIF_FLAG = 0x08  # in the first byte of the chunk VP8X
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


class UnusualTagError(Exception):
    """Decoders interpret a file's orientation tag differently; the message says why."""


def apply_orientation(image: Tensor, orientation: int) -> Tensor:
    """The stored picture [3, H, W] turned upright: [3, H, W], or [3, W, H] for a `TRANSPOSED` orientation."""
    if orientation in TRANSPOSED:
        image = image.transpose(1, 2)
    return image.flip(MIRRORED.get(orientation, ()))


def pillow_orientation(picture: ImageFile) -> int:
    """The orientation of an opened picture, 1 to 8; 1 if Pillow finds none."""
    try:
        value = picture.getexif().get(ORIENTATION_TAG)
        return value if value in MIRRORED else STORED
    except DAMAGE_ERRORS:
        return STORED


def read_orientation(path: Path) -> int:
    """The orientation of a JPEG, PNG or WebP file, 1 to 8; 1 if it has none.  Reads no pixels.

    Raises DataError for a file that cannot be read, and for a tag that decoders interpret differently.
    """
    try:
        require_file(path)
        with path.open("rb") as file:
            return _find_orientation(file)
    except UnreadableError as error:
        raise unreadable_error(path, error) from None
    except OSError as error:
        raise unreadable_error(path, error.strerror) from None
    except UnusualTagError as error:
        raise DataError(
            f"{path.absolute()}: its EXIF orientation tag is unusual ({error}) and decoders disagree about it: store "
            "the picture turned and without the tag, or use --orientation stored"
        ) from None


def _find_orientation(file: BinaryIO) -> int:
    readers = {"JPEG": _jpeg_blocks, "PNG": _png_blocks, "WEBP": _webp_blocks}
    read_blocks = readers.get(detect_format(file.read(HEADER_BYTES)) or "")
    if read_blocks is None:
        return STORED
    blocks: list[bytes] = []
    texts: list[bytes] = []
    try:
        for block in read_blocks(file):
            (blocks if block.is_exif else texts).append(block.data)
    except struct.error:  # the file is cut off: decoding it raises the error
        pass
    if len(blocks) > 1:
        raise UnusualTagError(f"the file has {len(blocks)} EXIF blocks")
    tag = _parse_orientation(blocks[0]) if blocks else None
    if tag is None and any(map(ORIENTATION_IN_TEXT.search, texts)):
        raise UnusualTagError("it stands in XMP or in a text")
    return STORED if tag is None else tag


class _Block(NamedTuple):
    """A segment or chunk of a file that may hold the orientation."""

    is_exif: bool
    data: bytes


def _jpeg_blocks(file: BinaryIO) -> Iterator[_Block]:
    """The APP1 segments before the pixels.  Raises struct.error if the file ends before the pixels."""
    file.seek(2)
    while True:
        prefix, marker = file.read(1), b"\xff"
        while marker == b"\xff":  # fill bytes: JPEG, B.1.1.2
            marker = file.read(1)
        if prefix != b"\xff" or marker in (b"", b"\0", bytes([START_OF_SCAN])):
            return
        (length,) = struct.unpack(">H", file.read(2))
        if marker[0] == APP1:
            data = file.read(length - 2)
            is_exif = data.startswith(JPEG_EXIF)
            yield _Block(is_exif, data[len(JPEG_EXIF) :] if is_exif else data)
        else:
            file.seek(length - 2, os.SEEK_CUR)


def _png_blocks(file: BinaryIO) -> Iterator[_Block]:
    file.seek(len(SIGNATURE))
    name = b""
    while name != b"IEND":
        length, name = struct.unpack(">I4s", file.read(8))
        if name == ORIENTATION or name in PNG_TEXTS:
            data, (checksum,) = file.read(length), struct.unpack(">I", file.read(4))
            if name == ORIENTATION and zlib.crc32(name + data) != checksum:
                raise UnusualTagError("its checksum is wrong")
            yield _Block(name == ORIENTATION, data)
        else:
            file.seek(length + 4, os.SEEK_CUR)


def _webp_blocks(file: BinaryIO) -> Iterator[_Block]:
    has_exif = False
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", header)
        if name not in (b"VP8X", b"EXIF", b"XMP "):
            file.seek(length + length % 2, os.SEEK_CUR)
            continue
        data = file.read(length + length % 2)[:length]
        if name == b"VP8X":
            has_exif = bool(data and data[0] & WEBP_EXIF_FLAG)
            continue
        if name == b"EXIF" and not has_exif:
            raise UnusualTagError("the file's header does not announce it")
        yield _Block(name == b"EXIF", data)


def _parse_orientation(block: bytes) -> int | None:
    """The orientation in an EXIF block, None if it has none.  Raises UnusualTagError."""
    if not block:
        return None
    order = BYTE_ORDERS.get(block[:4])
    if order is None:
        raise UnusualTagError("the EXIF data have no TIFF header")
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        entries = [struct.unpack_from(f"{order}HHII", block, start + 2 + 12 * number) for number in range(count)]
    except struct.error:
        raise UnusualTagError("the EXIF data are cut off") from None
    tags = [number for number, (name, *_) in enumerate(entries) if name == ORIENTATION_TAG]
    if not tags:
        return None
    if len(tags) > 1:
        raise UnusualTagError(f"it occurs {len(tags)} times")
    _, value_type, length, _ = entries[tags[0]]
    if (value_type, length) != (SHORT, 1):
        raise UnusualTagError(f"it has {length} values of type {value_type}, not one of type {SHORT}")
    for _, value_type, length, offset in entries:  # DALI ignores all tags if it cannot read one of them
        size = TYPE_BYTES.get(value_type, len(block)) * length
        if size > INLINE_BYTES and offset + size > len(block):
            raise UnusualTagError("another tag is damaged")
    (value,) = struct.unpack_from(f"{order}H", block, start + 2 + 12 * tags[0] + 8)
    if value > max(MIRRORED):
        raise UnusualTagError(f"its value is {value}")
    return value or STORED  # some cameras write 0
