"""A whole training run: epochs, evaluations and checkpoints, from wherever it stands to its end."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from src.data.pipelines.loaders import TrainLoader
from src.report.report import Report
from src.report.run_folder import BEST, LAST
from src.runtime.distributed import Processes
from src.runtime.errors import SigtermReceived
from src.runtime.preemption import GracefulShutdown
from src.training.checkpoint import Checkpoint, Identity, Position, save_run
from src.training.step import Schedule, Trainer, train_epoch

Evaluate = Callable[[int], tuple[float | None, dict[str, Any]]]


class Run:
    """Trains from a position to the end of the last epoch, evaluating and saving on the way."""

    def __init__(
        self,
        trainer: Trainer,
        loader: TrainLoader,
        schedule: Schedule,
        *,
        evaluate: Evaluate | None,
        evaluation_epochs: Iterable[int],
        identity: Identity,
        position: Position,
        output: Path,
        processes: Processes,
        stop: GracefulShutdown,
        report: Report,
    ) -> None:
        """evaluate(epoch): scores the network on all processes and tells the report.

        It gives mAP and what belongs to the network in best.pt, such as its score thresholds.
        None: it is never evaluated.
        """
        self.trainer = trainer
        self.loader = loader
        self.schedule = schedule
        self.evaluate = evaluate
        self.evaluation_epochs = frozenset(evaluation_epochs if evaluate else ())
        self.identity = identity
        self.position = position
        position.length = len(loader)
        self.output = output
        self.processes = processes
        self.stop = stop
        self.report = report
        self.findings: dict[str, Any] = {}  # of the last evaluation, for best.pt
        self.images = 0  # trained on by this process group since it started
        self.seconds = 0.0  # of training, evaluations left out

    @property
    def images_per_second(self) -> float:
        """The average since this process group started; 0 when it has not trained."""
        return self.images / self.seconds if self.seconds else 0.0

    def train(self, epochs: int) -> None:
        """Goes on until `epochs` are done.

        Raises TrainingBreakdownError, or Terminated after SIGTERM; the checkpoint then says where to go on.
        """
        while self.position.epoch < epochs:
            evaluate = self.evaluate if self.position.epoch in self.evaluation_epochs else None
            with self.stop.defer_sigterm():
                if self._train_epoch():
                    raise SigtermReceived
                if evaluate is None:
                    self._end_epoch(improved=False)
            if evaluate is not None:
                improved = self._evaluate(evaluate)
                with self.stop.defer_sigterm():
                    self._end_epoch(improved)

    def stopped_by(self) -> str:
        """Says where SIGTERM ended `train`, and what is left of the run."""
        position, last = self.position, self.output / LAST
        where = f"in epoch {position.epoch} after {position.within} of its {position.length} iterations"
        then = f"--resume continues from {last}" if last.exists() else "nothing has been saved yet"
        return f"Stopped by SIGTERM {where}; {then}"

    def _end_epoch(self, improved: bool) -> None:
        """Moves on to the next epoch and saves; the best network too where it has improved."""
        self.position.epoch, self.position.within = self.position.epoch + 1, 0
        if improved:  # before last.pt, which knows of it
            self._save(BEST)
        self._save(LAST)

    def _train_epoch(self) -> bool:
        """Trains to the end of the epoch; True where a scheduler's notice ended it before."""
        position = self.position
        epoch, remaining = position.epoch, len(self.loader) - position.within
        if remaining <= 0:  # continued between an epoch and its evaluation
            return False
        self.report.begin_epoch(epoch, len(self.loader), position.within)
        self.loader.set_epoch(epoch, position.within)
        result = train_epoch(
            self.trainer,
            self.loader,
            self.schedule,
            epoch=epoch,
            first_iteration=position.iteration,
            start=position.within,
            stop=self.stop,
            report=self.report,
        )
        position.iteration += result.iterations - position.within
        position.within = result.iterations
        self.images += result.images
        self.seconds += result.seconds
        if position.within == position.length:
            self.report.end_epoch(
                epoch=epoch,
                seconds=result.seconds,
                images_per_second=result.images / result.seconds,
                average_images_per_second=self.images_per_second,
            )
        if result.stopped or epoch in self.evaluation_epochs:  # an evaluation may be cut short
            self._save(LAST)
        return result.stopped

    def _evaluate(self, evaluate: Evaluate) -> bool:
        """Scores the network; True where it is better than ever before."""
        self.processes.share_buffers(self.trainer.model)
        position = self.position
        (position.last_map, self.findings), position.evaluated = evaluate(position.epoch), True
        if position.last_map is None or (position.best_map is not None and position.last_map <= position.best_map):
            return False
        position.best_map = position.last_map
        return True

    def _save(self, name: str) -> None:
        """Writes a checkpoint on rank 0 with every rank's share of it."""
        self.processes.share_buffers(self.trainer.model)
        pipeline = self.processes.gather(self.loader.state_dict())
        if pipeline is not None:  # on rank 0
            trainer = self.trainer
            checkpoint = Checkpoint(
                model=trainer.model.state_dict(),
                optimizer=trainer.optimizer.state_dict(),
                scaler=trainer.scaler_state(),
                pipeline=pipeline,
                position=self.position,
                identity=self.identity,
            )
            save_run(self.output / name, checkpoint, self.findings if name == BEST else {})
        self.processes.broadcast_object()
