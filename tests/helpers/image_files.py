"""Image files as bytes: PNG files of every kind, written by hand, and what Pillow saves."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: grey, RGB, palette, grey with alpha, RGBA
# Colour types and bit depths of all PNG files.
KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16),
         (6, 8), (6, 16)]  # fmt: skip
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
NOT_INTERLACED = ((0, 0, 1, 1),)  # x and y of the first pixel, steps along x and y


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    samples: np.ndarray, kind: int, depth: int, *, interlaced: bool = False, palette=b"", extra_chunks=b""
) -> bytes:
    """A PNG file of these samples [H, W, channels], written by hand, since Pillow writes only some kinds."""
    height, width, _ = samples.shape
    rows = b""
    for x, y, dx, dy in ADAM7 if interlaced else NOT_INTERLACED:
        for row in samples[y::dy, x::dx]:
            if row.size:
                bits = "".join(f"{sample:0{depth}b}" for sample in row.ravel())
                rows += b"\0" + int(bits.ljust(-len(bits) % 8 + len(bits), "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), extra_chunks, chunk(b"PLTE", palette) if palette else b""]
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=kind, **options)
    return stream.getvalue()
