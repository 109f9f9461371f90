"""Image files read one by one: every kind of PNG, damaged files of every format, and files that cannot be opened."""

import io
import multiprocessing
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from src.data.images import decode as decode_module
from src.data.images.decode import decode
from src.data.images.formats import decode_any, read_size
from src.runtime.errors import DataError

# --- good files ------------------------------------------------------------------------------------------------------

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: grey, RGB, palette, grey with alpha, RGBA
KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16),
         (6, 8), (6, 16)]  # fmt: skip
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
NOT_INTERLACED = ((0, 0, 1, 1),)  # x and y of the first pixel, steps along x and y


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(samples: np.ndarray, kind: int, depth: int, *, interlaced: bool = False, palette=b"", beside=b"") -> bytes:
    """A PNG file of these samples [H, W, channels], written by hand, since Pillow writes only some kinds."""
    height, width, _ = samples.shape
    rows = b""
    for x, y, dx, dy in ADAM7 if interlaced else NOT_INTERLACED:
        for row in samples[y::dy, x::dx]:
            if row.size:
                bits = "".join(f"{sample:0{depth}b}" for sample in row.ravel())
                rows += b"\0" + int(bits.ljust(-len(bits) % 8 + len(bits), "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), beside, chunk(b"PLTE", palette) if palette else b""]
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


@pytest.mark.parametrize(("kind", "depth"), KINDS)
@pytest.mark.parametrize("interlaced", [False, True])
def test_every_kind_of_png_gives_its_samples(tmp_path, kind, depth, interlaced):
    rng = np.random.default_rng(depth)
    samples = rng.integers(0, 2**depth, (11, 9, CHANNELS[kind]))
    palette = rng.integers(0, 256, (2**depth, 3)) if kind == 3 else np.empty((0, 3), np.int64)
    path = tmp_path / "picture.png"
    path.write_bytes(png(samples, kind, depth, interlaced=interlaced, palette=bytes(palette.ravel().tolist())))
    if kind == 3:
        expected = palette[samples[..., 0]]
    else:
        colours = samples[..., :3] if kind in (2, 6) else samples[..., :1].repeat(3, axis=2)
        expected = colours >> 8 if depth == 16 else colours * 255 // (2**depth - 1)
    assert torch.equal(decode(path), torch.from_numpy(expected).byte().permute(2, 0, 1))


def test_what_is_beside_the_picture_in_a_png_does_not_matter(tmp_path):
    """Pillow alone refuses long texts and profiles."""
    samples = np.random.default_rng(0).integers(0, 256, (5, 6, 3))
    long = b"a" * 2_000_000
    path = tmp_path / "picture.png"
    for beside in (
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(long)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + long),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(long)),
        chunk(b"tRNS", bytes(6)),
    ):
        path.write_bytes(png(samples, 2, 8, beside=beside))
        assert torch.equal(decode(path).permute(1, 2, 0), torch.from_numpy(samples).byte())


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_picture_is_turned_upright_as_pillow_turns_it(tmp_path, picture, kind):
    path = tmp_path / f"picture.{kind}"
    for orientation in (None, *range(10)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path.write_bytes(saved(picture, kind, **({} if orientation is None else {"exif": exif})))
        with Image.open(path) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"), np.int16)
        actual = decode_any(path).permute(1, 2, 0).numpy().astype(np.int16)
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= 2, orientation


# --- damaged files ---------------------------------------------------------------------------------------------------

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


def read_damaged(contents: list[bytes], path, told) -> None:
    """Decodes damaged files, each named in `told` before and its outcome after."""
    rng = random.Random(0)
    torch.set_num_threads(1)  # as in a loader's worker: OpenMP's other threads are not there after a fork
    for trial in range(TRIALS):
        path.write_bytes(damaged(contents[trial % len(contents)], rng))
        told.send(f"trial {trial} ended the process")
        try:
            assert decode_any(path).shape[0] == 3
            told.send("read")
        except DataError as error:
            named = str(error).startswith(f"{path}: cannot be read as an image (") and "\n" not in str(error)
            told.send("refused by name" if named else f"trial {trial}: {error}")
    told.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a new process would import everything again")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_damaged_files_are_read_or_refused_by_name(tmp_path, picture, kind):
    """In a child, because a decoder that a file brings down takes its process with it."""
    context = multiprocessing.get_context("fork")
    outcomes, told = context.Pipe(duplex=False)
    child = context.Process(target=read_damaged, args=(formats(picture)[kind], tmp_path / f"damaged.{kind}", told))
    child.start()
    told.close()
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
    """The bytes of a PNG file that say nothing of its pixels: chunks that the test put in as such, whole."""
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
    beside = chunk(b"tEXt", b"Comment\0x") + chunk(b"gAMA", struct.pack(">I", 45455))
    content = png(samples, kind, depth, interlaced=interlaced, palette=palette, beside=beside)
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


def test_damage_in_the_middle_of_a_jpeg_is_told_and_the_picture_read(tmp_path, picture):
    content = saved(picture.resize((400, 300)), "jpeg")
    path = tmp_path / "picture.jpg"
    told: list[str] = []
    middle = len(content) // 2
    for spoilt in (
        content[:middle] + bytes(20) + content[middle + 20 :],
        content[:middle] + b"\xff\xd9" + content[middle:],
        content[:middle] + content[middle + 40 :],
    ):
        path.write_bytes(spoilt)
        told.clear()
        assert decode(path, warn=told.append).shape == (3, 300, 400)
        assert len(told) == 1 and told[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_sound_jpeg_files_are_not_accused_and_have_pillows_pixels(tmp_path, picture, mode):
    path = tmp_path / "picture.jpg"
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}):
        picture.convert(mode).save(path, **options)
        with Image.open(path) as opened:
            expected = np.array(opened.convert("RGB"))
        assert (decode(path, warn=pytest.fail).permute(1, 2, 0).numpy() == expected).all()


def test_the_photographs_are_not_accused(coco128):
    for path in sorted((coco128 / "train2017").glob("*.jpg")):
        decode(path, warn=lambda reason, path=path: pytest.fail(f"{path}: {reason}"))


def test_a_jpeg_that_is_cut_off_is_refused(tmp_path, picture):
    content = saved(picture, "jpeg", comment=b"\xff\xd9")  # what ends a picture stands in its header, too
    path = tmp_path / "picture.jpg"
    for length in (len(content) - 2, len(content) // 2, content.find(b"\xff\xda") + 20):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cannot be read as an image \(it is cut off\)"):
            decode(path)


# --- large files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_too_many_pixels_are_refused_by_the_header(tmp_path, picture, monkeypatch, kind):
    """The limit is lowered, so that no large file has to be made."""
    path = tmp_path / f"picture.{kind}"
    path.write_bytes(saved(picture.convert("P") if kind == "gif" else picture, kind))
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 80 * 60)
    assert decode_any(path).shape == (3, 60, 80)
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 80 * 60 - 1)
    monkeypatch.setattr(decode_module, "decode_pixels", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=rf"^{path}: .*has 80 x 60 pixels, more than the .* are read: make it smaller"):
        decode_any(path)


def test_the_limit_leaves_large_photographs_and_panoramas_alone():
    for width, height in ((12_000, 9_000), (30_000, 10_000), (16_384, 8_192)):
        decode_module.check_size(width, height)
    with pytest.raises(decode_module.UnreadableError, match="24000 x 24000 pixels, more than the 300 million"):
        decode_module.check_size(24_000, 24_000)


def test_of_many_frames_the_first_alone_is_decoded(tmp_path, picture):
    """Each frame is damaged but for the first."""
    frames = [picture.rotate(angle).convert("P") for angle in range(0, 360, 30)]
    content = saved(frames[0], "gif", save_all=True, append_images=frames[1:])
    alone = saved(frames[0], "gif")
    path = tmp_path / "picture.gif"
    path.write_bytes(alone)
    first = decode_any(path)
    path.write_bytes(content[: len(alone) + 200])
    assert (decode_any(path).int() - first).abs().max() == 0
    assert read_size(path) == (80, 60)


# --- files that cannot be opened -------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_opened_says_why(tmp_path, monkeypatch):
    link = tmp_path / "link.jpg"
    link.symlink_to(link)
    with pytest.raises(DataError, match=rf"^{link}: cannot be read as an image \(Too many levels of symbolic links\)$"):
        decode(link)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "picture.jpg").touch()
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # tests may run as root, who may read everything
    with pytest.raises(DataError, match=r"picture\.jpg: cannot be read as an image \(Permission denied\)$"):
        decode(tmp_path / "picture.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match=r"pipe\.jpg: cannot be read as an image \(it is no regular file\)$"):
        decode(pipe)


def test_a_path_that_may_not_be_entered_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(DataError, match=r"picture\.jpg: cannot be read as an image \(Permission denied\)$"):
        decode(tmp_path / "picture.jpg")
