"""Checks PNG files and strips them to the chunks that a picture needs.

Pillow does not: `Image.verify` refuses files for the checksum or the length of a text, which other readers ignore;
without `verify`, Pillow ignores the checksums of the pixels.
"""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
FRAME_BYTES = 12  # of a chunk: length, name and checksum, without the data
ANCILLARY = 0x20  # this bit of a name's first letter marks chunks that a picture does not need
ORIENTATION = b"eXIf"
COLOUR_TYPE, PALETTE = 25, 3  # position of the colour type in a file; its value if pixels are indices of a palette
# Only these chunks may have a wrong checksum, as in libpng.  Another name may itself be damaged: one wrong bit makes
# PLTE pLTE, and Pillow decodes a picture without its palette as black.
UNNEEDED = (
    *(b"bKGD", b"cHRM", b"cICP", b"cLLI", b"gAMA", b"hIST", b"iCCP", b"iTXt", b"mDCV", b"pHYs", b"sBIT", b"sPLT"),
    *(b"sRGB", b"tEXt", b"tIME", b"tRNS", b"zTXt"),
)


def keep_needed_chunks(content: bytes) -> bytes:
    """The PNG file without texts, profiles and bytes after the picture.

    Raises ValueError if a chunk is cut off or has a wrong checksum, and if the palette is missing.
    """
    if not content.startswith(SIGNATURE):
        raise ValueError("its first bytes are damaged")
    needed, names = [SIGNATURE], set()
    start, name = len(SIGNATURE), b""
    while name != b"IEND":
        if start + FRAME_BYTES > len(content):
            raise ValueError("it is cut off")
        length, name = struct.unpack_from(">I4s", content, start)
        chunk = content[start : start + FRAME_BYTES + length]
        if len(chunk) < FRAME_BYTES + length:
            raise ValueError("it is cut off, or damaged")
        if name not in UNNEEDED and struct.pack(">I", zlib.crc32(chunk[4:-4])) != chunk[-4:]:
            raise ValueError(f"damaged: the checksum at byte {start + FRAME_BYTES + length - 4} is wrong")
        if not name[0] & ANCILLARY or name == ORIENTATION:
            needed.append(chunk)
            names.add(name)
        start += len(chunk)
    whole = b"".join(needed)
    if whole[COLOUR_TYPE] == PALETTE and b"PLTE" not in names:
        raise ValueError("damaged: its palette, the PLTE chunk, is missing")
    return whole
