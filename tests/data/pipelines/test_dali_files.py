"""The files for DALI's reader equal those that it saves itself, and both formats give the same batches."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")

import nvidia.dali as dali
from nvidia.dali import fn

from src.data.annotations.coco import Annotations, read_annotations
from src.data.pipelines.dali_files import try_write_reader_files, write_clean_file
from src.runtime.distributed import Shard
from tests.helpers.dali_loaders import epoch, loader, random_annotations
from tests.helpers.datasets import annotation, read, write_coco
from tests.helpers.equality import same

FILES = ("counts", "filenames", "labels", "offsets", "original_ids")
LAST_BITS = 2**-22  # the last two of a float32 in 0.5..1


def files_of_the_reader(annotations: Annotations, order: np.ndarray, folder: Path) -> None:
    """Has DALI's reader parse the COCO file of these annotations and write what it has read into the folder."""
    write_clean_file(annotations, folder / "clean.json")
    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        read = fn.readers.coco(
            annotations_file=str(folder / "clean.json"), file_root=str(annotations.image_folder), ltrb=True, ratio=True,
            images=[annotations.file_name(index) for index in order.tolist()], image_ids=True, size_threshold=0.0,
            save_preprocessed_annotations=True, save_preprocessed_annotations_dir=str(folder),
        )  # fmt: skip
        pipeline.set_outputs(*read)
    pipeline.build()


def irregular(folder: Path) -> Annotations:
    """Many boxes of any size and place, images without boxes, subfolders and names of other scripts."""
    rng = np.random.default_rng(5)
    images = [
        {"id": 7 * i, "file_name": f"{'sub/' * (i % 3)}ä猫{i}.jpg", "width": 33 + i, "height": 27 + 2 * i}
        for i in range(40)
    ]
    boxes = [
        annotation(7 * int(rng.integers(0, 38)), (*rng.uniform(-5, 40, 2).tolist(), *rng.uniform(1e-3, 60, 2).tolist()))
        for _ in range(5000)
    ]
    return read(write_coco(folder, boxes, images=images, splits=("train",)))


@pytest.mark.parametrize("make", ["photographs", "irregular"])
def test_the_files_equal_those_that_the_reader_saves(coco128, tmp_path, make):
    annotations = read(coco128) if make == "photographs" else irregular(tmp_path / "data")
    order = np.random.default_rng(1).permutation(annotations.with_boxes())
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    files_of_the_reader(annotations, order, theirs)
    assert try_write_reader_files(annotations, order, ours)
    for name in FILES:
        assert (ours / f"{name}.dat").read_bytes() == (theirs / f"{name}.dat").read_bytes(), name
    boxes, expected = (np.fromfile(folder / "boxes.dat", np.float32, offset=4) for folder in (ours, theirs))
    assert len(boxes) == 4 * len(annotations.boxes)
    # RapidJSON rounds some numbers half way between two float32 to the wrong one of them.
    np.testing.assert_allclose(boxes, expected, rtol=0, atol=LAST_BITS)


def test_names_with_white_space_give_the_same_batches(tmp_path):
    """White space separates names in the reader's files, so such data sets use a COCO file."""
    plain = random_annotations(tmp_path / "plain", 5)
    folder = tmp_path / "spaced"
    file = folder / "annotations" / "instances_train2017.json"
    file.parent.mkdir(parents=True)
    (folder / "train2017").mkdir()
    for image in plain.image_folder.iterdir():
        (folder / "train2017" / f"a b{image.name}").symlink_to(image)
    file.write_text(plain.path.read_text().replace('"file_name": "', '"file_name": "a b'))
    spaced = read_annotations(file, folder / "train2017")
    assert not try_write_reader_files(spaced, spaced.with_boxes(), tmp_path)
    options = {"seed": 2, "shard": Shard(1, 2)}
    one, other = loader(plain, **options), loader(spaced, **options)
    for number in range(2):
        assert same(epoch(one, number), epoch(other, number))
