"""Damaged image files: they are read or refused by name, and never give another picture unnoticed."""

import multiprocessing
import os
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.images.decode import decode
from src.data.images.formats import decode_any
from src.runtime.errors import DataError
from tests.helpers.image_files import CHANNELS, chunk, png, saved

TRIALS = 200  # a format; each of them takes about a millisecond


def formats(picture: Image.Image) -> dict[str, list[bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    return {
        "jpeg": [saved(picture, "jpeg", exif=exif), saved(picture.convert("CMYK"), "jpeg", progressive=True)],
        "png": [
            saved(picture, "png", exif=exif),
            saved(picture.convert("P"), "png", transparency=3),
            saved(grey, "png"),
        ],
        "webp": [saved(picture, "webp", exif=exif), saved(picture.convert("RGBA"), "webp", lossless=True)],
        "gif": [saved(picture.convert("P"), "gif", save_all=True, append_images=[picture.rotate(180).convert("P")])],
        "bmp": [saved(picture, "bmp"), saved(picture.convert("P"), "bmp")],
        "tiff": [saved(picture, "tiff", exif=exif), saved(picture, "tiff", compression="tiff_lzw")],
    }


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One byte changed, cut short, or a stretch of zeros."""
    start, kind = rng.randrange(len(content)), rng.randrange(4)
    if kind == 0:
        return content[:start]
    if kind == 1:
        length = rng.randrange(1, 64)
        return content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]
    changed = bytearray(content)
    changed[start if kind == 2 else start % 100] ^= rng.randrange(1, 256)  # often what comes first, the sizes
    return bytes(changed)


def read_damaged(contents: list[bytes], path, outcomes) -> None:
    """Decodes damaged files; sends the number of each before, and its outcome after."""
    rng = random.Random(0)
    torch.set_num_threads(1)  # as in a loader's worker: OpenMP's other threads are not there after a fork
    for trial in range(TRIALS):
        path.write_bytes(damaged(contents[trial % len(contents)], rng))
        outcomes.send(f"trial {trial} ended the process")
        try:
            assert decode_any(path).shape[0] == 3
            outcomes.send("read")
        except DataError as error:
            named = str(error).startswith(f"{path}: cannot be read as an image (") and "\n" not in str(error)
            outcomes.send("refused by name" if named else f"trial {trial}: {error}")
    outcomes.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a new process would import everything again")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_damaged_files_are_read_or_refused_by_name(tmp_path, picture, kind):
    """In a child, because a decoder that a file brings down takes its process with it."""
    context = multiprocessing.get_context("fork")
    outcomes, sender = context.Pipe(duplex=False)
    child = context.Process(target=read_damaged, args=(formats(picture)[kind], tmp_path / f"damaged.{kind}", sender))
    child.start()
    sender.close()
    seen = []
    while outcomes.poll(60):
        try:
            seen.append(outcomes.recv())
        except EOFError:
            break
    child.join(60)
    child.kill()
    assert set(seen[1::2]) <= {"read", "refused by name"}, seen[-1]
    assert (len(seen), child.exitcode) == (2 * TRIALS, 0), seen[-1]
    assert "refused by name" in seen


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: content[:-12], "it is cut off"),
        (lambda content: content[:-200], "it is cut off, or damaged"),
        (lambda content: content[:-16] + b"????" + content[-12:], "damaged: the checksum at byte {end} is wrong"),
        (lambda content: content[:5] + b"?" + content[6:], "its first bytes are damaged"),
    ],
)
def test_a_damaged_png_is_refused_with_the_reason(tmp_path, picture, spoil, said):
    content = saved(picture, "png")
    path = tmp_path / "picture.png"
    path.write_bytes(spoil(content))
    with pytest.raises(DataError) as raised:
        decode(path)
    assert str(raised.value) == f"{path}: cannot be read as an image ({said.format(end=len(content) - 16)})"


def needless_bytes(content: bytes) -> list[range]:
    """The chunks of a PNG file that the test has added and that do not affect its pixels."""
    return [
        range(start - 4, start + 8 + struct.unpack_from(">I", content, start - 4)[0])
        for start in (content.find(name) for name in (b"tEXt", b"gAMA"))
    ]


@pytest.mark.parametrize(("kind", "depth"), [(0, 1), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 8), (4, 8), (6, 8)])
@pytest.mark.parametrize("interlaced", [False, True])
def test_no_changed_bit_of_a_png_changes_its_picture(tmp_path, kind, depth, interlaced):
    rng = np.random.default_rng(depth)
    samples = rng.integers(0, 2**depth, (3, 2, CHANNELS[kind]))
    samples[0, 0] = 1  # no black picture, which one without its palette gives
    palette = bytes(rng.integers(1, 256, 3 * 2 ** min(depth, 3)).tolist()) if kind == 3 else b""
    samples %= len(palette) // 3 or 2**depth
    extra_chunks = chunk(b"tEXt", b"Comment\0x") + chunk(b"gAMA", struct.pack(">I", 45455))
    content = png(samples, kind, depth, interlaced=interlaced, palette=palette, extra_chunks=extra_chunks)
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    whole = decode(path)
    read_in = set()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert torch.equal(decode(path), whole), f"bit {bit % 8} of byte {bit // 8}"
            read_in.add(bit // 8)
        except DataError:
            pass
    assert read_in and all(any(byte in part for part in needless_bytes(content)) for byte in read_in)


def test_a_palette_picture_without_its_palette_is_refused(tmp_path):
    samples = np.ones((3, 2, 1), np.int64)
    content = png(samples, 3, 8, palette=bytes(range(1, 7)))
    start = content.find(b"PLTE") - 4
    path = tmp_path / "picture.png"
    for damaged in (content[:start] + content[start + 12 + 6 :], content.replace(b"PLTE", b"pLTE")):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged: (its palette, the PLTE chunk, is missing|the checksum at byte)"):
            decode(path)


# --- JPEG files with damaged data ------------------------------------------------------------------------------------


def test_damage_in_the_middle_of_a_jpeg_is_a_warning_and_the_picture_is_read(tmp_path, picture):
    content = saved(picture.resize((400, 300)), "jpeg")
    path = tmp_path / "picture.jpg"
    warnings: list[str] = []
    middle = len(content) // 2
    for changed in (
        content[:middle] + bytes(20) + content[middle + 20 :],
        content[:middle] + b"\xff\xd9" + content[middle:],
        content[:middle] + content[middle + 40 :],
    ):
        path.write_bytes(changed)
        warnings.clear()
        assert decode(path, warn=warnings.append).shape == (3, 300, 400)
        assert len(warnings) == 1 and warnings[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_undamaged_jpeg_files_cause_no_warning_and_have_pillows_pixels(tmp_path, picture, mode):
    path = tmp_path / "picture.jpg"
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}):
        picture.convert(mode).save(path, **options)
        with Image.open(path) as opened:
            expected = np.array(opened.convert("RGB"))
        assert (decode(path, warn=pytest.fail).permute(1, 2, 0).numpy() == expected).all()


def test_the_photographs_cause_no_warning(coco128):
    for path in sorted((coco128 / "train2017").glob("*.jpg")):
        decode(path, warn=lambda reason, path=path: pytest.fail(f"{path}: {reason}"))


def test_a_jpeg_that_is_cut_off_is_refused(tmp_path, picture):
    content = saved(picture, "jpeg", comment=b"\xff\xd9")  # what ends a picture stands in its header, too
    path = tmp_path / "picture.jpg"
    for length in (len(content) - 2, len(content) // 2, content.find(b"\xff\xda") + 20):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cannot be read as an image \(it is cut off\)"):
            decode(path)
