"""What a run starts from: fresh or given weights, or the checkpoint of a run that is continued."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from src.data.annotations.coco import Category
from src.data.pipelines.loaders import TrainLoader
from src.report.run_folder import BEST, LAST, same_folder
from src.runtime.distributed import Processes
from src.ssd.model import SSD300
from src.training.checkpoint import TRAINING_DATA, Checkpoint, Identity, Position, read_run
from src.training.step import Schedule, Trainer
from src.weights.backbone import load_backbone_weights
from src.weights.detector import load_detector, load_weights
from src.weights.files import load_checkpoint

# What a checkpoint means that was written before the flag existed.
LEGACY_DEFAULTS = {"--compile": False, "--orientation": "stored", "--freeze-backbone": False}


def resumed_file(resume: Path | bool | None, output: Path) -> Path | None:
    """The checkpoint that --resume continues, None for a new run: without a file last.pt, where there is one."""
    if isinstance(resume, Path):
        return resume
    return output / LAST if resume and (output / LAST).exists() else None


def run_to_continue(file: Path, output: Path, identity: Identity) -> Checkpoint:
    """The run of a checkpoint.  Raises UserError as `read_run` does.

    If `output` does not hold the run's best network, the next evaluation writes one, whatever was reached elsewhere.
    """
    run = read_run(file, identity)
    if not same_folder(file.parent, output) or not (output / BEST).exists():
        run.position.best_map = None
    return run


def starting_model(
    backbone: str,
    categories: Sequence[Category],
    *,
    seed: int,
    resumed: tuple[Path, Checkpoint] | None,
    checkpoint: Path | None,
    backbone_weights: str,
    processes: Processes,
) -> tuple[SSD300, list[str]]:
    """The network with the weights it starts from, and lines to print about them.

    resumed: file and content of the checkpoint to continue; else come the weights of `checkpoint`, where one is given,
    else those that --backbone-weights names.  They are loaded on rank 0, from which the wrapper of several processes
    copies them.
    """
    torch.manual_seed(seed)
    model = SSD300(backbone, len(categories) + 1)
    news: list[str] = []
    if processes.is_main:
        if resumed is not None:
            source, run = resumed
            load_weights(model, run.model, source=source, fresh_label_heads=False)
        elif checkpoint is not None:
            news += load_detector(model, load_checkpoint(checkpoint), categories, source=checkpoint)
        else:
            load_backbone_weights(model, backbone, backbone_weights)
    processes.broadcast_object()  # fetching may take long
    return model, news


def start_position(
    trainer: Trainer, loader: TrainLoader, schedule: Schedule, identity: Identity, run: Checkpoint | None, *, rank: int
) -> tuple[Position, list[str]]:
    """Where a run begins, and warnings; all but the weights is taken from the one to continue, where there is one."""
    if run is None:
        return Position(), []
    changed = _changed_settings(run.identity.settings, identity.settings)
    warnings = []
    if changed:
        warnings = [f"continued with other settings than before, so the run is another one: {', '.join(changed)}"]
    trainer.restore(optimizer=run.optimizer, scaler=run.scaler)
    position = _counted_anew(run, schedule, len(loader))
    own = run.pipeline[min(rank, len(run.pipeline) - 1)]  # which tells of another number of processes itself
    loader.load_state_dict(own, epoch=position.epoch, iteration=position.within)
    return position, warnings + loader.warnings


def _changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ from those a checkpoint was written under, as "name (old -> new)"."""
    before = LEGACY_DEFAULTS | before
    changed = [name for name, value in now.items() if before.get(name) != value]
    return [name if name == TRAINING_DATA else f"{name} ({before.get(name)} -> {now[name]})" for name in changed]


def _counted_anew(run: Checkpoint, schedule: Schedule, length: int) -> Position:
    """The position of the run to continue in this run's iterations, `length` of them an epoch.

    Where iterations have other images now, inside an epoch stays inside one.
    """
    within = run.position.within
    if within == run.position.length:
        within = length
    elif within:
        settings = run.identity.settings
        old_images = settings["--batch-size"] * settings["the number of processes"]
        within = min(max(1, within * old_images // schedule.images), length - 1)
    return replace(run.position, within=within, length=length)


def schedule_warnings(
    schedule: Schedule, epochs: int, length: int, unreached_evaluations: Sequence[int], missing: Path | None
) -> list[str]:
    """Warnings about what may be a mistake.

    length: iterations an epoch.  missing: the checkpoint that --resume would have continued.
    """
    warnings = [
        f"--evaluation {epoch}: not reached, the epochs are 0 to {epochs - 1} (--epochs)"
        for epoch in unreached_evaluations
    ]
    if missing is not None:
        warnings.append(f"--resume: there is no {missing}, so the run starts afresh")
    iterations = epochs * length
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
    first = min((epoch for epoch in schedule.multistep if epoch < epochs), default=None)
    if first is not None and first * length < schedule.warmup <= iterations:
        warnings.append(
            f"--multistep {first}: the rate falls after {first * length} iterations, before the warm-up of "
            f"{schedule.warmup} is over; raise --multistep or lower --warmup"
        )
    return warnings
