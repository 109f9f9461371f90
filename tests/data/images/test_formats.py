"""Pictures without annotations: found in folders, and read as by Pillow and NumPy."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from src.data.images.decode import decode
from src.data.images.exif import ORIENTATION_TAG
from src.data.images.formats import decode_any, decode_thumbnail, find_images
from src.runtime.errors import DataError, UserError
from tests.helpers.datasets import write_image

HEIC = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic"


def pixels(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def test_images_are_found_by_their_content_in_all_folders_below(tmp_path):
    folder = tmp_path / "in"
    write_image(folder / "b.jfif", 40, 30, format="jpeg")
    write_image(folder / "sub" / "deeper" / "a.BMP", 40, 30)
    write_image(folder / "sub" / "no suffix", 40, 30, format="tiff")
    write_image(folder / ".thumbnails" / "a.png", 40, 30)
    write_image(folder / "found" / "b.jfif.png", 40, 30)
    (folder / "phone.bin").write_bytes(HEIC)
    (folder / "broken.jpeg").write_text("no image")
    (folder / "BMW.txt").write_text("BMW, no image")
    (folder / "empty").touch()
    (folder / "sub" / "again").symlink_to(folder)
    for name in (".hidden", "eeper", "f"):
        (folder / "sub" / name).symlink_to(folder / "sub" / "deeper")
    found = find_images(folder, leave_out=folder / "found")
    names = [file.relative_to(folder).as_posix() for file in found.files]
    assert names == ["b.jfif", "broken.jpeg", "phone.bin", "sub/deeper/a.BMP", "sub/no suffix"]
    assert (found.folder, found.others, found.unreadable) == (folder, 2, [])


def test_no_image_is_an_error_that_names_the_folder_and_counts_its_files(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"{tmp_path}: no image in this folder or below it, but 1 other files"):
        find_images(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path / 'missing'}: no such image or folder"):
        find_images(tmp_path / "missing")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    write_image(tmp_path / "a.jpg", 40, 30)
    (tmp_path / "locked").mkdir(mode=0)
    (error,) = find_images(tmp_path).unreadable
    assert str(error) == f"{tmp_path / 'locked'}: Permission denied"


def test_broken_links_and_named_pipes_are_found_or_named_and_marked_folders_counted(tmp_path):
    write_image(tmp_path / "a.jpg", 40, 30)
    write_image(tmp_path / "earlier" / "below" / "a.jpg.png", 40, 30)
    (tmp_path / "earlier" / "detections.json").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    for name in ("gone.png", "gone.txt", "gone"):
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    (tmp_path / "itself").symlink_to("itself")
    found = find_images(tmp_path, marker="detections.json")
    assert [file.name for file in found.files] == ["a.jpg", "gone.png", "pipe.jpg"]
    assert (found.others, found.marked) == (2, 1)  # gone.txt and pipe
    named = sorted(str(error).split(": ")[0] for error in found.unreadable)
    assert named == [str(tmp_path / "gone"), str(tmp_path / "itself")]
    (tmp_path / "a.jpg").rename(tmp_path / "earlier" / "a.jpg")
    for name in ("gone.png", "pipe.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"but 2 other files and 1 folders that hold detections\.json"):
        find_images(tmp_path, marker="detections.json")


@pytest.mark.parametrize(
    ("kind", "mode"), [("bmp", "RGB"), ("bmp", "L"), ("bmp", "P"), ("bmp", "1"), ("tiff", "RGBA"), ("tiff", "CMYK")]
)
def test_formats_beyond_torchvisions_are_read(tmp_path, kind, mode):
    write_image(tmp_path / "source.png", 41, 30)
    with Image.open(tmp_path / "source.png") as source:
        picture = source.convert(mode)
    picture.save(tmp_path / "a", format=kind)
    assert (pixels(decode_any(tmp_path / "a")) == np.asarray(picture.convert("RGB"))).all()


def test_grey_of_16_bits_keeps_the_upper_8(tmp_path):
    grey = np.arange(0, 2**16, 13, dtype=np.uint16)[:4800].reshape(60, 80)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert (pixels(decode_any(tmp_path / "a.tif")) == (grey // 256)[..., None]).all()


def measurements(path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(path, format="tiff")


def camera_raw(path):
    Image.new("RGB", (8, 8)).save(path, format="tiff", tiffinfo={254: 1})


def cut_off(path):
    write_image(path, 400, 300, format="bmp")
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(HEIC), "in HEIC format, which cannot be read: store it as JPEG"),
        (lambda path: path.write_bytes(b"\0\0\0\x20ftypavif"), "in AVIF format"),
        (measurements, "numbers of 32 bits, no colours"),
        (camera_raw, "only a small preview"),
        (cut_off, "cannot be read as an image"),
        (lambda path: path.write_bytes(b"II*\0 and nothing else"), "cannot be read as an image"),
    ],
    ids=["HEIC", "AVIF", "measurements", "raw", "cut off", "no TIFF"],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, write, reason):
    write(tmp_path / "a")
    with pytest.raises(DataError) as raised:
        decode_any(tmp_path / "a")
    assert str(raised.value).startswith(f"{tmp_path / 'a'}: ") and reason in str(raised.value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_pictures_without_annotations_are_upright_at_full_size_and_scaled_down(tmp_path, kind, orientation):
    write_image(tmp_path / "source.png", 200, 120)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    with Image.open(tmp_path / "source.png") as source:
        source.save(tmp_path / "a", format=kind, exif=exif, **({"quality": 95} if kind == "jpeg" else {}))
    with Image.open(tmp_path / "a") as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
        assert np.abs(pixels(decode_any(tmp_path / "a")) - np.asarray(upright).astype(int)).max() <= 2
        smaller = np.asarray(upright.resize((50, 30) if orientation < 5 else (30, 50)), int)
        assert np.abs(pixels(decode_thumbnail(tmp_path / "a", 50, any_format=True)) - smaller).max() <= 12
        if kind == "jpeg":  # what data sets may hold too
            smaller = np.asarray(stored.resize((50, 30)), int)
            assert np.abs(pixels(decode_thumbnail(tmp_path / "a", 50, any_format=False)) - smaller).max() <= 12


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_only_larger_pictures_are_scaled_down(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_image(path, 300, 2)
    assert (decode_thumbnail(path, 300, any_format=False) == decode(path)).all()
    assert decode_thumbnail(path, 100, any_format=False).shape == (3, 1, 100)


def test_a_large_jpeg_that_is_damaged_is_named(tmp_path):
    write_image(tmp_path / "a.jpg", 400, 300)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:600])
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read as an image"):
        decode_thumbnail(tmp_path / "a.jpg", 100, any_format=True)
