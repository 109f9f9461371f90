"""Notices losses that are not finite, without a wait for the device in each iteration."""

import torch
from torch import Tensor

from src.runtime.distributed import Processes
from src.runtime.errors import DivergenceError

LOG_INTERVAL = 20  # iterations between readings of the loss
NEVER = 2**62  # stands for "no iteration"
ADVICE = "lower --learning-rate or lengthen --warmup; nothing was saved since"


class NonFiniteLossMonitor:
    """Records on the device the first iteration whose loss is not finite, so that no iteration waits for the device."""

    def __init__(self, processes: Processes, device: torch.device, *, tolerate_one: bool) -> None:
        """tolerate_one: loss scaling skips an overflow, so only the second bad reading in a row ends the run."""
        self.processes = processes
        self.tolerate_one = tolerate_one
        self._tolerated_at: int | None = None  # iteration of the last bad reading
        self._first = torch.full((), NEVER, dtype=torch.int64, device=device)

    def observe(self, loss: Tensor, iteration: int) -> None:
        """Records the iteration if the loss is not finite; does not synchronise with the device."""
        bad = ~torch.isfinite(loss) & (self._first == NEVER)
        self._first = torch.where(bad, iteration, self._first)

    def check(self, *, epoch: int, iteration: int, learning_rate: float) -> None:
        """Reads the record, after `iteration`; all ranks call this together and raise DivergenceError together."""
        first = -self.processes.all_reduce_max(-int(self._first))  # the earliest of all ranks
        if first == NEVER:
            # The reading at an epoch's end may come one iteration after a bad one: too early to prove a recovery.
            if self._tolerated_at is not None and iteration - self._tolerated_at >= LOG_INTERVAL:
                self._tolerated_at = None
            return
        if self.tolerate_one and self._tolerated_at is None:
            self._tolerated_at = iteration
            self._first.fill_(NEVER)
            return
        raise DivergenceError(
            f"the loss is not finite since epoch {epoch}, iteration {first} (learning rate {learning_rate:.3g}): "
            + ADVICE
        )
