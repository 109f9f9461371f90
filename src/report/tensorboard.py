"""TensorBoard's event files, if that package is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from src.runtime.output_files import atomic_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_writer(folder: Path) -> SummaryWriter:
    """A writer of event files in the folder.  Raises ModuleNotFoundError if tensorboard is not installed."""
    from torch.utils.tensorboard import SummaryWriter  # here, because tensorboard is optional

    return SummaryWriter(log_dir=str(folder))


def rewind_events(file: Path, is_before: Callable[[str, int], bool]) -> None:
    """Rewrites an event file without the values whose tag and step are not `is_before`.

    TensorBoard's own purge_step is one limit for all tags.  Here steps of training/* are iterations and other steps are
    epochs, so one limit would keep values of abandoned epochs, whose steps would then have two values.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.summary.writer.record_writer import RecordWriter

    with atomic_write(file) as copy:
        writer = RecordWriter(copy)
        for event in LegacyEventFileLoader(str(file)).Load():
            if all(is_before(value.tag, event.step) for value in event.summary.value):
                writer.write(event.SerializeToString())
