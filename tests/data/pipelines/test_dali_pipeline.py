"""The batches of the DALI pipeline, and what is left when it is closed."""

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")

from src.data.pipelines.augment import colour_matrix
from src.data.pipelines.dali_graph import OUTPUTS
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import TorchTrainLoader
from src.runtime.errors import DataError
from tests.helpers.dali_loaders import CPU, epoch, loader, orders, random_annotations
from tests.helpers.datasets import annotation, read, write_coco
from tests.helpers.equality import same

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255


def test_batches_keep_the_contract(coco128):
    train_loader = loader(read(coco128), batch_size=16)
    assert train_loader.num_images == 126
    assert len(train_loader) == 8
    batches, copies = [], []
    train_loader.set_epoch(0)
    for batch in train_loader:
        batches.append(batch)
        copies.append([part.clone() for part in batch])
    assert len(batches) == 8
    for images, boxes, labels in batches:
        assert images.shape == (16, 3, 300, 300) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert boxes.shape == (16, 8732, 4) and boxes.dtype == torch.float32
        assert labels.shape == (16, 8732) and labels.dtype == torch.int64
        assert boxes.min() >= 0 and boxes.max() <= 1
        assert ((labels > 0).sum(dim=1) > 0).all() and labels.max() <= 80
        assert 0.5 < images.std() < 2
    assert all(map(same, batches, copies))  # memory shared with DALI is not written to again


@pytest.mark.parametrize(
    "categories",
    [[(1, "a"), (2, "b"), (3, "c")], [(90, "a"), (7, "b"), (13, "c")], [(2, "a"), (0, "b"), (1, "c")]],
    ids=["plain", "gaps, in any order", "from 0, in any order"],
)
def test_boxes_and_labels_equal_the_files_and_the_other_pipelines(tmp_path, categories):
    rng = np.random.default_rng(3)
    ids = [number for number, _ in categories]
    annotations = [
        annotation(image, (*rng.uniform(0, 60, 2).tolist(), *rng.uniform(0.01, 60, 2).tolist()), int(rng.choice(ids)))
        for image in rng.permutation(np.repeat([5, 2, 3, 9], 4)).tolist()
    ]
    annotations.append(annotation(2, (150, 100, 40, 40), ids[0]))  # partly outside
    images = [
        {"id": number, "file_name": name, "width": 160, "height": 120}
        for number, name in [
            (5, "b.jpg"),
            (2, 'odd "name" é.jpg'),
            (7, "without boxes.jpg"),
            (3, "a.jpg"),
            (9, "c/d.jpg"),
        ]
    ]
    listed = [{"id": number, "name": name} for number, name in categories]
    data = read(write_coco(tmp_path, annotations, images=images, categories=listed, splits=("train",)))
    ours = loader(data, batch_size=4, augment=False)
    ids, boxes, labels = ours.build(("ids", "true_boxes", "true_labels")).run()
    for sample, image in enumerate(data.with_boxes()[ids.as_array()[:, 0]]):
        entries = [entry for entry in annotations if entry["image_id"] == images[image]["id"]]
        left, top, width, height = np.array([entry["bbox"] for entry in entries]).T
        expected = np.stack((left, top, np.minimum(left + width, 160), np.minimum(top + height, 120)), axis=1)
        np.testing.assert_allclose(np.array(boxes.at(sample)), expected / (160, 120, 160, 120), atol=1e-6)
        assert np.array(labels.at(sample)).tolist() == [label_of(categories, entry) for entry in entries]
    order = orders(ours, 1)[0][0]
    theirs = TorchTrainLoader(data, LoaderConfig(batch_size=4, num_workers=0, device=CPU), augment=False)
    theirs_order = [sample.image for sample in next(iter(theirs.sampler))]
    (ours_batch,), (theirs_batch,) = epoch(ours, 0), list(theirs)
    for sample, image in enumerate(data.with_boxes()[order]):
        other = theirs_order.index(image)
        assert torch.equal(ours_batch.labels[sample], theirs_batch.labels[other])
        torch.testing.assert_close(ours_batch.boxes[sample], theirs_batch.boxes[other], atol=1e-6, rtol=0)


def label_of(categories, entry) -> int:
    return 1 + [number for number, _ in categories].index(entry["category_id"])


def test_photographs_without_augmentation_equal_the_other_pipelines(coco128):
    data = read(coco128)
    ours = loader(data, batch_size=126, augment=False)
    order = data.with_boxes()[orders(ours, 1)[0][0]].tolist()
    theirs = TorchTrainLoader(data, LoaderConfig(batch_size=126, num_workers=0, device=CPU), augment=False)
    theirs.sampler.images = np.array(order[:24])
    theirs.sampler.batch_size = 24
    theirs_order = [sample.image for sample in next(iter(theirs.sampler))]
    (ours_batch,), (theirs_batch,) = epoch(ours, 0), list(theirs)
    for sample, image in enumerate(theirs_order):
        one, other = order.index(image), sample
        assert ((ours_batch.images[one] - theirs_batch.images[other]).abs() * DEVIATION).mean() < 2
        ours_labels, theirs_labels = ours_batch.labels[one], theirs_batch.labels[other]
        # boxes differ by 1e-8, which decides between default boxes that overlap one equally but for that
        assert (ours_labels != theirs_labels).sum() <= 4
        assert torch.equal(ours_labels.bincount(), theirs_labels.bincount())


def test_colours_are_changed_by_the_formula_and_clipped_once(coco128):
    train_loader = loader(read(coco128), batch_size=32)
    steps = ("resized", "flip", "colour")
    pipeline = train_loader.build((*OUTPUTS, *steps))  # the same operators, and so the same draws
    resized, flips, factors = (output.as_array() for output in pipeline.run()[len(OUTPUTS) :])
    train_loader.set_epoch(0)
    images = next(iter(train_loader)).images
    assert 0 < flips.sum() < 32
    clipped = 0
    for number, image in enumerate(images):
        matrix = colour_matrix(*factors[number].tolist())
        changed = resized[number] @ matrix[:, :3].T + matrix[:, 3]
        expected = torch.from_numpy(changed.clip(0, 255)).permute(2, 0, 1)
        expected = expected.flip(2) if flips[number] else expected
        found = image * DEVIATION + MEAN
        assert (found - expected).abs().max() < 0.01
        assert found.min() > -0.01 and found.max() < 255.01
        clipped += (changed < 0).sum() + (changed > 255).sum()
    assert clipped > 10000


@pytest.mark.gpu
def test_the_gpu_gives_the_cpus_batches(coco128):
    data = read(coco128)
    ours = epoch(loader(data, batch_size=16, augment=False), 0)
    theirs = epoch(loader(data, batch_size=16, augment=False, device=torch.device("cuda")), 0)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(part.is_cuda for part in other)
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        assert ((one.images - other.images.cpu()).abs() * DEVIATION).mean() < 2
        assert torch.equal(one.labels, other.labels.cpu())
        torch.testing.assert_close(one.boxes, other.boxes.cpu(), atol=1e-6, rtol=0)


@pytest.mark.gpu
def test_the_gpu_continues_and_gives_half_precision(tmp_path):
    data, options = random_annotations(tmp_path), {"device": torch.device("cuda"), "dtype": torch.float16}
    first = loader(data, **options)
    first.set_epoch(0)
    batches = iter(first)
    assert next(batches).images.dtype == torch.float16
    state = first.state_dict()
    second = loader(data, **options)
    second.load_state_dict(state, epoch=0, iteration=1)
    second.set_epoch(0, 1)
    for one, other in zip(list(batches), list(second), strict=True):
        assert torch.equal(one.labels, other.labels) and torch.equal(one.boxes, other.boxes)
        torch.testing.assert_close(one.images, other.images, atol=0.1, rtol=0)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_jpeg_that_was_cut_short_is_refused_on_a_gpu(tmp_path, suffix):
    """Its decoder takes such a JPEG for a whole one; by the bytes at the ends, which are read on the CPU."""
    image = {"id": 1, "file_name": f"one{suffix}", "width": 160, "height": 120}
    data = read(write_coco(tmp_path, [annotation(1)], images=[image], splits=("train",)))
    path = data.image_path(0)
    whole = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        ours = loader(data, batch_size=1)
        (found,) = ours.build(("first_and_last_bytes",)).run()
        found = np.asarray(found.as_tensor())
        assert found.tolist() == [[*content[:2], *content[-2:]]]
        ours._check_complete(np.array([0]), found)

    check(whole)
    check(whole + b"something behind the picture")
    if suffix == ".jpg":
        for length in (len(whole) // 2, len(whole) - 2):
            with pytest.raises(DataError, match=f"{path}.*cut off"):
                check(whole[:length])


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_close_ends_threads_and_frees_memory(tmp_path):
    data = random_annotations(tmp_path, 32)
    epoch(loader(data, batch_size=32), 0)  # loads libraries, which stay
    gc.collect()
    threads_before, memory_before = threads(), resident()
    for number in range(4):
        ours = loader(data, batch_size=32)
        epoch(ours, number)
        pipeline = weakref.ref(ours._pipeline)
        ours.close()
        assert pipeline() is None
    assert threads() <= threads_before
    assert resident() < memory_before + 100  # one pipeline holds twice this


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    ours = loader(random_annotations(tmp_path / "data"))
    epoch(ours, 0)
    assert list(folder.iterdir()) == []
