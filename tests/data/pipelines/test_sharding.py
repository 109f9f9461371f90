"""Who gets which image on 1,024 processes: every image once an epoch, and as many full batches on each."""

import numpy as np
import pytest

from src.data.pipelines import torch_pipeline
from src.data.pipelines.torch_pipeline import EpochSampler
from src.runtime.distributed import Shard

IMAGES, PROCESSES, BATCH = 1_700_017, 1024, 32


def test_shares_without_dali(monkeypatch):
    orders: dict[int, np.ndarray] = {}

    def once(images: np.ndarray, *, epoch: int, **rest) -> np.ndarray:
        if epoch not in orders:  # all processes compute the same, which takes as long as all the rest
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
    """What DALI's reader gives one process of an epoch's order: its shard, the last image repeated to full batches."""
    own = order[len(order) * rank // processes : len(order) * (rank + 1) // processes]
    largest = -(-len(order) // processes)
    batches = -(-largest // batch_size)
    return np.concatenate([own, np.repeat(own[-1:], batches * batch_size - len(own))])


def test_shares_with_dali():
    order = np.random.default_rng(0).permutation(IMAGES)
    seen = np.zeros(IMAGES, np.int64)
    for rank in range(PROCESSES):
        own = dali_share(order, rank=rank, processes=PROCESSES, batch_size=BATCH)
        assert len(own) == 52 * BATCH
        seen[own] += 1  # an image that is repeated counts once
    assert (seen == 1).all()


@pytest.mark.parametrize("images, processes, batch_size", [(11, 3, 2), (7, 4, 1), (9, 2, 4)])
def test_the_rule_is_the_readers(tmp_path, images, processes, batch_size):
    pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    from tests.helpers.dali_loaders import loader, orders, small

    data = small(tmp_path, images)
    options = {"batch_size": batch_size, "seed": 1}
    ranks = [loader(data, shard=Shard(rank, processes), **options) for rank in range(processes)]
    given = [orders(rank, 3) for rank in ranks]
    for epoch in range(3):
        passes = [np.concatenate(own[epoch]).tolist() for own in given]
        # The order is the reader's own; what it is follows from the shards, if the rule holds.
        order = np.array([image for own in passes for image in dict.fromkeys(own)])
        assert sorted(order.tolist()) == list(range(images))
        for rank, own in enumerate(passes):
            assert own == dali_share(order, rank=rank, processes=processes, batch_size=batch_size).tolist()
