import multiprocessing
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.annotations.coco import read_annotations
from src.data.images.decode import decode
from src.data.pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, Batch, denormalise
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import EpochSampler, EvaluationLoader, TorchTrainLoader
from src.runtime.distributed import Shard
from src.runtime.errors import DataError
from src.ssd.default_boxes import NUM_DEFAULT_BOXES, default_boxes
from tests.helpers.datasets import annotation, write_coco

CPU = torch.device("cpu")


def make_annotations(folder, images=5, split="train"):
    entries = [annotation(image, (20 + 5 * image, 20, 60, 50), 1 + image % 2) for image in range(1, images + 1)]
    write_coco(folder, entries, images=images)
    return read_annotations(folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017")


def make_loader(annotations, workers=0, augment=True, **options) -> TorchTrainLoader:
    config = LoaderConfig(batch_size=2, num_workers=workers, device=CPU, **options)
    return TorchTrainLoader(annotations, config, augment=augment)


def epoch_of(loader, epoch, start=0) -> list[Batch]:
    loader.set_epoch(epoch, start)
    return list(loader)


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for batch, twin in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, twin, strict=True))


def test_batches_keep_the_contract(tmp_path):
    loader = make_loader(make_annotations(tmp_path))
    batches = epoch_of(loader, 0)
    assert len(batches) == len(loader) == 3  # 5 images in batches of 2, the last one filled up
    defaults = default_boxes()
    for images, boxes, labels in batches:
        assert images.shape == (2, 3, 300, 300)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert boxes.shape == (2, NUM_DEFAULT_BOXES, 4)
        assert labels.shape == (2, NUM_DEFAULT_BOXES)
        assert labels.dtype == torch.int64
        assert ((labels > 0).sum(dim=1) > 0).all()
        assert set(labels.unique().tolist()) <= {0, 1, 2}
        background = labels == 0
        assert torch.equal(boxes[background], defaults.expand_as(boxes)[background])
        low, high = (0 - torch.tensor(IMAGENET_MEAN).max()) / min(IMAGENET_STD), 1 / min(IMAGENET_STD)
        assert images.min() >= low
        assert images.max() <= high


def test_the_number_of_workers_changes_nothing(tmp_path):
    annotations = make_annotations(tmp_path)
    alone = epoch_of(make_loader(annotations), 1)
    for workers in (2, 4):
        loader = make_loader(annotations, workers)
        assert_same(alone, epoch_of(loader, 1))
        loader.close()


def test_epochs_seeds_and_ranks_differ_and_one_seed_repeats(tmp_path):
    annotations = make_annotations(tmp_path)
    first = epoch_of(make_loader(annotations), 0)
    assert_same(first, epoch_of(make_loader(annotations), 0))
    for other in (
        epoch_of(make_loader(annotations), 1),
        epoch_of(make_loader(annotations, seed=1), 0),
        epoch_of(make_loader(annotations, shard=Shard(1, 2)), 0),
    ):
        assert not torch.equal(first[0].images, other[0].images)


def test_an_epoch_continues_in_its_middle(tmp_path):
    annotations = make_annotations(tmp_path)
    assert_same(epoch_of(make_loader(annotations), 3)[1:], epoch_of(make_loader(annotations), 3, start=1))


@pytest.mark.parametrize("images", [1, 5, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_is_seen_in_every_epoch_and_all_ranks_do_as_many_full_batches(images, world_size):
    orders = set()
    for epoch in range(3):
        seen, lengths = [], set()
        for rank in range(world_size):
            sampler = EpochSampler(np.arange(images) * 10, batch_size=2, seed=0, shard=Shard(rank, world_size))
            sampler.epoch = epoch
            batches = list(sampler)
            assert len(batches) == len(sampler)
            assert all(len(batch) == 2 for batch in batches)
            lengths.add(len(batches))
            seen += [sample.image for batch in batches for sample in batch]
        assert len(lengths) == 1
        assert set(seen) == set(range(0, images * 10, 10))
        orders.add(tuple(seen))
    assert images == 1 or len(orders) > 1


def test_ranks_share_out_the_global_batches():
    alone = EpochSampler(np.arange(8), batch_size=4, seed=5, shard=Shard(0, 1))
    pair = [EpochSampler(np.arange(8), batch_size=2, seed=5, shard=Shard(rank, 2)) for rank in range(2)]
    for whole, *parts in zip(alone, *pair, strict=True):
        assert sorted(whole) == sorted(sample for part in parts for sample in part)


def test_unaugmented_image_is_pillows(tmp_path):
    """Pillow's bilinear filter is triangular and antialiased, too."""
    annotations = make_annotations(tmp_path, images=1)
    batch = next(iter(make_loader(annotations, augment=False)))
    with Image.open(annotations.image_path(0)) as picture:
        expected = np.asarray(picture.resize((300, 300), Image.Resampling.BILINEAR), np.float64)
    actual = denormalise(batch.images.double())[0].permute(1, 2, 0).numpy()
    assert np.abs(actual - expected).mean() < 0.5
    assert np.abs(actual - expected).max() <= 2


def test_evaluation_gives_each_image_once_over_all_ranks(tmp_path):
    annotations = make_annotations(tmp_path, split="val")
    for world_size in (1, 2, 3, 7):
        seen = []
        for rank in range(world_size):
            config = LoaderConfig(batch_size=2, num_workers=0, device=CPU, shard=Shard(rank, world_size))
            loader = EvaluationLoader(annotations, config)
            batches = list(loader)
            assert len(batches) == len(loader)
            for images, indices in batches:
                assert images.shape[1:] == (3, 300, 300)
                assert indices.dtype == torch.int64
                seen += indices.tolist()
        assert sorted(seen) == list(range(5))


def test_an_evaluation_loader_keeps_its_workers_until_it_is_closed(tmp_path):
    loader = EvaluationLoader(
        make_annotations(tmp_path, split="val"), LoaderConfig(batch_size=2, num_workers=1, device=CPU)
    )
    with closing(loader):
        others = set(multiprocessing.active_children())
        first = [indices.tolist() for _, indices in loader]
        (worker,) = set(multiprocessing.active_children()) - others
        assert [indices.tolist() for _, indices in loader] == first
        assert set(multiprocessing.active_children()) - others == {worker} and worker.is_alive()
    assert not worker.is_alive()


BROKEN = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("this is no picture"),
    "a GIF": lambda path: Image.new("RGB", (160, 120)).save(path, format="GIF"),  # DALI may end the process on one
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_line_with_its_full_path(tmp_path, fault, workers):
    annotations = make_annotations(tmp_path)
    path = annotations.image_path(2)
    BROKEN[fault](path)
    loader = make_loader(annotations, workers)
    with pytest.raises(DataError) as raised:
        epoch_of(loader, 0)
    assert str(raised.value).startswith(str(path.absolute()))
    assert len(str(raised.value).splitlines()) == 1


def test_a_picture_of_another_size_than_the_annotation_file_says(tmp_path):
    annotations = make_annotations(tmp_path)
    Image.new("RGB", (50, 70)).save(annotations.image_path(0))
    with pytest.raises(DataError, match=r"000001\.jpg: the picture is 50 x 70, but .*json says width 160, height 120"):
        epoch_of(make_loader(annotations), 0)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "RGB", "LA", "1"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_every_kind_of_picture_has_pillows_three_channels(tmp_path, mode, suffix):
    if (mode, suffix) in {("CMYK", "png"), ("RGBA", "jpg"), ("P", "jpg"), ("LA", "jpg"), ("1", "jpg")}:
        suffix = {"png": "jpg", "jpg": "png"}[suffix]  # the format does not have that kind
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).convert(mode)
    path = tmp_path / f"picture.{suffix}"
    picture.save(path)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"), np.int16)
    actual = decode(path).permute(1, 2, 0).numpy().astype(np.int16)
    assert actual.shape == (60, 80, 3)
    assert np.abs(actual - expected).max() <= 2


def test_orientation_tag_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (80, 60), "red").save(path, exif=exif)
    assert decode(path).shape == (3, 60, 80)
