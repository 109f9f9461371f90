"""Makes the loaders of `--data_pipeline`; imports DALI only if that pipeline is chosen."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from src.data.annotations.coco import Annotations
from src.data.pipelines.batch import Batch
from src.data.pipelines.image_reader import check_headers
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import EvaluationLoader, TorchTrainLoader
from src.data.pipelines.workers import allow_open_files
from src.runtime.errors import DataError

PIPELINES = ("dali", "no_dali")


class TrainLoader(Protocol):
    """The interface of both pipelines' training loaders.

    Iterating gives full batches on the device: the last batch of an epoch repeats images.
    """

    num_images: int  # in an epoch, of all processes together
    warnings: list[str]  # of `load_state_dict`

    def __len__(self) -> int:
        """Iterations per epoch, the same on every process."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def set_epoch(self, epoch: int, start_iteration: int = 0) -> None:
        """Moves the start of the next pass to `start_iteration` of `epoch`."""
        ...

    def state_dict(self) -> dict:
        """The state after the last batch, for a checkpoint: plain values."""
        ...

    def load_state_dict(self, state: dict, *, epoch: int, iteration: int) -> None:
        """Restores `state`, taken in `epoch` after `iteration` iterations.  Raises UserError if it cannot."""
        ...

    def close(self) -> None:
        """Ends worker processes or threads."""
        ...


class DecodeCheck(Protocol):
    """Finds pictures that a pipeline cannot decode, by decoding them with it."""

    messages: list[str]  # printed by the decoder; each begins with the file's path

    def find_errors(self, indices: Sequence[int]) -> list[DataError]:
        """An error for each of these images that the pipeline cannot decode."""
        ...


def make_decode_check(
    pipeline: str, annotations: Annotations, *, device: torch.device, num_threads: int
) -> DecodeCheck | None:
    """The check of the pipeline's decoder; None if the pipeline decodes by `read_image`, which the caller checks."""
    if pipeline == "no_dali":
        return None
    from src.data.pipelines.dali_decode_check import DaliDecodeCheck

    return DaliDecodeCheck(annotations, device=device, num_threads=num_threads)


def make_train_loader(pipeline: str, annotations: Annotations, config: LoaderConfig) -> TrainLoader:
    """The training loader of `--data_pipeline`.

    Raises UserError for images that the pipelines would read differently, and if DALI cannot be used.
    """
    check_headers(annotations, annotations.with_boxes()[config.shard.rank :: config.shard.world_size])
    if pipeline == "no_dali":
        return TorchTrainLoader(annotations, config)
    allow_open_files(config.num_workers)  # now, although only the evaluation later starts so many worker processes
    from src.data.pipelines.dali_pipeline import DaliTrainLoader

    return DaliTrainLoader(annotations, config)


__all__ = [
    "PIPELINES", "DecodeCheck", "EvaluationLoader", "LoaderConfig", "TrainLoader", "make_decode_check",
    "make_train_loader",
]  # fmt: skip
