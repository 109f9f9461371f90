"""DataLoader pipelines: training without DALI (`--data_pipeline no_dali`) and evaluation.

A worker reads, decodes, crops, resizes and flips (uint8 out); the device does the rest for the whole batch.
All random numbers derive from (seed, epoch, position in the epoch): they do not depend on the number of workers, and a
resumed run needs only its position.
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
from src.data.pipelines.workers import CheckedLoader
from src.runtime.distributed import Shard
from src.runtime.errors import UserError


class Sample(NamedTuple):
    """A training sample: its place in the epoch, and its image."""

    epoch: int
    position: int  # in the epoch, counted over all processes
    image: int  # index in the annotations


def epoch_order(images: np.ndarray, *, seed: int, epoch: int, total: int) -> np.ndarray:
    """An epoch's images in shuffled order, repeated from the start up to `total`; the same on every process."""
    return np.resize(np.random.default_rng([seed, epoch]).permutation(images), total)


class EpochSampler:
    """This process's batches of an epoch: lists of Sample, every batch full.

    All processes shuffle the images alike, repeat them from the start up to full batches, and take every n-th.
    """

    def __init__(self, images: np.ndarray, *, batch_size: int, seed: int, shard: Shard) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.shard = shard
        self.epoch = 0
        self.start = 0  # the first iteration

    def __len__(self) -> int:
        return -(-len(self.images) // (self.batch_size * self.shard.world_size))

    def __iter__(self) -> Iterator[list[Sample]]:
        total = len(self) * self.batch_size * self.shard.world_size
        order = epoch_order(self.images, seed=self.seed, epoch=self.epoch, total=total)
        positions = np.arange(self.shard.rank, total, self.shard.world_size).reshape(-1, self.batch_size)
        for batch in positions[self.start :]:
            yield [Sample(self.epoch, int(position), int(order[position])) for position in batch]


class TrainingSet(Dataset):
    """Augmented samples, from arrays only: forked workers would copy Python objects page by page."""

    def __init__(self, annotations: Annotations, *, seed: int, augment: bool) -> None:
        self.annotations = annotations
        self.seed = seed
        self.augment = augment

    def __getitem__(self, sample: Sample) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray] | UserError:
        """Image [3, 300, 300] uint8, colour [3, 4], boxes [G, 4] ltrb in 0..1, labels [G].

        Returns a UserError instead of raising it: DataLoader would put it inside the worker's traceback.
        """
        try:
            image = read_image(self.annotations, sample.image)
        except UserError as error:
            return error
        boxes, labels = self.annotations.targets(sample.image)
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
    """A HostBatch of samples of TrainingSet; the first UserError among them, if any."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images, colour, boxes, labels = zip(*samples, strict=True)
    counts = torch.tensor([len(one) for one in labels])
    return HostBatch(
        images=_stack(images),
        colour=torch.from_numpy(np.stack(colour)),
        boxes=torch.from_numpy(np.concatenate(boxes)),
        labels=torch.from_numpy(np.concatenate(labels)),
        image_index=torch.arange(len(samples)).repeat_interleave(counts),
    )


def _stack(images: tuple[Tensor, ...]) -> Tensor:
    """Images [3, 300, 300] in any memory format, stacked to [N, 3, 300, 300], channels last."""
    stacked = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, memory_format=torch.channels_last)
    for slot, image in zip(stacked, images, strict=True):
        slot.copy_(image)
    return stacked


class TorchTrainLoader:
    """The training loader of `--data_pipeline no_dali`; see `loaders.TrainLoader`."""

    def __init__(self, annotations: Annotations, config: LoaderConfig, *, augment: bool = True) -> None:
        self.warnings: list[str] = []
        self.make_batch = BatchMaker(config.dtype).to(config.device)
        images = annotations.with_boxes()
        self.num_images = len(images)
        self.sampler = EpochSampler(images, batch_size=config.batch_size, seed=config.seed, shard=config.shard)
        training_set = TrainingSet(annotations, seed=config.seed, augment=augment)
        self.loader = CheckedLoader(
            training_set, collate_training, config.num_workers, config.device, batch_sampler=self.sampler
        )

    def __len__(self) -> int:
        """Iterations an epoch, the same on every process."""
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_iteration: int = 0) -> None:
        """Moves the start of the next pass to `start_iteration` of `epoch`, without decoding earlier images."""
        self.sampler.epoch = epoch
        self.sampler.start = start_iteration

    def __iter__(self) -> Iterator[Batch]:
        for host in self.loader:
            yield self.make_batch(host)

    def state_dict(self) -> dict:
        """Empty: `set_epoch` suffices to resume."""
        return {}

    def load_state_dict(self, state: dict, *, epoch: int, iteration: int) -> None:
        """Does nothing: `set_epoch` suffices to resume."""

    def close(self) -> None:
        """Ends the worker processes."""
        self.loader.close()


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
    """Images [N, 3, 300, 300] uint8 and indices [N] int64; the first UserError among the samples, if any."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images, indices = zip(*samples, strict=True)
    return _stack(images), torch.tensor(indices)


class EvaluationLoader:
    """Batches of this process's images, each exactly once: (images [N, 3, 300, 300], indices [N] in the annotations).

    The images are normalised, or uint8 with `normalised` off.  The workers stay for the next pass, until `close`.
    """

    def __init__(self, annotations: Annotations, config: LoaderConfig, *, normalised: bool = True) -> None:
        self.device = config.device
        self.normalised = normalised
        indices = range(config.shard.rank, len(annotations), config.shard.world_size)
        check_headers(annotations, indices)
        starts = range(0, len(indices), config.batch_size)
        batches = [list(indices[start : start + config.batch_size]) for start in starts]
        workers = min(config.num_workers, len(batches))
        dataset = EvaluationSet(annotations)
        self.loader = CheckedLoader(dataset, collate_evaluation, workers, config.device, batch_sampler=batches)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, indices in self.loader:
            images = images.to(self.device, non_blocking=True)
            yield normalise(images) if self.normalised else images, indices

    def close(self) -> None:
        """Ends the worker processes."""
        self.loader.close()
