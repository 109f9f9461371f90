"""`--mode check` on small data sets: what it tells, and its exit status."""

import json
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from src.check import check_dataset
from src.data.annotations.coco import check_images_exist, read_annotations
from src.data.pipelines.loaders import make_decode_check
from tests.helpers.datasets import annotation, write_annotations, write_coco, write_image


@pytest.fixture
def check():
    """`check(folder)`: the exit status, the lines written and the (total, name, steps) of each progress bar."""

    def checked(folder: Path, workers: int = 2, *, pipeline: str = "no_dali", upright: bool = False):
        lines, bars = [], []

        def progress(total: int, name: str):
            steps = []
            bars.append((total, name, steps))
            return nullcontext(SimpleNamespace(update=steps.append))

        files = [
            (folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017")
            for split in ("train", "val")
        ]
        trial = partial(make_decode_check, pipeline, device=torch.device("cpu"))
        options = {"make_decode_check": trial, "upright": upright, "workers": workers}
        status = check_dataset(files, **options, progress=progress, write=lines.append)
        return status, lines, bars

    return checked


def lines_with(lines: list[str], *parts) -> list[str]:
    return [line for line in lines if all(str(part) in line for part in parts)]


def test_a_sound_data_set(check, coco128):
    status, lines, bars = check(coco128)
    assert status == 0
    text = "\n".join(lines)
    assert "instances_train2017.json:\n  images: 128, 2 of them without boxes\n  boxes: 939, 10 of them crowds" in text
    assert "instances_val2017.json:\n  images: 48, 1 of them without boxes" in text
    entries = json.loads((coco128 / "annotations" / "instances_train2017.json").read_text())
    unused = 80 - len({entry["category_id"] for entry in entries["annotations"]})
    assert f"categories: 80, {unused} of them without boxes" in text
    widths = [image["width"] for image in entries["images"]]
    assert f"image width: {min(widths)} to {max(widths)}, median {np.median(widths):g};" in text
    assert len(lines_with(lines, "nothing is wrong")) == 2
    assert [(total, sum(steps)) for total, _, steps in bars] == [(128, 128), (48, 48)]


def test_what_was_left_out_is_told_and_no_fault(check, tmp_path):
    write_coco(tmp_path, [annotation(1), annotation(1, bbox=(5, 5, 0, 5)), annotation(77)])
    status, lines, _ = check(tmp_path)
    assert status == 0
    assert len(lines_with(lines, "warning: 1 of 3 annotations left out", "not positive")) == 1
    assert len(lines_with(lines, "warning: 1 of 3 annotations count as missed in the scoring", "not positive")) == 1
    assert len(lines_with(lines, "warning: 1 of 3 annotations left out", "image_id (77)")) == 2


def test_every_broken_picture_is_one_line_with_its_full_path(check, tmp_path):
    names = ["good.jpg", "sub/missing.jpg", "empty.jpg", "text.png", "half.jpg", "folder.jpg"]
    images = [{"id": i, "file_name": name, "width": 160, "height": 120} for i, name in enumerate(names, 1)]
    write_coco(tmp_path, [annotation(i) for i in range(1, 7)], images=images)
    folder = tmp_path / "train2017"
    (folder / names[1]).unlink()
    (folder / names[2]).write_bytes(b"")
    (folder / names[3]).write_text("this is no picture")
    content = (folder / names[4]).read_bytes()
    (folder / names[4]).write_bytes(content[: len(content) // 2])
    (folder / names[5]).unlink()
    (folder / names[5]).mkdir()
    status, lines, _ = check(tmp_path)
    assert status == 2
    faults = [line for line in lines if line.startswith(str(folder))]
    assert [line.split(":")[0] for line in faults] == [str(folder / name) for name in names[1:]]
    assert not any("\n" in line for line in faults)
    assert lines_with(lines, "wrong: 5 of 6 image files")
    assert len(lines_with(lines, "nothing is wrong")) == 1


def test_pictures_of_another_size(check, tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 160, "height": 120} for i in (1, 2, 3, 4)]
    write_coco(tmp_path, [annotation(1)], images=images)
    folder = tmp_path / "train2017"
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.new("RGB", (120, 160), "white")
    picture.save(folder / "2.jpg", exif=turned)
    picture.save(folder / "3.jpg")
    Image.new("RGB", (100, 90)).save(folder / "4.jpg", exif=turned)
    status, lines, _ = check(tmp_path)
    assert status == 2
    for name, found in (("2.jpg", "120 x 160"), ("3.jpg", "120 x 160"), ("4.jpg", "100 x 90")):
        assert len(lines_with(lines, folder / name, found, "width 160, height 120")) == 1
    (shown,) = lines_with(lines, "--orientation")
    assert str(folder / "2.jpg") in shown
    assert shown.endswith("the size of the picture turned by its orientation tag, which --orientation upright reads")


def test_a_tag_alone_is_no_fault(check, tmp_path):
    write_coco(tmp_path, [annotation(1)], images=1)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (160, 120)).save(tmp_path / "train2017" / "000001.jpg", exif=turned)
    assert check(tmp_path)[0] == 0


def test_a_missing_image_folder_is_one_line(check, tmp_path):
    write_coco(tmp_path, [annotation(1)], splits=("train",))
    write_annotations(tmp_path, json.loads((tmp_path / "annotations/instances_train2017.json").read_text()), "val")
    status, lines, _ = check(tmp_path)
    assert status == 2
    assert len(lines_with(lines, tmp_path / "val2017", "no such folder", "4 images")) == 1


def test_a_wrong_annotation_file_does_not_keep_the_other_from_being_checked(check, tmp_path):
    write_coco(tmp_path, [annotation(1)], splits=("val",))
    status, lines, _ = check(tmp_path)
    assert status == 2
    assert lines_with(lines, tmp_path / "annotations" / "instances_train2017.json", "no such annotation file")
    assert lines_with(lines, "images: 4") and lines_with(lines, "nothing is wrong")


def test_other_categories_in_the_validation_file(check, tmp_path):
    write_coco(tmp_path, [annotation(1)])
    write_coco(tmp_path, [annotation(1)], splits=("val",), categories=[{"id": 1, "name": "square"}])
    status, lines, _ = check(tmp_path)
    assert status == 2
    assert lines_with(lines, "instances_val2017.json", "only there: 2 'disc'")


def test_an_interrupted_check_ends_at_once(tmp_path):
    write_coco(tmp_path, [annotation(1, (1, 1, 9, 9))], images=40, size=(16, 16))

    def interrupted(steps: int) -> None:
        raise KeyboardInterrupt

    bar = nullcontext(SimpleNamespace(update=interrupted))

    def no_trial(*_, **__) -> None:
        pass

    files = [(tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017")]
    with pytest.raises(KeyboardInterrupt):
        check_dataset(files, make_decode_check=no_trial, workers=2, progress=lambda total, name: bar, write=print)


# --- warnings --------------------------------------------------------------------------------------------------------


def test_damaged_jpeg_data_are_told_by_file(check, tmp_path):
    write_coco(tmp_path, [annotation(1)], images=3, size=(400, 300))
    path = tmp_path / "train2017" / "000002.jpg"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(20) + content[middle + 20 :])
    status, lines, _ = check(tmp_path)
    assert status == 0
    (line,) = lines_with(lines, "damaged JPEG data")
    assert line.startswith(f"warning: {path}: ")
    assert lines_with(lines, "nothing is wrong but for the warnings")


def test_boxes_that_repeat_are_told(check, tmp_path):
    boxes = [annotation(1), annotation(1), annotation(1), annotation(1, category_id=2), annotation(2), annotation(3)]
    write_coco(tmp_path, [*boxes, annotation(3)], splits=("train",))
    write_coco(tmp_path, [annotation(1)], splits=("val",), size=(90, 80))
    status, lines, _ = check(tmp_path)
    assert status == 0
    said = "3 boxes repeat another of the same category on 2 images: 000001.jpg, 000003.jpg"
    assert len(lines_with(lines, said)) == 1


def test_validation_pictures_that_are_training_pictures_are_told(check, tmp_path):
    write_coco(tmp_path, [annotation(1)], images=8)
    for number in (3, 5):
        write_image(tmp_path / "val2017" / f"{number:06d}.jpg", 160, 120, seed=100 + number)
    status, lines, _ = check(tmp_path)
    assert status == 0
    (line,) = lines_with(lines, "6 validation pictures are training pictures, byte for byte")
    assert "000001.jpg = 000001.jpg" in line and "000003.jpg" not in line and line.endswith(" and 1 more")


def test_decoders_lines_are_tied_to_their_file(check, tmp_path, capfd):
    pytest.importorskip("nvidia.dali")
    write_coco(tmp_path, [annotation(1)], images=5, size=(400, 300))
    path = tmp_path / "train2017" / "000004.jpg"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(20) + content[middle + 20 :])
    status, lines, _ = check(tmp_path, pipeline="dali")
    assert status == 0
    assert all(line.startswith(f"warning: {path}: DALI: ") for line in lines_with(lines, "DALI"))
    assert lines_with(lines, "DALI: Corrupt JPEG data")
    assert "Corrupt" not in capfd.readouterr().err


# --- what cannot be opened -------------------------------------------------------------------------------------------


def test_a_named_pipe_and_a_link_to_itself_hang_nothing(check, tmp_path):
    write_coco(tmp_path, [annotation(1)], images=2)
    folder = tmp_path / "train2017"
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")  # which no entry names
    path = tmp_path / "annotations" / "instances_train2017.json"
    annotations = read_annotations(path, folder)
    check_images_exist(annotations)
    assert check(tmp_path)[0] == 0
    (folder / "000002.jpg").unlink()
    os.mkfifo(folder / "000002.jpg")
    status, lines, _ = check(tmp_path)
    assert status == 2
    assert lines_with(lines, folder / "000002.jpg", "it is no regular file")


def test_an_image_folder_that_may_not_be_entered_is_one_line(check, tmp_path):
    write_coco(tmp_path, [annotation(1)])
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    (tmp_path / "val2017").symlink_to("x" * 300)  # os.stat raises OSError, also for root
    status, lines, _ = check(tmp_path)
    assert status == 2
    assert len(lines_with(lines, tmp_path / "val2017", "no such folder, or it may not be entered", "4 images")) == 1


# --- what only DALI refuses ------------------------------------------------------------------------------------------


def damaged_at_the_start(content: bytes) -> bytes:
    """A JPEG file with three bytes too many between its first two segments, which Pillow passes over."""
    return content[:20] + bytes(3) + content[20:]


@pytest.mark.parametrize("pipeline", ["no_dali", "dali"])
def test_check_tries_what_the_pipeline_will_do(check, tmp_path, pipeline):
    pytest.importorskip("nvidia.dali")
    write_coco(tmp_path, [annotation(i) for i in range(1, 7)], images=6)
    for split in ("train", "val"):
        path = tmp_path / f"{split}2017" / "000004.jpg"
        path.write_bytes(damaged_at_the_start(path.read_bytes()))
    status, lines, _ = check(tmp_path, pipeline=pipeline)
    faults = [line for line in lines if "DALI" in line]
    if pipeline == "no_dali":
        assert (status, faults) == (0, [])
    else:
        assert status == 2
        (fault,) = faults
        assert fault.startswith(f"{tmp_path / 'train2017' / '000004.jpg'}: DALI cannot decode it (")
        assert fault.endswith("): store it anew, or use --data_pipeline no_dali")
        assert lines_with(lines, "wrong: 1 of 6 image files")
        assert lines_with(lines, "nothing is wrong")  # in the validation file, whose pictures DALI does not read
