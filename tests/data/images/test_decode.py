"""Undamaged image files of every kind, large ones, and files that cannot be opened."""

import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from src.data.images import decode as decode_module
from src.data.images.decode import decode
from src.data.images.formats import decode_any, read_size
from src.runtime.errors import DataError
from tests.helpers.image_files import CHANNELS, KINDS, chunk, png, saved

# --- good files ------------------------------------------------------------------------------------------------------


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


def test_texts_and_profiles_in_a_png_are_ignored(tmp_path):
    """Pillow alone refuses long texts and profiles."""
    samples = np.random.default_rng(0).integers(0, 256, (5, 6, 3))
    long = b"a" * 2_000_000
    path = tmp_path / "picture.png"
    for extra_chunks in (
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(long)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + long),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(long)),
        chunk(b"tRNS", bytes(6)),
    ):
        path.write_bytes(png(samples, 2, 8, extra_chunks=extra_chunks))
        assert torch.equal(decode(path).permute(1, 2, 0), torch.from_numpy(samples).byte())


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


def test_only_the_first_of_many_frames_is_decoded(tmp_path, picture):
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


def test_a_path_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(DataError, match=r"picture\.jpg: cannot be read as an image \(Permission denied\)$"):
        decode(tmp_path / "picture.jpg")
