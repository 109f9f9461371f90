"""Which of 1,024 processes gets which image: each image once an epoch, the same number of full batches on each."""

import numpy as np
import pytest

from src.data.pipelines import torch_pipeline
from src.data.pipelines.torch_pipeline import EpochSampler
from src.runtime.distributed import Shard

IMAGES, PROCESSES, BATCH = 1_700_017, 1024, 32


def test_shares_without_dali(monkeypatch):
    orders: dict[int, np.ndarray] = {}

    def once(images: np.ndarray, *, epoch: int, **rest) -> np.ndarray:
        if epoch not in orders:  # the same on all processes; computing it for each would double the time
            orders[epoch] = order_of(images, epoch=epoch, **rest)
        return orders[epoch]

    order_of = torch_pipeline.epoch_order
    monkeypatch.setattr(torch_pipeline, "epoch_order", once)
    images = np.arange(IMAGES)
    seen = np.zeros(IMAGES, np.int64)
    for rank in range(PROCESSES):
        sampler = EpochSampler(images, batch_size=BATCH, seed=0, shard=Shard(rank, PROCESSES))
        batches = list(sampler)
        assert len(batches) == len(sampler) == 52 and {len(batch) for batch in batches} == {BATCH}
        np.add.at(seen, [sample.image for batch in batches for sample in batch], 1)
    repeats = 52 * BATCH * PROCESSES - IMAGES  # the last batches are filled up with the epoch's beginning
    assert seen.min() == 1 and seen.max() == 2 and (seen == 2).sum() == repeats


def dali_share(order: np.ndarray, *, rank: int, processes: int, batch_size: int) -> np.ndarray:
    """A process's shard of an epoch's order by DALI's rule: the last image is repeated to full batches."""
    part = order[len(order) * rank // processes : len(order) * (rank + 1) // processes]
    largest = -(-len(order) // processes)
    batches = -(-largest // batch_size)
    return np.concatenate([part, np.repeat(part[-1:], batches * batch_size - len(part))])


def test_shares_with_dali():
    order = np.random.default_rng(0).permutation(IMAGES)
    seen = np.zeros(IMAGES, np.int64)
    for rank in range(PROCESSES):
        indices = dali_share(order, rank=rank, processes=PROCESSES, batch_size=BATCH)
        assert len(indices) == 52 * BATCH
        seen[indices] += 1  # an image that is repeated counts once
    assert (seen == 1).all()


@pytest.mark.parametrize("images, processes, batch_size", [(11, 3, 2), (7, 4, 1), (9, 2, 4)])
def test_dali_share_is_the_readers_rule(tmp_path, images, processes, batch_size):
    pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    from tests.helpers.dali_loaders import loader, orders, random_annotations

    data = random_annotations(tmp_path, images)
    options = {"batch_size": batch_size, "seed": 1}
    ranks = [loader(data, shard=Shard(rank, processes), **options) for rank in range(processes)]
    given = [orders(rank, 3) for rank in ranks]
    for epoch in range(3):
        passes = [np.concatenate(epochs[epoch]).tolist() for epochs in given]
        # The reader chooses the order; joining the shards gives it, if the rule holds.
        order = np.array([image for images_of_rank in passes for image in dict.fromkeys(images_of_rank)])
        assert sorted(order.tolist()) == list(range(images))
        for rank, images_of_rank in enumerate(passes):
            assert images_of_rank == dali_share(order, rank=rank, processes=processes, batch_size=batch_size).tolist()
