"""The order of images and the random draws of the DALI pipeline."""

import numpy as np
import pytest

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")

from src.runtime.distributed import Shard
from tests.helpers.dali_loaders import epoch, loader, orders, random_annotations
from tests.helpers.equality import same


@pytest.mark.parametrize("images, processes, batch_size", [(7, 3, 2), (5, 2, 2), (8, 3, 2), (2, 3, 2), (1, 1, 2)])
def test_every_image_is_seen_in_every_epoch_in_as_many_full_batches(tmp_path, images, processes, batch_size):
    data = random_annotations(tmp_path, images)
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
    data = random_annotations(tmp_path, 12)
    ours = orders(loader(data), 4)
    flat = [[image for batch in batches for image in batch] for batches in ours]
    assert len(set(map(tuple, flat))) == 4
    assert list(range(12)) not in flat
    pipeline = loader(data, batch_size=12).build(("ids", "anchor", "flip"))
    draws = [[output.as_array() for output in pipeline.run()] for _ in range(6)]
    by_image = [np.concatenate((anchor, flip[:, None]), axis=1)[ids[:, 0].argsort()] for ids, anchor, flip in draws]
    assert len({draw.tobytes() for draw in by_image}) == 6


def test_the_same_seed_gives_the_same_batches_for_any_number_of_threads(tmp_path):
    data = random_annotations(tmp_path)
    first, second, other = (loader(data, seed=seed, num_workers=n) for seed, n in [(1, 1), (1, 3), (2, 3)])
    for number in range(2):
        expected = epoch(first, number)
        assert same(expected, epoch(second, number))
        assert not any(map(same, expected, epoch(other, number)))


def test_processes_draw_different_augmentation(tmp_path):
    data = random_annotations(tmp_path, 2)
    anchors = [
        loader(data, batch_size=8, shard=Shard(rank, 2)).build(("anchor",)).run()[0].as_array() for rank in (0, 1)
    ]
    assert not np.array_equal(*anchors)


def test_two_pipelines_in_one_process_do_not_disturb_each_other(tmp_path):
    data, other_data = random_annotations(tmp_path / "a"), random_annotations(tmp_path / "b", 9, seed=1)
    expected = [epoch(loader(data), 0), epoch(loader(other_data), 0)]
    first, second = loader(data), loader(other_data)
    first.set_epoch(0)
    second.set_epoch(0)
    pairs = list(zip(first, second, strict=False))
    assert same([one for one, _ in pairs], expected[0])
    assert same([other for _, other in pairs], expected[1][: len(pairs)])
