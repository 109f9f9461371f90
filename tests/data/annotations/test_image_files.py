"""The images that an annotation file names must exist: errors name the path, the entry and the reason."""

import os

import pytest

from src.data.annotations import coco
from src.data.annotations.coco import check_images_exist
from src.data.annotations.dataset import read_dataset
from src.runtime.errors import DataError
from tests.helpers.annotation_files import IMAGES, content, read
from tests.helpers.datasets import annotation, write_coco


def touch_images(folder, names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_existing_images_pass(tmp_path):
    names = ["1.jpg", "a/2.jpg", "a/b/3.jpg", "./4.jpg"]
    touch_images(tmp_path / "train2017", names)
    images = [{**image, "file_name": name} for image, name in zip(IMAGES, names, strict=True)]
    check_images_exist(read(tmp_path, content(images=images)))


@pytest.mark.parametrize("missing", ["3.jpg", "a/2.jpg", "n" * 400])
def test_the_first_missing_image_is_named(tmp_path, missing):
    folder = tmp_path / "train2017"
    touch_images(folder, ["1.jpg", "a/b/5.jpg", "2.jpg", "4.jpg"])
    annotations = read(tmp_path, content(images=[*IMAGES[:2], {**IMAGES[2], "file_name": missing}, IMAGES[3]]))
    with pytest.raises(DataError) as caught:
        check_images_exist(annotations)
    assert str(folder / missing) in str(caught.value) and "image 3" in str(caught.value)


def test_a_long_search_for_the_images_prints_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "CLOCK_INTERVAL", 2)
    monkeypatch.setattr(coco, "PROGRESS_INTERVAL", 0.0)
    touch_images(tmp_path / "train2017", ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "other.txt"])
    annotations, lines = read(tmp_path, content()), []
    check_images_exist(annotations, log_progress=lines.append)
    assert lines == [f"Looking for the 4 images of {tmp_path / 'train2017'}: {found} files so far" for found in (2, 4)]
    monkeypatch.setattr(coco, "PROGRESS_INTERVAL", 60.0)
    check_images_exist(annotations, log_progress=lines.append)
    assert len(lines) == 2


def test_a_missing_image_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path / 'train2017'}: .*No such file or directory"):
        check_images_exist(read(tmp_path, content()))


def test_a_folder_with_an_images_name_is_refused(tmp_path):
    (tmp_path / "train2017" / "1.jpg").mkdir(parents=True)
    with pytest.raises(DataError, match=r"1\.jpg: no such image file"):
        check_images_exist(read(tmp_path, content()))


def test_the_error_says_what_is_there_instead_of_an_image(tmp_path):
    folder = tmp_path / "train2017"
    touch_images(folder, ["a/1.jpg"])
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    reasons = {
        "dangling": "no such image file (it is a link to nowhere, which is not there)",
        "loop": "(Too many levels of symbolic links)",
        "pipe": "no image file (it is a pipe or a device)",
        "a": "no such image file (it is a folder)",
        "a\\1.jpg": "there is a file 'a/1.jpg': write slashes in file_name",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError) as caught:
            check_images_exist(read(tmp_path, content(images=[{**IMAGES[0], "file_name": name}])))
        assert str(folder / name) in str(caught.value) and reason in str(caught.value)


def test_files_that_no_entry_names_are_ignored(tmp_path):
    folder = tmp_path / "train2017"
    touch_images(folder, ["1.jpg"])
    (folder / "loop").symlink_to("loop")
    check_images_exist(read(tmp_path, content(images=IMAGES[:1])))


def test_a_missing_validation_split_is_named(tmp_path):
    data = write_coco(tmp_path, [annotation(1)], splits=("train",))
    assert read_dataset(data, evaluating=False, upright=False)[1] is None
    with pytest.raises(DataError, match=r"no validation split \(.*\): --evaluation without epochs trains without one"):
        read_dataset(data, evaluating=True, upright=False)
