"""Ranks as threads of one process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch


class Ranks:
    """Threads in the role of ranks, with the methods of `Processes` that `evaluate` and `predict` call."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size)
        self.values = [None] * world_size
        self.message = None

    def rank(self, number: int) -> SimpleNamespace:
        def gather(value, *, long_timeout):
            self.values[number] = value
            self.barrier.wait(60)
            return list(self.values) if number == 0 else None

        def broadcast_object(value=None):
            if number == 0:
                self.message = value
            self.barrier.wait(60)
            return self.message

        def scatter(values=None):
            return broadcast_object(values)[number]

        return SimpleNamespace(
            rank=number, world_size=self.world_size, device=torch.device("cpu"), gather=gather, scatter=scatter,
            broadcast_object=broadcast_object,
        )  # fmt: skip

    def all_do(self, work: Callable) -> list:
        """What `work(processes)` returns on each rank."""
        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(work, map(self.rank, range(self.world_size)), timeout=120))
