"""DataLoader pipelines: training without DALI (`--data_pipeline no_dali`) and evaluation.

A worker reads, decodes, crops, resizes and flips (uint8 out); the device does what needs the whole batch.
Everything random follows from (seed, epoch, position in the epoch), so it does not depend on the number of workers,
and a run is continued from its position alone.
"""

import atexit
import errno
import multiprocessing
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from src.errors import UserError

from .augment import FLIP_PROBABILITY, NO_COLOUR, random_colour_matrix, random_crop
from .batch import Batch, BatchMaker, HostBatch, normalise
from .coco import Annotations
from .images import read_image, resize

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches a worker prepares ahead

Shared = TypeVar("Shared", bound=tuple[Tensor, ...])


class Sample(NamedTuple):
    """Where a training sample stands and which image it shows."""

    epoch: int
    position: int  # in the epoch, over all processes
    image: int  # its index in the annotations


class EpochSampler:
    """This process's batches of an epoch: lists of Sample, every batch full.

    The epoch's order is shuffled over all processes, lengthened by its own beginning to whole batches, and dealt out.
    """

    def __init__(self, images: np.ndarray, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0  # the first iteration to give

    def __len__(self) -> int:
        return -(-len(self.images) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Sample]]:
        total = len(self) * self.batch_size * self.world_size
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.images)
        order = np.resize(order, total)
        positions = np.arange(self.rank, total, self.world_size).reshape(-1, self.batch_size)
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
    return _share(batch)


def _stack(images: tuple[Tensor, ...]) -> Tensor:
    """Images [3, 300, 300] of any memory layout as [N, 3, 300, 300], channels last."""
    stacked = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, memory_format=torch.channels_last)
    for slot, image in zip(stacked, images, strict=True):
        slot.copy_(image)
    return stacked


class TorchTrainLoader:
    """The training loader of `--data_pipeline no_dali`; see design: train loader."""

    def __init__(
        self,
        annotations: Annotations,
        *,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        augment: bool = True,
    ) -> None:
        """batch_size: images an iteration of this process.  dtype: of the images it gives."""
        self.warnings: list[str] = []
        self.make_batch = BatchMaker(dtype).to(device)
        images = annotations.with_boxes()
        self.num_images = len(images)
        self.sampler = EpochSampler(images, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        training_set = TrainingSet(annotations, seed=seed, augment=augment)
        self.loader = _data_loader(training_set, collate_training, num_workers, device, batch_sampler=self.sampler)

    def __len__(self) -> int:
        """Iterations an epoch, the same on every process."""
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_iteration: int = 0) -> None:
        """The next pass is that of `epoch` from its iteration `start_iteration` on; nothing before is decoded."""
        self.sampler.epoch = epoch
        self.sampler.start = start_iteration

    def __iter__(self) -> Iterator[Batch]:
        for host in _guarded(self.loader):
            yield self.make_batch(host)

    def state_dict(self) -> dict:
        """Empty: the position in the run is all that this pipeline needs."""
        return {}

    def load_state_dict(self, state: dict, *, epoch: int, iteration: int) -> None:
        """Nothing to take over: `set_epoch` continues anywhere."""

    def close(self) -> None:
        """Ends the worker processes."""
        _end_workers(self.loader._iterator)


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
    return _share((_stack(images), torch.tensor(indices)))


class EvaluationLoader:
    """This process's share of the images, each exactly once: (images [N, 3, 300, 300] normalised, indices [N])."""

    def __init__(
        self,
        annotations: Annotations,
        *,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.device = device
        share = range(rank, len(annotations), world_size)
        batches = [list(share[start : start + batch_size]) for start in range(0, len(share), batch_size)]
        workers = min(num_workers, len(batches))
        self.loader = _data_loader(
            EvaluationSet(annotations), collate_evaluation, workers, device, batch_sampler=batches, persistent=False
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, indices in _guarded(self.loader):
            yield normalise(images.to(self.device, non_blocking=True)), indices


def _data_loader(
    dataset: Dataset,
    collate: Callable[[list], object],
    workers: int,
    device: torch.device,
    *,
    batch_sampler: Iterable[list],
    persistent: bool = True,
) -> DataLoader:
    # --num-workers is the user's word; torch's advice on it would stand in every log.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    with _explained(workers):
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=persistent and workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_WorkerSignals() if workers else None,
        )


def _end_workers(batches: Iterator | None) -> None:
    """Ends a loader's workers now: once the garbage collector has it, torch waits 10 s for each of them in vain."""
    if batches is not None and hasattr(batches, "_shutdown_workers"):  # not without workers
        batches._shutdown_workers()


class _WorkerSignals:
    """Sets a worker's signals: one to the whole process group must not end it, as the run finishes its iteration.

    Only once the run itself leaves does SIGTERM end the worker.
    """

    def __init__(self) -> None:
        self._leaving = multiprocessing.Event()
        # Runs before multiprocessing ends the workers that are left, since that was registered earlier.
        atexit.register(self._leaving.set)

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._leaving.is_set():
            os._exit(128 + number)


def _share(batch: Shared) -> Shared | UserError:
    """Moves a worker's batch into shared memory; a UserError where that is too small.

    Here, and not in the queue's thread, which would print the failure and leave the run waiting.
    """
    worker = get_worker_info()
    if worker is not None:
        try:
            for part in batch:
                part.share_memory_()
        except RuntimeError:
            return _too_small(worker.num_workers)
    return batch


def _too_small(workers: int) -> UserError:
    size = shutil.disk_usage(SHARED_MEMORY).total / 2**20
    return UserError(
        f"{SHARED_MEMORY} ({size:.1f} MiB) is too small for {workers} worker processes: enlarge it (docker run "
        "--shm-size=1g), or use fewer workers or none (--num-workers 0)"
    )


def _guarded(loader: DataLoader) -> Iterator:
    """The loader's batches; raises a user's error that a worker returned or that killed it."""
    batches = None
    try:
        with _explained(loader.num_workers):
            batches = iter(loader)
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
    except Exception:
        _end_workers(batches)
        raise


@contextmanager
def _explained(workers: int) -> Iterator[None]:
    """Turns errors of making and using worker processes into a UserError, where a user can do something about them."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = str(error)
        if "Bus error" in text or "shared memory" in text or getattr(error, "errno", None) == errno.ENOSPC:
            raise _too_small(workers) from None
        if "killed by signal" in text or "exited unexpectedly" in text:
            raise UserError(
                f"one of {workers} worker processes was killed ({text.splitlines()[0].rstrip('. ')}): where memory is "
                "short, use fewer workers or none (--num-workers 0)"
            ) from None
        raise
