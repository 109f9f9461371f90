"""Detections on images without annotations."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.images.formats import find_images
from src.evaluation.predict import unreadable_error
from src.report.image_plots import draw_prediction
from src.runtime.errors import DataError
from tests.helpers.datasets import CATEGORIES as DATA_CATEGORIES
from tests.helpers.datasets import annotation, write_annotations, write_image
from tests.helpers.launch import LIMIT
from tests.helpers.predictions import OneDiscDetector, entries, predict_files
from tests.helpers.ranks import Ranks

ROOT = Path(__file__).parents[2]


def test_images_of_all_formats_get_a_picture_and_entries_in_pixels(tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    sizes = {"a.jpg": (160, 120), "a.png": (100, 200), "b.JPEG": (50, 60), "c.webp": (80, 40)}
    for name, size in sizes.items():
        write_image(folder / name, *size)
    frames = [Image.fromarray(np.full((30, 40, 3), value, np.uint8)) for value in (0, 200)]
    frames[0].save(folder / "d.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folder / "grey.png")
    (folder / "notes.txt").write_text("no image")
    model = OneDiscDetector()
    images = find_images(folder).files
    result = predict_files(images, output, model=model, batch_size=4)
    assert tuple(result) == (6, [], 6, 0)
    assert model.batches == [4, 2]
    names = ["a.jpg", "a.png", "b.JPEG", "c.webp", "d.gif", "grey.png"]
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [f"{name}.png" for name in names] + ["detections.json"]
    )
    found = entries(output)
    assert [entry["file_name"] for entry in found] == names
    assert [entry["image_id"] for entry in found] == list(range(6))
    assert {(entry["category_id"], entry["category"]) for entry in found} == {(90, "disc")}
    for entry, (width, height) in zip(found, [*sizes.values(), (40, 30), (30, 20)], strict=True):
        expected = [0.4 * width, 0.25 * height, 0.2 * width, 0.3 * height]
        assert entry["bbox"] == pytest.approx(expected, abs=1e-3)
        assert entry["score"] == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-5)
        with Image.open(output / f"{entry['file_name']}.png") as picture:
            assert picture.size == (width, height)


def test_a_single_image_of_any_name(tmp_path):
    write_image(tmp_path / "photograph", 90, 70, format="png")
    predict_files(find_images(tmp_path / "photograph").files, tmp_path)
    assert [entry["file_name"] for entry in entries(tmp_path)] == ["photograph"]
    assert (tmp_path / "photograph.png").exists()


@pytest.mark.parametrize("letter", ["n", "名"])
def test_images_with_the_longest_names_get_pictures(tmp_path, letter):
    longest = letter * (255 // len(letter.encode()))
    names = [longest, longest[:-1] + "m"]
    for name in names:
        write_image(tmp_path / "in" / name, 90, 70, format="png")
    predict_files(find_images(tmp_path / "in").files, tmp_path / "out")
    assert {entry["file_name"] for entry in entries(tmp_path / "out")} == set(names)
    assert len(list((tmp_path / "out").glob(f"{letter * 50}.*.png"))) == 2


def test_nothing_found_is_an_empty_list(tmp_path):
    write_image(tmp_path / "a.jpg", 90, 70)
    quiet = OneDiscDetector(loud=False)
    assert predict_files([tmp_path / "a.jpg"], tmp_path / "out", model=quiet).detections == 0
    assert entries(tmp_path / "out") == []
    assert (tmp_path / "out" / "a.jpg.png").exists()


def test_a_box_over_the_edge_is_clipped_to_the_image(tmp_path):
    write_image(tmp_path / "a.jpg", 101, 67)
    beyond = OneDiscDetector(box=torch.tensor([0.1, 0.9, 0.5, 0.6]))  # beyond the left and the lower edge
    predict_files([tmp_path / "a.jpg"], tmp_path / "out", model=beyond)
    (entry,) = entries(tmp_path / "out")
    assert entry["bbox"] == pytest.approx([0, 0.6 * 67, 0.35 * 101, 0.4 * 67], abs=2e-3)
    left, top, _, height = entry["bbox"]
    assert left == 0 and top + height == pytest.approx(67, abs=1e-9)


def test_a_box_outside_the_image_is_no_detection(tmp_path):
    write_image(tmp_path / "a.jpg", 101, 67)
    outside = OneDiscDetector(box=torch.tensor([-0.3, 0.5, 0.5, 0.6]))
    assert predict_files([tmp_path / "a.jpg"], tmp_path / "out", model=outside).detections == 0
    assert entries(tmp_path / "out") == []


def test_a_broken_image_is_named_and_the_others_are_done(tmp_path):
    for name in ("a.jpg", "c.jpg"):
        write_image(tmp_path / name, 90, 70)
    (tmp_path / "b.jpg").write_text("no image")
    images = find_images(tmp_path).files
    for batch_size in (1, 2, 4):
        output = tmp_path / f"out{batch_size}"
        result = predict_files(images, output, batch_size=batch_size)
        (error,) = result.unreadable
        assert str(error).startswith(f"{tmp_path / 'b.jpg'}: ") and "\n" not in str(error)
        assert [(entry["file_name"], entry["image_id"]) for entry in entries(output)] == [("a.jpg", 0), ("c.jpg", 2)]


@pytest.mark.parametrize(
    ("images", "folders", "line"),
    [
        (1, 0, "1 of 3 images left out: image 0"),
        (0, 1, "0 of 3 images left out, unreadable folders: 1: folder 0"),
        (2, 1, "2 of 3 images left out, unreadable folders: 1: folder 0; image 0; image 1"),
    ],
)
def test_unreadable_images_and_folders_are_counted_separately(images, folders, line):
    errors = [DataError(f"image {number}") for number in range(images)]
    error = unreadable_error(errors, 3, folders=[DataError(f"folder {number}") for number in range(folders)])
    assert str(error) == line


def test_images_in_subfolders_keep_their_paths(tmp_path):
    for name in ("a.jpg", "sub/a.jpg"):
        write_image(tmp_path / "in" / name, 90, 70)
    images = find_images(tmp_path / "in")
    output = tmp_path / "out"
    predict_files(images.files, output, folder=images.folder)
    assert [entry["file_name"] for entry in entries(output)] == ["a.jpg", "sub/a.jpg"]
    assert (output / "a.jpg.png").exists() and (output / "sub" / "a.jpg.png").exists()


def test_a_large_rotated_photograph_is_drawn_upright_and_smaller(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # its right side is up
    write_image(tmp_path / "a.jpg", 2400, 1200, exif=exif)
    predict_files([tmp_path / "a.jpg"], tmp_path)
    with Image.open(tmp_path / "a.jpg.png") as picture:
        assert picture.size == (1000, 2000)
    (entry,) = entries(tmp_path)  # in the pixels of the whole picture
    assert entry["bbox"] == pytest.approx([0.4 * 1200, 0.25 * 2400, 0.2 * 1200, 0.3 * 2400], abs=1e-2)


HUGE = """
import resource, sys
from pathlib import Path
import numpy as np
from src.data.annotations.coco import Annotations, read_annotations
from src.evaluation import artifacts
from src.evaluation.results import Results
from src.report.image_plots import draw_detections
from tests.helpers.predictions import predict_files

folder = Path(sys.argv[1])
image = folder / "val2017" / "huge.jpg"
annotations = read_annotations(folder / "annotations" / "instances_val2017.json", folder / "val2017")
empty = Results(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
draw_detections([artifacts._make_example(annotations, empty, 0)], folder / "detections.png")
peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
predict_files([image] * 3, folder / "out", batch_size=4)
peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*(round((peak - peaks[0]) / 1024) for peak in peaks[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems measure peak memory in other units")
def test_a_picture_of_100_megapixels_is_decoded_once_at_a_time(tmp_path):
    entry = {"id": 1, "file_name": "huge.jpg", "width": 12_000, "height": 9_000}
    content = {"images": [entry], "annotations": [annotation(1)], "categories": DATA_CATEGORIES}
    write_annotations(tmp_path, content, "val")
    (tmp_path / "val2017").mkdir()
    Image.new("L", (entry["width"], entry["height"]), 90).save(tmp_path / "val2017" / "huge.jpg")
    done = subprocess.run(
        [sys.executable, "-c", HUGE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    drawing, prediction = map(int, done.stdout.split())  # MiB beyond the program's use without a picture
    assert drawing < 200
    assert prediction < 600  # decoded once: 309 MiB


def test_photographs(coco128, tmp_path):
    images = find_images(coco128 / "val2017").files[:3]
    assert predict_files(images, tmp_path).images == 3
    for path in images:
        with Image.open(path) as original, Image.open(tmp_path / f"{path.name}.png") as picture:
            assert original.size == picture.size


@pytest.mark.parametrize("world_size", [2, 5])
def test_any_number_of_processes_writes_the_same_files(tmp_path, world_size, monkeypatch):
    drawing = threading.Lock()  # here ranks are threads, and matplotlib's settings belong to the process

    def draw(*arguments, **options):
        with drawing:
            return draw_prediction(*arguments, **options)

    monkeypatch.setattr("src.evaluation.predict.draw_prediction", draw)
    folder = tmp_path / "in"
    for number in range(4):
        write_image(folder / f"{number}.png", 90 + number, 70)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:100])
    images = find_images(folder).files
    expected = predict_files(images, tmp_path / "alone")

    def predict_on_rank(processes):
        return predict_files(images, tmp_path / "out", processes=processes)

    done, *others = Ranks(world_size).all_do(predict_on_rank)
    assert others == [None] * (world_size - 1)
    assert list(map(str, done.unreadable)) == list(map(str, expected.unreadable)) and len(done.unreadable) == 1
    assert (done.images, done.detections, done.non_finite) == (4, 3, 0)
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "alone"))
    assert ours == theirs and len(ours) == 4
