"""What a loader is configured by."""

from dataclasses import dataclass

import torch

from src.runtime.distributed import Shard
from src.runtime.precision import image_dtype

ALL_IMAGES = Shard(0, 1)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a process loads images, for training and for evaluation."""

    batch_size: int  # images an iteration of this process
    num_workers: int  # worker processes (no_dali and evaluation) or threads (dali)
    device: torch.device  # on which the batches arrive
    amp: bool = False  # half precision
    seed: int = 0  # of everything random; an evaluation has nothing random
    shard: Shard = ALL_IMAGES  # this process's part of the images

    @property
    def dtype(self) -> torch.dtype:
        """The type of a training batch's images."""
        return image_dtype(self.device, self.amp)
