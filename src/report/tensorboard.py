"""TensorBoard's event files, if that package is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from src.runtime.output_files import atomic_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_writer(folder: Path) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # here, because it may be missing

    return SummaryWriter(log_dir=str(folder))


def rewind_events(file: Path, is_before: Callable[[str, int], bool]) -> None:
    """Keeps the values of an event file for whose tag and step `is_before` holds.

    TensorBoard's own purge_step is one limit for all tags.  Here the steps of training/* are iterations and those of
    the other tags epochs, so values of abandoned epochs would stay, and each of their steps get a second value.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.summary.writer.record_writer import RecordWriter

    with atomic_write(file) as copy:
        writer = RecordWriter(copy)
        for event in LegacyEventFileLoader(str(file)).Load():
            if all(is_before(value.tag, event.step) for value in event.summary.value):
                writer.write(event.SerializeToString())
