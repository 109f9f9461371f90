"""What a run starts from: fresh or given weights, or the checkpoint of a run that it continues."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from src.data.annotations.coco import Category
from src.data.pipelines.loaders import TrainLoader
from src.report.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT, same_folder
from src.ssd.model import SSD300
from src.training.checkpoint import TRAINING_DATA_KEY, Checkpoint, Position, RunFingerprint, read_run
from src.training.schedule import Schedule
from src.training.step import Trainer
from src.weights.backbone import load_backbone_weights
from src.weights.detector import load_detector, load_weights
from src.weights.files import load_checkpoint

# The values of flags that a checkpoint does not hold because it is older than they are.
LEGACY_DEFAULTS = {"--compile": False, "--orientation": "stored", "--freeze-backbone": False}


class ResumedRun(NamedTuple):
    """The run that --resume continues."""

    file: Path
    checkpoint: Checkpoint


def read_resumed_run(resume: Path | bool | None, output: Path, fingerprint: RunFingerprint) -> ResumedRun | None:
    """The run that --resume continues; None for a new run, also if --resume names no file and last.pt is missing.

    Raises UserError as `read_run` does.
    """
    if isinstance(resume, Path):
        file = resume
    elif resume and (output / LAST_CHECKPOINT).exists():
        file = output / LAST_CHECKPOINT
    else:
        return None
    checkpoint = read_run(file, fingerprint)
    if not same_folder(file.parent, output) or not (output / BEST_CHECKPOINT).exists():
        # `output` lacks the run's best network, so the next evaluation writes one, whatever mAP was reached elsewhere.
        checkpoint.position.best_map = None
    return ResumedRun(file, checkpoint)


def load_starting_weights(
    model: SSD300,
    backbone: str,
    categories: Sequence[Category],
    *,
    resumed: ResumedRun | None,
    checkpoint: Path | None,
    backbone_weights: str,
) -> list[str]:
    """Loads the weights of `resumed`, else of `checkpoint`, else those that --backbone-weights names.

    Returns lines to print.  Raises UserError if the weights cannot be read or do not fit.
    """
    if resumed is not None:
        load_weights(model, resumed.checkpoint.model, source=resumed.file, new_classification_heads=False)
        return []
    if checkpoint is not None:
        return load_detector(model, load_checkpoint(checkpoint), categories, source=checkpoint)
    load_backbone_weights(model, backbone, backbone_weights)
    return []


def restore_run(
    trainer: Trainer,
    loader: TrainLoader,
    schedule: Schedule,
    *,
    fingerprint: RunFingerprint,
    resumed: Checkpoint | None,
    rank: int,
) -> tuple[Position, list[str]]:
    """Restores everything but the weights from `resumed`; where the run starts, and warnings."""
    if resumed is None:
        return Position(), []
    changed = _changed_settings(resumed.fingerprint.settings, fingerprint.settings)
    warnings = []
    if changed:
        warnings = [f"continued with other settings than before, so the run is another one: {', '.join(changed)}"]
    trainer.restore(optimizer=resumed.optimizer, scaler=resumed.scaler)
    position = _rescale_position(resumed, schedule.global_batch_size, len(loader))
    # Any rank's state will do after a change of the number of processes: the loader notices it from the state.
    pipeline_state = resumed.pipeline[min(rank, len(resumed.pipeline) - 1)]
    loader.load_state_dict(pipeline_state, epoch=position.epoch, iteration=position.iteration_in_epoch)
    return position, warnings + loader.warnings


def _changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ from those of the checkpoint, as "name (old -> new)"."""
    before = LEGACY_DEFAULTS | before
    changed = [name for name, value in now.items() if before.get(name) != value]
    return [name if name == TRAINING_DATA_KEY else f"{name} ({before.get(name)} -> {now[name]})" for name in changed]


def _rescale_position(resumed: Checkpoint, global_batch_size: int, iterations_per_epoch: int) -> Position:
    """The position in iterations of this run, which may have another global batch size.

    A position inside an epoch stays inside it, so that the rest of the epoch is trained.
    """
    position = resumed.position
    done = position.iteration_in_epoch
    if done == position.iterations_per_epoch:
        done = iterations_per_epoch
    elif done:
        settings = resumed.fingerprint.settings
        old_batch_size = settings["--batch-size"] * settings["the number of processes"]
        done = min(max(1, done * old_batch_size // global_batch_size), iterations_per_epoch - 1)
    return replace(position, iteration_in_epoch=done, iterations_per_epoch=iterations_per_epoch)
