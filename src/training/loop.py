"""The training loop: trains, evaluates and saves, from where a run stands to its end."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, NamedTuple

import torch

from src.data.pipelines.batch import Batch
from src.data.pipelines.loaders import TrainLoader
from src.report.metrics import IterationMetrics
from src.report.report import Report, RunContext
from src.report.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT
from src.runtime.errors import DivergenceError, SigtermReceived
from src.runtime.preemption import GracefulShutdown
from src.ssd.loss import LossParts
from src.training.checkpoint import Checkpoint, Position, RunFingerprint, save_run
from src.training.divergence import LOG_INTERVAL
from src.training.schedule import Schedule
from src.training.step import Trainer

# Scores the network on all ranks after an epoch and reports the metrics.  Gives mAP (None: not defined) and what
# best.pt keeps with the network, such as its score thresholds.
Evaluate = Callable[[int], tuple[float | None, dict[str, Any]]]


class TrainingLoop:
    """Trains from `position` to the end of the last epoch; evaluates and saves on the way."""

    def __init__(
        self,
        trainer: Trainer,
        loader: TrainLoader,
        schedule: Schedule,
        *,
        position: Position,
        fingerprint: RunFingerprint,
        context: RunContext,
    ) -> None:
        """position: updated in place as the run advances."""
        self.trainer = trainer
        self.loader = loader
        self.schedule = schedule
        self.position = position
        position.iterations_per_epoch = len(loader)
        self.fingerprint = fingerprint
        self.processes, self.report, self.output = context.processes, context.report, context.output
        self.evaluation_state: dict[str, Any] = {}  # of the last evaluation, for best.pt
        self.num_images = 0  # trained on since this process group started
        self.seconds = 0.0  # of training, without evaluations

    @property
    def images_per_second(self) -> float:
        """The average since this process group started; 0 before it has trained."""
        return self.num_images / self.seconds if self.seconds else 0.0

    def run(self, evaluate: Evaluate | None) -> None:
        """Trains until the last epoch is done.  evaluate: None if no epoch of the schedule has an evaluation.

        Raises DivergenceError, or SigtermReceived on all ranks if any rank received SIGTERM.  The run can then be
        continued from last.pt, if it was written.
        """
        position, epochs = self.position, self.schedule.epochs
        if position.epoch >= epochs:
            self.report.note(f"Nothing is left to train: {position.epoch} epochs are done (--epochs {epochs})")
        with closing(GracefulShutdown(self.processes)) as shutdown:
            try:
                while position.epoch < epochs:
                    evaluate_epoch = evaluate if position.epoch in self.schedule.evaluation_epochs else None
                    with shutdown.defer_sigterm():  # SIGTERM ends training only after last.pt is saved
                        self._train_epoch(shutdown, save=evaluate_epoch is not None)
                        if evaluate_epoch is None:
                            self._finish_epoch(improved=False)
                            continue
                    improved = self._evaluate(evaluate_epoch)  # SIGTERM ends it at once: last.pt is saved
                    with shutdown.defer_sigterm():
                        self._finish_epoch(improved)
            except DivergenceError:
                self.report.mark_failed()
                raise
            except SigtermReceived:
                self.report.note(self._stopped_by_sigterm())
                raise

    def _train_epoch(self, shutdown: GracefulShutdown, *, save: bool) -> None:
        """Trains to the end of the epoch and, if `save`, writes last.pt; raises SigtermReceived if it stops earlier."""
        position = self.position
        if position.iteration_in_epoch >= len(self.loader):  # resumed between an epoch and its evaluation
            return
        self.report.begin_epoch(position.epoch, len(self.loader), position.iteration_in_epoch)
        self.loader.set_epoch(position.epoch, position.iteration_in_epoch)
        result = train_epoch(
            self.trainer, self.loader, self.schedule, position=position, shutdown=shutdown, report=self.report
        )
        self.num_images += result.images
        self.seconds += result.seconds
        if position.iteration_in_epoch == position.iterations_per_epoch:
            self.report.end_epoch(
                epoch=position.epoch,
                seconds=result.seconds,
                images_per_second=result.images / result.seconds,
                average_images_per_second=self.images_per_second,
            )
        if result.stopped or save:
            self._save(LAST_CHECKPOINT)
        if result.stopped:
            raise SigtermReceived

    def _evaluate(self, evaluate: Evaluate) -> bool:
        """Scores the network; returns whether its mAP is the best of the run so far."""
        self.processes.broadcast_buffers(self.trainer.model)
        position = self.position
        position.last_map, self.evaluation_state = evaluate(position.epoch)
        position.evaluated = True
        if position.last_map is None or (position.best_map is not None and position.last_map <= position.best_map):
            return False
        position.best_map = position.last_map
        return True

    def _finish_epoch(self, improved: bool) -> None:
        """Moves on to the next epoch and saves.  improved: write best.pt, too."""
        self.position.epoch += 1
        self.position.iteration_in_epoch = 0
        if improved:  # best.pt first, because last.pt records its mAP
            self._save(BEST_CHECKPOINT)
        self._save(LAST_CHECKPOINT)

    def _save(self, name: str) -> None:
        """Writes a checkpoint on rank 0, with the pipeline state of every rank."""
        self.processes.broadcast_buffers(self.trainer.model)
        loader_states = self.processes.gather(self.loader.state_dict())
        if loader_states is not None:  # on rank 0
            trainer = self.trainer
            checkpoint = Checkpoint(
                model=trainer.model.state_dict(),
                optimizer=trainer.optimizer.state_dict(),
                scaler=trainer.scaler_state(),
                pipeline=loader_states,
                position=self.position,
                fingerprint=self.fingerprint,
            )
            save_run(self.output / name, checkpoint, self.evaluation_state if name == BEST_CHECKPOINT else {})
        self.processes.broadcast_object()  # the other ranks wait for the file

    def _stopped_by_sigterm(self) -> str:
        """The line that says where SIGTERM ended the run and how to continue it."""
        position, last = self.position, self.output / LAST_CHECKPOINT
        then = f"--resume continues from {last}" if last.exists() else "nothing has been saved yet"
        return (
            f"Stopped by SIGTERM in epoch {position.epoch} after {position.iteration_in_epoch} of its "
            f"{position.iterations_per_epoch} iterations; {then}"
        )


class EpochResult(NamedTuple):
    """What `train_epoch` did."""

    seconds: float
    images: int  # trained on, by all processes together
    stopped: bool  # a rank received SIGTERM


def train_epoch(
    trainer: Trainer,
    batches: Iterable[Batch],
    schedule: Schedule,
    *,
    position: Position,
    shutdown: GracefulShutdown,
    report: Report,
) -> EpochResult:
    """Trains on `batches`, the rest of the epoch at `position`, and updates `position` in place.

    Raises DivergenceError if the loss or, at the end, a weight is not finite.
    """
    trainer.training_model.train()
    skipped_before = trainer.skipped_steps()
    began = logged_at = time.perf_counter()
    done = done_at_last_log = 0
    stopped = False
    for batch in batches:
        iteration = position.iteration
        rate = schedule.learning_rate(position.epoch, iteration)
        losses = trainer.step(batch, rate)
        trainer.loss_monitor.observe(losses.localisation + losses.label, iteration)
        done += 1
        position.iteration += 1
        position.iteration_in_epoch += 1
        report.advance(schedule.global_batch_size)
        if iteration % LOG_INTERVAL == 0:
            trainer.loss_monitor.check(epoch=position.epoch, iteration=iteration, learning_rate=rate)
            now = time.perf_counter()
            speed = (done - done_at_last_log) * schedule.global_batch_size / (now - logged_at)
            report.log_iteration(position.epoch, iteration, _read_metrics(trainer, losses, rate, speed))
            done_at_last_log, logged_at = done, now
        if shutdown.poll_all_ranks():
            stopped = True
            break
    if done:
        trainer.loss_monitor.check(epoch=position.epoch, iteration=iteration, learning_rate=rate)
        trainer.check_weights(epoch=position.epoch, iteration=iteration, learning_rate=rate)
        stopped = shutdown.finish_poll() or stopped
        skipped = trainer.skipped_steps() - skipped_before
        if skipped:
            report.note(f"Epoch {position.epoch:2d}: {skipped} steps skipped because float16 gradients overflowed")
    return EpochResult(time.perf_counter() - began, done * schedule.global_batch_size, stopped)


def _read_metrics(trainer: Trainer, losses: LossParts, rate: float, images_per_second: float) -> IterationMetrics:
    localisation, label = torch.stack(losses).tolist()  # one wait for the device
    return IterationMetrics(
        loss=localisation + label,
        localisation_loss=localisation,
        label_loss=label,
        learning_rate=rate,
        images_per_second=images_per_second,
        loss_scale=trainer.scaler.get_scale(),
        skipped_steps=trainer.skipped_steps(),
    )
