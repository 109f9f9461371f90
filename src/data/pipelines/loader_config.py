"""The configuration of a data loader."""

from dataclasses import dataclass

import torch

from src.runtime.distributed import Shard
from src.runtime.precision import image_dtype

ALL_IMAGES = Shard(0, 1)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a process loads images, for training and for evaluation."""

    batch_size: int  # images per iteration of this process
    num_workers: int  # worker processes (no_dali and evaluation) or threads (dali)
    device: torch.device  # of the batches
    amp: bool = False  # automatic mixed precision (--fp16)
    seed: int = 0  # of order and augmentation; an evaluation has neither
    shard: Shard = ALL_IMAGES  # the part of the images that this process loads

    @property
    def dtype(self) -> torch.dtype:
        """Of a training batch's images."""
        return image_dtype(self.device, self.amp)
