"""When a run does what: the learning rate of each iteration, the number of epochs, the epochs with an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REFERENCE_BATCH = 32  # images; --learning-rate is stated for it
DECAY = 0.1  # factor of the learning rate at each --multistep epoch


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate is a pure function of the epoch and the iteration, so continuing needs no state of it."""

    base_learning_rate: float  # for 32 images
    global_batch_size: int  # images an iteration, of all processes together
    warmup: int = 0  # iterations
    multistep: tuple[int, ...] = ()  # epochs
    epochs: int = 1
    evaluation_epochs: frozenset[int] = frozenset()  # all below `epochs`

    @property
    def peak(self) -> float:
        """The learning rate between the warm-up and the first multistep epoch."""
        return self.base_learning_rate * self.global_batch_size / REFERENCE_BATCH

    def learning_rate(self, epoch: int, iteration: int) -> float:
        """Rises linearly from 0 over the warm-up; falls to a tenth at the start of each multistep epoch.

        iteration: counted from the run's start.
        """
        decays = sum(epoch >= step for step in self.multistep)
        rate = self.peak * DECAY**decays
        return rate * iteration / self.warmup if iteration < self.warmup else rate

    def summary(self, iterations_per_epoch: int) -> str:
        """The line that a run prints of its schedule."""
        return (
            f"Iterations: {self.epochs * iterations_per_epoch} ({iterations_per_epoch} an epoch, of "
            f"{self.global_batch_size} images), learning rate: {self.peak:.4g}"
        )


def schedule_warnings(
    schedule: Schedule, iterations_per_epoch: int, unreached_evaluations: Sequence[int], missing_checkpoint: Path | None
) -> list[str]:
    """Warnings about flags that may be mistakes.

    unreached_evaluations: epochs given with --evaluation that the run does not reach.
    missing_checkpoint: what --resume would have continued.
    """
    warnings = [
        f"--evaluation {epoch}: not reached, the epochs are 0 to {schedule.epochs - 1} (--epochs)"
        for epoch in unreached_evaluations
    ]
    if missing_checkpoint is not None:
        warnings.append(f"--resume: there is no {missing_checkpoint}, so the run starts afresh")
    iterations = schedule.epochs * iterations_per_epoch
    if schedule.warmup > iterations:
        rate = f"{schedule.learning_rate(0, iterations - 1):.3g} of {schedule.peak:.3g}"
        warnings.append(
            f"--warmup {schedule.warmup}: the run has {iterations} iterations, so the learning rate gets to {rate}"
        )
    elif 4 * schedule.warmup > iterations:
        warnings.append(
            f"--warmup {schedule.warmup}: takes {schedule.warmup / iterations:.0%} of the run's {iterations} iterations"
            f"; give {iterations // 4} or fewer, or raise --epochs"
        )
    first_decay = min((epoch for epoch in schedule.multistep if epoch < schedule.epochs), default=None)
    if first_decay is not None and first_decay * iterations_per_epoch < schedule.warmup <= iterations:
        warnings.append(
            f"--multistep {first_decay}: the rate falls after {first_decay * iterations_per_epoch} iterations, before "
            f"the warm-up of {schedule.warmup} is over; raise --multistep or lower --warmup"
        )
    return warnings
