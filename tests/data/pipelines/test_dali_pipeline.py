import gc
import importlib
import os
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")

from src.data.pipelines import dali_pipeline
from src.data.pipelines.augment import colour_matrix
from src.data.pipelines.dali_graph import OUTPUTS
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import TorchTrainLoader
from src.runtime.distributed import Shard
from src.runtime.errors import DataError, UserError
from tests.helpers.dali_loaders import CPU, all_same, epoch, loader, orders, read, same, small
from tests.helpers.datasets import annotation, write_coco

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255


# --- batches ---------------------------------------------------------------------------------------------------------


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
def test_boxes_and_labels_are_the_files_and_the_other_pipelines(tmp_path, categories):
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
        own = [entry for entry in annotations if entry["image_id"] == images[image]["id"]]
        left, top, width, height = np.array([entry["bbox"] for entry in own]).T
        expected = np.stack((left, top, np.minimum(left + width, 160), np.minimum(top + height, 120)), axis=1)
        np.testing.assert_allclose(np.array(boxes.at(sample)), expected / (160, 120, 160, 120), atol=1e-6)
        assert np.array(labels.at(sample)).tolist() == [label_of(categories, entry) for entry in own]
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


def test_photographs_without_augmentation_are_the_other_pipelines(coco128):
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
    data, options = small(tmp_path), {"device": torch.device("cuda"), "dtype": torch.float16}
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
def test_what_a_gpu_reads_of_a_file_that_was_cut_short_is_not_trained_on(tmp_path, suffix):
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


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, processes, batch_size", [(7, 3, 2), (5, 2, 2), (8, 3, 2), (2, 3, 2), (1, 1, 2)])
def test_every_image_is_seen_in_every_epoch_in_as_many_full_batches(tmp_path, images, processes, batch_size):
    data = small(tmp_path, images)
    ranks = [loader(data, shard=Shard(rank, processes), batch_size=batch_size, seed=4) for rank in range(processes)]
    iterations = -(-images // (processes * batch_size))
    assert [len(rank) for rank in ranks] == [iterations] * processes
    seen = [orders(rank, 3) for rank in ranks]
    for number in range(3):
        batches = [batch for rank in seen for batch in rank[number]]
        assert [len(batch) for batch in batches] == [batch_size] * (iterations * processes)
        assert {image for batch in batches for image in batch} == set(range(images))
    assert [len(epoch(ranks[-1], number)) for number in range(3)] == [iterations] * 3


def test_each_epoch_has_another_order_and_other_augmentation(tmp_path):
    data = small(tmp_path, 12)
    ours = orders(loader(data), 4)
    flat = [[image for batch in batches for image in batch] for batches in ours]
    assert len(set(map(tuple, flat))) == 4
    assert list(range(12)) not in flat
    pipeline = loader(data, batch_size=12).build(("ids", "anchor", "flip"))
    draws = [[output.as_array() for output in pipeline.run()] for _ in range(6)]
    by_image = [np.concatenate((anchor, flip[:, None]), axis=1)[ids[:, 0].argsort()] for ids, anchor, flip in draws]
    assert len({draw.tobytes() for draw in by_image}) == 6


def test_the_same_seed_gives_the_same_batches_for_any_number_of_threads(tmp_path):
    data = small(tmp_path)
    first, second, other = (loader(data, seed=seed, num_workers=n) for seed, n in [(1, 1), (1, 3), (2, 3)])
    for number in range(2):
        expected = epoch(first, number)
        assert all_same(expected, epoch(second, number))
        assert not any(map(same, expected, epoch(other, number)))


def test_processes_draw_different_augmentation(tmp_path):
    data = small(tmp_path, 2)
    anchors = [
        loader(data, batch_size=8, shard=Shard(rank, 2)).build(("anchor",)).run()[0].as_array() for rank in (0, 1)
    ]
    assert not np.array_equal(*anchors)


def test_two_pipelines_in_one_process_do_not_disturb_each_other(tmp_path):
    data, other_data = small(tmp_path / "a"), small(tmp_path / "b", 9, seed=1)
    expected = [epoch(loader(data), 0), epoch(loader(other_data), 0)]
    first, second = loader(data), loader(other_data)
    first.set_epoch(0)
    second.set_epoch(0)
    pairs = list(zip(first, second, strict=False))
    assert all_same([one for one, _ in pairs], expected[0])
    assert all_same([other for _, other in pairs], expected[1][: len(pairs)])


# --- what goes wrong -------------------------------------------------------------------------------------------------


def cut_header(content: bytes) -> bytes:
    return content[:200]


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "damage", [None, lambda _: b"", lambda _: b"<html>not an image</html>" * 20, cut_header, cut_short]
)
def test_a_broken_image_is_named(tmp_path, damage):
    data = small(tmp_path)
    path = tmp_path / "train2017" / "000004.jpg"
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    ours = loader(data)
    with pytest.raises(DataError) as error:
        epoch(ours, 0)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    path.write_bytes(content)
    assert len(epoch(ours, 0)) == len(ours)


def test_an_image_that_breaks_later_is_named(tmp_path):
    ours = loader(small(tmp_path))
    for number in range(3):
        epoch(ours, number)
    path = tmp_path / "train2017" / "000002.jpg"
    path.write_bytes(b"no image at all" * 20)
    with pytest.raises(DataError, match=r"000002\.jpg: "):
        for number in range(3, 6):  # some batches are prepared already
            epoch(ours, number)


def test_an_image_of_another_size_than_the_file_says_is_named(tmp_path):
    data = small(tmp_path)
    path = tmp_path / "train2017" / "000003.jpg"
    Image.new("RGB", (120, 160)).save(path)
    with pytest.raises(DataError) as error:
        epoch(loader(data), 0)
    assert str(error.value).startswith(f"{path}: the picture is 120 x 160")


def test_what_dali_alone_cannot_do_names_the_other_pipeline(tmp_path, monkeypatch):
    ours = loader(small(tmp_path))
    ours.set_epoch(0)

    class Failing:
        def run(self, stream):
            raise RuntimeError("Critical error in pipeline:\nencountered:\n\nout of memory\nmore")

    monkeypatch.setattr(ours, "_pipeline", Failing())
    with pytest.raises(UserError, match=r"^DALI failed \(out of memory\).*--data_pipeline no_dali$"):
        list(ours)


def test_dali_that_does_not_start_names_the_other_pipeline(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("CUDA driver version is insufficient\nfor this and that")

    monkeypatch.setattr(dali_pipeline, "make_pipeline", failing)
    with pytest.raises(UserError, match=r"^DALI cannot start \(CUDA .*insufficient\): .*--data_pipeline no_dali$"):
        epoch(loader(small(tmp_path)), 0)


def test_a_batch_that_is_too_large_is_to_be_made_smaller(tmp_path):
    with pytest.raises(UserError, match=r"^DALI cannot start \(.*\): lower --batch-size$"):
        loader(small(tmp_path), batch_size=2**31 - 1).build(OUTPUTS)


def test_dali_that_is_absent_names_the_other_pipeline(monkeypatch):
    for module in ("src.data.pipelines.dali_graph", "src.data.pipelines.dali_pipeline"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"^DALI cannot be used here \(.+\): use --data_pipeline no_dali$"):
        importlib.import_module("src.data.pipelines.dali_pipeline")


def test_no_other_module_needs_dali():
    loaded = os.popen(
        f"{sys.executable} -c 'import src.data.pipelines.loaders, sys; print(\"nvidia.dali\" in sys.modules)'"
    ).read()
    assert loaded.strip() == "False"


# --- the end ---------------------------------------------------------------------------------------------------------


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_close_ends_threads_and_frees_memory(tmp_path):
    data = small(tmp_path, 32)
    epoch(loader(data, batch_size=32), 0)  # what stays for good, such as libraries
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
    ours = loader(small(tmp_path / "data"))
    epoch(ours, 0)
    assert list(folder.iterdir()) == []
