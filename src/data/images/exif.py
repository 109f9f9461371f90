"""The EXIF orientation tag, by which a camera says how the picture that it stored is to be turned."""

import io
import struct
import warnings

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from src.data.images.png import PNG, png_chunks

JPEG = b"\xff\xd8\xff"  # how such a file begins
WEBP_CHUNKS = 12  # where the chunks of a WebP file begin, each with its name and the length of its data
ORIENTATION_TAG = 0x0112  # EXIF 2.32, table 4
STORED = 1  # the orientation of a picture that is shown as it is stored
TRANSPOSED = (5, 6, 7, 8)  # the orientations of pictures whose stored rows are columns
# The dimensions of [3, H, W] that are then mirrored.
MIRRORED = {2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}


def orientation(content: bytes | bytearray) -> int:
    """The EXIF orientation of an image file's content, 1 to 8; 1 where it has none that is readable."""
    exif = Image.Exif()
    warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")  # it tells of damage without the file's name
    try:
        exif.load(_exif(content))
        value = exif.get(ORIENTATION_TAG)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):  # what Pillow raises where it is damaged
        return STORED
    return value if value in MIRRORED else STORED


def _exif(content: bytes | bytearray) -> bytes:
    """The EXIF data, empty where there are none.

    Each format by itself: Image.open would refuse large pictures and read a PNG to its end.
    """
    if content.startswith(JPEG):
        with JpegImageFile(io.BytesIO(content)) as picture:
            return picture.info.get("exif", b"")
    if content.startswith(PNG):
        return next((bytes(chunk[8:-4]) for name, chunk in png_chunks(content) if name == b"eXIf"), b"")
    if content.startswith(b"RIFF"):
        start = WEBP_CHUNKS
        while start + 8 <= len(content):
            name, length = struct.unpack_from("<4sI", content, start)
            if name == b"EXIF":
                return bytes(content[start + 8 : start + 8 + length])
            start += 8 + length + length % 2
    return b""


def turned(image: Tensor, orientation: int) -> Tensor:
    """A stored picture [3, H, W] as it is to be shown: [3, H, W], or [3, W, H] for a `TRANSPOSED` one."""
    if orientation in TRANSPOSED:
        image = image.transpose(1, 2)
    return image.flip(MIRRORED.get(orientation, ()))
