"""A whole training run: epochs, evaluations and checkpoints, from wherever it stands to its end."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from src.data.loaders import TrainLoader
from src.distributed import Processes, StopNotice, Terminated
from src.errors import UserError
from src.report.report import NullReport, Report
from src.weights.detector import first_difference
from src.weights.files import load_checkpoint

from .checkpoint import save_checkpoint
from .step import Schedule, Trainer, train_epoch

LAST, BEST = "last.pt", "best.pt"
TRAINING_DATA = "the training data"  # one of the settings


@dataclass
class Position:
    """Where a run stands: what a checkpoint needs beside weights and pipeline to continue exactly."""

    epoch: int = 0  # the one it is in
    within: int = 0  # iterations done in that epoch
    length: int = 0  # iterations of an epoch
    iteration: int = 0  # iterations done since the run's start
    best_map: float | None = None
    last_map: float | None = None
    evaluated: bool = False  # whether there has been an evaluation at all


@dataclass(frozen=True)
class Identity:
    """What a run is about; a checkpoint carries it, so that continuing under other flags is noticed."""

    backbone: str
    categories: list  # [id, name] in the order of the labels 1..K
    seed: int
    settings: dict = field(default_factory=dict)  # flags that alter the run, and the data's digest, by name


class Run:
    """Trains from a position to the end of the last epoch, evaluating and saving on the way."""

    def __init__(
        self,
        trainer: Trainer,
        loader: TrainLoader,
        schedule: Schedule,
        *,
        evaluate: Callable[[int], dict | None],
        evaluation_epochs: Iterable[int],
        identity: Identity,
        position: Position,
        output: Path,
        processes: Processes,
        stop: StopNotice,
        report: Report | NullReport,
    ) -> None:
        """evaluate(epoch): scores the network on all processes, gives the 12 figures and tells the report."""
        self.trainer = trainer
        self.loader = loader
        self.schedule = schedule
        self.evaluate = evaluate
        self.evaluation_epochs = frozenset(evaluation_epochs)
        self.identity = identity
        self.position = position
        position.length = len(loader)
        self.output = output
        self.processes = processes
        self.stop = stop
        self.report = report
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
            evaluated = self.position.epoch in self.evaluation_epochs
            with self.stop.deferred():
                if self._train_epoch():
                    raise Terminated
                if not evaluated:
                    self._end_epoch(improved=False)
            if evaluated:
                improved = self._evaluate()
                with self.stop.deferred():
                    self._end_epoch(improved)

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

    def _evaluate(self) -> bool:
        """Scores the network; True where it is better than ever before."""
        self.processes.share_buffers(self.trainer.model)
        position = self.position
        position.last_map, position.evaluated = self.evaluate(position.epoch)["mAP"], True
        if position.last_map is None or (position.best_map is not None and position.last_map <= position.best_map):
            return False
        position.best_map = position.last_map
        return True

    def _save(self, name: str) -> None:
        """Writes a checkpoint on rank 0 with every rank's share of it."""
        self.processes.share_buffers(self.trainer.model)
        pipeline = self.processes.gather(self.loader.state_dict())
        if self.processes.is_main:
            save_checkpoint(self.output / name, self._state(pipeline))
        self.processes.broadcast_object()

    def _state(self, pipeline: list[dict]) -> dict:
        trainer = self.trainer
        return {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "pipeline": pipeline,
            **asdict(self.position),
            **asdict(self.identity),
        }


def read_run(path: Path, identity: Identity) -> dict:
    """The checkpoint of a run that can be continued as `identity`.

    Raises UserError where it holds no run, or one of another backbone or other categories.
    """
    state = load_checkpoint(path)
    missing = [name for name in (*Position.__dataclass_fields__, *Identity.__dataclass_fields__) if name not in state]
    if missing:
        raise UserError(f"{path}: holds weights but no run to continue (no {missing[0]}): use --checkpoint {path}")
    if state["backbone"] != identity.backbone:
        raise UserError(f"{path}: is a run of --backbone {state['backbone']}, not {identity.backbone}")
    if state["categories"] != identity.categories:
        there, here = (
            [f"{name!r} (id {id})" for id, name in side] for side in (state["categories"], identity.categories)
        )
        raise UserError(
            f"{path}: is a run on other categories than the data's ({first_difference(there, here)}): to train these "
            f"from its weights use --checkpoint {path}"
        )
    return state


def changed_settings(state: dict, identity: Identity) -> list[str]:
    """The settings that differ from those a checkpoint was written under, as "name (old -> new)"."""
    before = state["settings"]
    changed = [name for name, value in identity.settings.items() if before.get(name) != value]
    return [
        name if name == TRAINING_DATA else f"{name} ({before.get(name)} -> {identity.settings[name]})"
        for name in changed
    ]


def restore_position(state: dict, schedule: Schedule, length: int) -> Position:
    """The position that a checkpoint holds, counted in this run's iterations, `length` of them an epoch.

    Where iterations have other images now, inside an epoch stays inside one.
    """
    position = Position(**{name: state[name] for name in Position.__dataclass_fields__})
    if position.within == position.length:
        position.within = length
    elif position.within:
        old_images = state["settings"]["--batch-size"] * state["settings"]["the number of processes"]
        position.within = min(max(1, position.within * old_images // schedule.images), length - 1)
    position.length = length
    return position
