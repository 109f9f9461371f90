"""What a run starts from: fresh or given weights, or the checkpoint of a run that is continued."""

from collections.abc import Sequence
from pathlib import Path

import torch

from src.data.coco import Category
from src.data.loaders import TrainLoader
from src.distributed import Processes
from src.ssd.model import SSD300
from src.weights.backbone import load_backbone_weights
from src.weights.detector import load_detector, load_weights
from src.weights.files import load_checkpoint

from .run import LAST, Identity, Position, changed_settings, restore_position
from .step import Schedule, Trainer


def resumed_file(resume: Path | bool | None, output: Path) -> Path | None:
    """The checkpoint that --resume continues, None for a new run: without a file last.pt, where there is one."""
    if isinstance(resume, Path):
        return resume
    return output / LAST if resume and (output / LAST).exists() else None


def starting_model(
    backbone: str,
    categories: Sequence[Category],
    *,
    seed: int,
    resumed: tuple[Path, dict] | None,
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
            source, state = resumed
            load_weights(model, state["model"], source=source, fresh_label_heads=False)
        elif checkpoint is not None:
            news += load_detector(model, load_checkpoint(checkpoint), categories, source=checkpoint)
        else:
            load_backbone_weights(model, backbone, backbone_weights)
    processes.broadcast_object()  # fetching may take long
    return model.to(processes.device, memory_format=torch.channels_last), news


def start_position(
    trainer: Trainer, loader: TrainLoader, schedule: Schedule, identity: Identity, state: dict | None, *, rank: int
) -> tuple[Position, list[str]]:
    """Where the run begins, and warnings; all but the weights is taken from the checkpoint, where there is one."""
    if state is None:
        return Position(), []
    changed = changed_settings(state, identity)
    warnings = []
    if changed:
        warnings = [f"continued with other settings than before, so the run is another one: {', '.join(changed)}"]
    trainer.restore(state)
    position = restore_position(state, schedule, len(loader))
    states = state["pipeline"]
    own = states[min(rank, len(states) - 1)]  # which tells of another number of processes itself
    loader.load_state_dict(own, epoch=position.epoch, iteration=position.within)
    return position, warnings + loader.warnings
