"""PNG files, read by Pillow: torchvision's decoder ends the whole process where the data are damaged."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG = SIGNATURE[:4]  # what makes torchvision take a file for one
FRAME = 12  # bytes of a chunk beside its data: length, name, checksum
ANCILLARY = 0x20  # set in the first letter of a chunk's name where the picture can be had without it


class DamagedPngError(ValueError):
    """What is wrong with a PNG file, in words."""


def decode_png(content: bytes | bytearray) -> Tensor:
    """The picture of a PNG file; [3, H, W] uint8 RGB, of 16 bits the upper 8.

    Raises DamagedPngError.  Wrong checksums are damage, as they are to DALI and to libpng; Pillow would pass over them.
    """
    # Of the other chunks, texts and colour profiles, Pillow refuses long ones.
    needed = b"".join(chunk for name, chunk in png_chunks(content) if not name[0] & ANCILLARY)
    try:
        # Not Image.open, which refuses pictures of more than 180 megapixels.
        with PngImageFile(io.BytesIO(SIGNATURE + needed)) as picture:
            return pixels(picture)
    except (OSError, SyntaxError, ValueError, MemoryError, struct.error, zlib.error) as error:
        raise DamagedPngError(str(error) or type(error).__name__) from None


def pixels(picture: ImageFile) -> Tensor:
    """[3, H, W] uint8 RGB, of 16 bits the upper 8."""
    if picture.mode.startswith("I;16"):  # grey
        grey = (np.asarray(picture) >> 8).astype(np.uint8)
        return torch.from_numpy(grey).expand(3, -1, -1)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def png_chunks(content: bytes | bytearray) -> Iterator[tuple[bytes, memoryview]]:
    """Name and bytes of each chunk up to the last, IEND.

    Raises DamagedPngError for one that is cut off, and where the picture needs it, for one whose checksum is wrong.
    """
    if not content.startswith(SIGNATURE):
        raise DamagedPngError("its first bytes are damaged")
    whole = memoryview(content)
    start, name = len(SIGNATURE), b""
    while name != b"IEND":
        if start + FRAME > len(whole):
            raise DamagedPngError("it is cut off")
        length, name = struct.unpack_from(">I4s", whole, start)
        chunk = whole[start : start + FRAME + length]
        if len(chunk) < FRAME + length:
            raise DamagedPngError("it is cut off, or damaged")
        if not name[0] & ANCILLARY and struct.pack(">I", zlib.crc32(chunk[4:-4])) != chunk[-4:]:
            raise DamagedPngError(f"damaged: the checksum at byte {start + FRAME + length - 4} is wrong")
        yield name, chunk
        start += len(chunk)
