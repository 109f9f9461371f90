"""DataLoader pipelines: training without DALI (`--data_pipeline no_dali`) and evaluation.

A worker reads, decodes, crops, resizes and flips (uint8 out); the device does what needs the whole batch.
Everything random follows from (seed, epoch, position in the epoch), so it does not depend on the number of workers,
and a run is continued from its position alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from src.data.annotations.coco import Annotations
from src.data.images.decode import resize
from src.data.pipelines.augment import FLIP_PROBABILITY, NO_COLOUR, random_colour_matrix, random_crop
from src.data.pipelines.batch import Batch, BatchMaker, HostBatch, normalise
from src.data.pipelines.image_reader import check_headers, read_image
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.workers import data_loader, end_workers, guarded, share
from src.runtime.distributed import Shard
from src.runtime.errors import UserError


class Sample(NamedTuple):
    """Where a training sample stands and which image it shows."""

    epoch: int
    position: int  # in the epoch, over all processes
    image: int  # its index in the annotations


def epoch_order(images: np.ndarray, *, seed: int, epoch: int, total: int) -> np.ndarray:
    """An epoch's images in their order, lengthened to `total` by its own beginning; the same on every process."""
    return np.resize(np.random.default_rng([seed, epoch]).permutation(images), total)


class EpochSampler:
    """This process's batches of an epoch: lists of Sample, every batch full.

    The epoch's order is shuffled over all processes, lengthened by its own beginning to whole batches, and dealt out.
    """

    def __init__(self, images: np.ndarray, *, batch_size: int, seed: int, shard: Shard) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.shard = shard
        self.epoch = 0
        self.start = 0  # the first iteration to give

    def __len__(self) -> int:
        return -(-len(self.images) // (self.batch_size * self.shard.world_size))

    def __iter__(self) -> Iterator[list[Sample]]:
        total = len(self) * self.batch_size * self.shard.world_size
        order = epoch_order(self.images, seed=self.seed, epoch=self.epoch, total=total)
        positions = np.arange(self.shard.rank, total, self.shard.world_size).reshape(-1, self.batch_size)
        for batch in positions[self.start :]:
            yield [Sample(self.epoch, int(position), int(order[position])) for position in batch]


class TrainingSet(Dataset):
    """Augmented samples; reads only arrays, so that worker processes do not copy the annotations."""

    def __init__(self, annotations: Annotations, *, seed: int, augment: bool) -> None:
        self.annotations = annotations
        self.seed = seed
        self.augment = augment

    def __getitem__(self, sample: Sample) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray] | UserError:
        """Image [3, 300, 300] uint8, colour [3, 4], boxes [G, 4] ltrb in 0..1, labels [G].

        A user's error is returned, not raised: DataLoader would bury it in the worker's traceback.
        """
        try:
            image = read_image(self.annotations, sample.image)
        except UserError as error:
            return error
        boxes, labels = self.annotations.of_image(sample.image)
        colour, flip = NO_COLOUR, False
        if self.augment:
            random = np.random.default_rng([self.seed, sample.epoch, sample.position])
            image, boxes, labels = random_crop(image, boxes, labels, random)
            flip = random.random() < FLIP_PROBABILITY
            colour = random_colour_matrix(random)
        height, width = image.shape[1:]
        boxes /= np.array([width, height, width, height], np.float32)
        image = resize(image)
        if flip:
            image = image.flip(-1)
            boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
        return image, colour, boxes, labels


def collate_training(samples: list) -> HostBatch | UserError:
    """Samples of TrainingSet as one HostBatch; the first error where there is one."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images, colour, boxes, labels = zip(*samples, strict=True)
    counts = torch.tensor([len(one) for one in labels])
    batch = HostBatch(
        images=_stack(images),
        colour=torch.from_numpy(np.stack(colour)),
        boxes=torch.from_numpy(np.concatenate(boxes)),
        labels=torch.from_numpy(np.concatenate(labels)),
        owners=torch.arange(len(samples)).repeat_interleave(counts),
    )
    return share(batch)


def _stack(images: tuple[Tensor, ...]) -> Tensor:
    """Images [3, 300, 300] of any memory layout as [N, 3, 300, 300], channels last."""
    stacked = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, memory_format=torch.channels_last)
    for slot, image in zip(stacked, images, strict=True):
        slot.copy_(image)
    return stacked


class TorchTrainLoader:
    """The training loader of `--data_pipeline no_dali`; see design: train loader."""

    def __init__(self, annotations: Annotations, config: LoaderConfig, *, augment: bool = True) -> None:
        self.warnings: list[str] = []
        self.make_batch = BatchMaker(config.dtype).to(config.device)
        images = annotations.with_boxes()
        self.num_images = len(images)
        self.sampler = EpochSampler(images, batch_size=config.batch_size, seed=config.seed, shard=config.shard)
        training_set = TrainingSet(annotations, seed=config.seed, augment=augment)
        self.loader = data_loader(
            training_set, collate_training, config.num_workers, config.device, batch_sampler=self.sampler
        )

    def __len__(self) -> int:
        """Iterations an epoch, the same on every process."""
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_iteration: int = 0) -> None:
        """The next pass is that of `epoch` from its iteration `start_iteration` on; nothing before is decoded."""
        self.sampler.epoch = epoch
        self.sampler.start = start_iteration

    def __iter__(self) -> Iterator[Batch]:
        for host in guarded(self.loader):
            yield self.make_batch(host)

    def state_dict(self) -> dict:
        """Empty: the position in the run is all that this pipeline needs."""
        return {}

    def load_state_dict(self, state: dict, *, epoch: int, iteration: int) -> None:
        """Nothing to take over: `set_epoch` continues anywhere."""

    def close(self) -> None:
        """Ends the worker processes."""
        end_workers(self.loader._iterator)


class EvaluationSet(Dataset):
    """Images resized and not augmented, with their index in the annotations."""

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UserError:
        try:
            return resize(read_image(self.annotations, index)), index
        except UserError as error:
            return error


def collate_evaluation(samples: list) -> tuple[Tensor, Tensor] | UserError:
    """Images [N, 3, 300, 300] uint8 and indices [N] int64; the first error where there is one."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images, indices = zip(*samples, strict=True)
    return share((_stack(images), torch.tensor(indices)))


class EvaluationLoader:
    """This process's share of the images, each exactly once: (images [N, 3, 300, 300] normalised, indices [N]).

    With `normalised` off the images are uint8.  Its workers stay for the next pass, until `close`.
    """

    def __init__(self, annotations: Annotations, config: LoaderConfig, *, normalised: bool = True) -> None:
        self.device = config.device
        self.normalised = normalised
        own = range(config.shard.rank, len(annotations), config.shard.world_size)
        check_headers(annotations, own)
        batches = [list(own[start : start + config.batch_size]) for start in range(0, len(own), config.batch_size)]
        workers = min(config.num_workers, len(batches))
        dataset = EvaluationSet(annotations)
        self.loader = data_loader(dataset, collate_evaluation, workers, config.device, batch_sampler=batches)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, indices in guarded(self.loader):
            images = images.to(self.device, non_blocking=True)
            yield normalise(images) if self.normalised else images, indices

    def close(self) -> None:
        """Ends the worker processes."""
        end_workers(self.loader._iterator)
