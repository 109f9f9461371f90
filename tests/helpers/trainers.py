"""Trainers with the default settings, and a count of the values that a step reads from the device."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from src.runtime.distributed import Processes
from src.training.optimizer import make_optimizer
from src.training.step import Trainer


def make_trainer(model: nn.Module, *, device="cpu", half=False, weight_decay=5e-4, **options) -> Trainer:
    """A Trainer on one process."""
    optimizer = make_optimizer(model, momentum=0.9, weight_decay=weight_decay)
    return Trainer(model, optimizer, Processes.single(torch.device(device)), amp=half, **options)


class ScalarReads(TorchDispatchMode):
    """Counts how often the host reads a value from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))
